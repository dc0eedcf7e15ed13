"""What the answers of a batch may tell about private weights, and whether they decrypt.

Both bounds hold for *all* int8 weights and multipliers: they depend on shapes alone, so no
parameter that the client sees is chosen from the weights.

**Distance.** After decryption a coefficient of the second part is Delta * (result) + nu + f. nu
collects c_i W_i e, the errors in the client's own ciphertexts through the weights, and the noise
u e_0 - e_1 t of the re-randomisation. The flooding f = 2^s (w_1 + w_2 + w_3) has words w_i uniform
over n = 2^64 consecutive integers. Rounding drops the low s bits (the set sees to it), so nu acts
as an integer shift of w_1 + w_2 + w_3 by at most |nu| / 2^s + 1.

The law p of w_1 + w_2 + w_3 has Hellinger distance H(p, p shifted by 1) <= 0.756 / n: with p as a
quadratic spline, H^2 = (1/8) * integral of p'^2 / p = 0.5703 / n^2. H is a metric, so
H(p, p shifted by x) <= 0.756 |x| / n for every x. Squares of H add up (at most) over independent
coefficients, and the statistical distance is at most sqrt(2) H. So for the vector nu of a whole
batch, M coefficients,

    distance <= sqrt(2) * 0.756 / n * sqrt(sum (|nu| / 2^s + 1)^2)
             <= sqrt(2) * 0.756 / n * (sqrt(E |nu|^2) / 2^s + sqrt(M)),

the second line by Jensen and Minkowski: the client's view contains e, and the distance of a pair
is the mean over e. The distance grows with the *square root* of what is added up, batches too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from otpipe.crypto.noise import MAX_LOG2_FAILURE
from otpipe.crypto.private_params import FLOOD_WORD_BITS, MAX_MULTIPLIER, PrivateParams
from otpipe.errors import ParameterError

#: statistical distance of one batch from a view that needs only the results
MAX_LOG2_DISTANCE = -40.0
#: H(p, p shifted by 1) * n for the sum of three uniform words
HELLINGER_OF_ONE = 0.756
_MAX_WEIGHT = 128
#: coefficients of all answers of a batch, for the union bound: 8192 slots of 2^27 outputs
_LOG2_COEFFICIENTS = 40


def log2_distance(params: PrivateParams, shapes: Sequence[tuple[int, int]]) -> float:
    """log2 of the statistical distance of the client's view of one batch from the simulated one.

    shapes: (in_features n, out_features m) of every map. A batch has up to N slots; fewer slots
    have the same bound, since packing adds up the noise of as many outputs as there are fewer
    coefficients.
    """
    degree, variance = params.ring_degree, params.error_std**2
    energy = coefficients = 0.0
    for n, m in shapes:
        row = n * (_MAX_WEIGHT * MAX_MULTIPLIER) ** 2 * variance
        # u e_0 and e_1 t: N terms with a ternary factor of variance 2/3 each.
        key = 2 * degree * (2 / 3) * variance
        energy += m * degree * (row + key)
        coefficients += m * degree
    shift = math.sqrt(energy) / 2.0**params.flood_shift + math.sqrt(coefficients)
    return math.log2(math.sqrt(2) * HELLINGER_OF_ONE * shift) - FLOOD_WORD_BITS


def log2_failure(params: PrivateParams) -> float:
    """log2 of the probability that any coefficient of a batch decrypts wrongly.

    Flooding and the rounding of the second part are bounded and taken off what is allowed. Left is
    the rounding of the first part, uniform since that part is, times t: strictly sub-Gaussian.
    """
    std = math.sqrt(0.75 * params.ring_degree / 12)
    sigmas = params.allowed_rounding / std
    tail = 1 - sigmas**2 / (2 * math.log(2)) + _LOG2_COEFFICIENTS
    high, low = sorted((tail, params.log2_heavy_secret), reverse=True)
    return high + math.log2(1 + 2.0 ** (low - high))


def check_batch(params: PrivateParams, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse a model whose batches would tell too much or decrypt wrongly.

    shapes: (in_features n, out_features m) of every map. To be called before anything is served.

    Raises:
        ParameterError: one of the two bounds does not hold.
    """
    distance = log2_distance(params, shapes)
    if distance > MAX_LOG2_DISTANCE:
        raise ParameterError(
            f"A batch for this model would tell about its weights with statistical distance "
            f"2^{distance:.1f}; private set {params.name!r} is for models that stay below "
            f"2^{MAX_LOG2_DISTANCE:.0f}."
        )
    failure = log2_failure(params)
    if failure > MAX_LOG2_FAILURE:
        raise ParameterError(
            f"Answers of private set {params.name!r} would decrypt wrongly with probability "
            f"2^{failure:.0f} a batch; use a set that floods less."
        )
