"""What the answers of a preparation may tell about the server's matrices, and whether they decrypt.

The argument is that of ``private_noise``: the noise nu of a coefficient moves the flooding, the sum
of three uniform 64-bit words times 2^s, by at most |nu| / 2^s + 1 steps, which costs 0.756 2^-64 of
Hellinger distance a step; squares add up over coefficients. What differs is nu: digits of
``digit_bits`` in place of int8 weights times multipliers, and the sum is over what is really sent.

A coefficient of an answer collects g outputs of p inputs each,

    E nu^2 <= (g p D^2 + 2 N (2/3)) sigma^2,

the second term for u e_0 - e_1 t. The server's matrix is its uniform share of a mask, drawn for
this preparation: the distance is the mean over it, and by Jensen D^2 may be the mean square of a
digit, 2^(2 digit_bits) / 12 (its largest square is three times that; zeros, where a causal mask has
them, only lower it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from otpipe.crypto.noise import MAX_LOG2_FAILURE
from otpipe.crypto.private_matmul import ProductPlan
from otpipe.crypto.private_noise import HELLINGER_OF_ONE, MAX_LOG2_DISTANCE, log2_failure
from otpipe.crypto.private_params import FLOOD_WORD_BITS
from otpipe.errors import ParameterError


def squared_distance(plan: ProductPlan) -> float:
    """Square of the bound on the statistical distance of one product; they add up."""
    params = plan.params
    variance = params.error_std**2
    digit = 2.0 ** (2 * params.digit_bits) / 12
    key = 2 * params.ring_degree * (2 / 3) * variance
    energy = coefficients = 0.0
    for piece in plan.pieces:
        packing = piece.packing
        useful = packing.num_answers(plan.rows) * packing.outputs * packing.num_slots
        energy += useful * (packing.outputs * plan.inputs * digit * variance + key)
        coefficients += useful
    shift = math.sqrt(energy) / 2.0**params.flood_shift + math.sqrt(coefficients)
    return (math.sqrt(2) * HELLINGER_OF_ONE * shift * 2.0**-FLOOD_WORD_BITS) ** 2


def log2_distance(plans: Iterable[tuple[ProductPlan, int]]) -> float:
    """log2 of the distance of the client's view of one preparation from the simulated one.

    plans: with how often each is made; of none the distance is 0.
    """
    total = sum(count * squared_distance(plan) for plan, count in plans)
    return math.log2(total) / 2 if total else -math.inf


def check_preparation(plans: Iterable[tuple[ProductPlan, int]]) -> None:
    """Refuse a preparation that would tell too much or decrypt wrongly.

    plans: with how often each is made. To be called before anything is sent.

    Raises:
        ParameterError: one of the two bounds does not hold.
    """
    plans = list(plans)
    distance = log2_distance(plans)
    if distance > MAX_LOG2_DISTANCE:
        raise ParameterError(
            f"This preparation would tell about masks with statistical distance 2^{distance:.1f}, "
            f"above 2^{MAX_LOG2_DISTANCE:.0f}; prepare fewer positions or layers at a time."
        )
    for params in {plan.params for plan, _ in plans}:
        failure = log2_failure(params)
        if failure > MAX_LOG2_FAILURE:
            raise ParameterError(
                f"Answers of private set {params.name!r} would decrypt wrongly with probability "
                f"2^{failure:.0f}; use a set that floods less."
            )
