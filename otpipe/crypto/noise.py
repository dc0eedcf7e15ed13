"""The noise budget of one map: proof, before anything is sent, that its answers decrypt.

All lengths are in units of the last place of an answer coefficient, which has ``answer_bits``
bits. A coefficient of B - A t is the message times 2^(answer_bits - log2_p) plus noise, and
decrypts if the noise stays below half of that. Every noise term is a weighted sum of independent
centred variables that are strictly sub-Gaussian (uniform, centred binomial: the variance proxy is
the variance), so Pr(|noise| >= z * std) <= 2 exp(-z^2 / 2). Roundings of ciphertexts count as
uniform, which they are up to the pseudorandomness of RLWE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from otpipe.crypto.params import RlweParams
from otpipe.errors import ParameterError

#: a batch fails (one wrong pad product anywhere) with probability at most 2^-40
MAX_LOG2_FAILURE = -40.0
#: coefficients of all answers of one batch, for the union bound: 2048 slots of a model with
#: 8 million outputs per token (Llama-3-70B has 6.9 million)
LOG2_BATCH_COEFFICIENTS = 34.0
#: deterministic part: the bias of rounding halves up, times at most N coefficients of t
_BIAS_SLACK = 1.0


@dataclass(frozen=True)
class NoiseBudget:
    """Noise of the answers of one map.

    Attributes:
        params: the parameter set.
        max_row_l2: largest Euclidean norm of a row of W, int8 units.
        in_features: n, only to reject impossible norms.
        pack: output ciphertexts added into one answer polynomial.
        upload_bytes: width in which b was sent.

    Raises:
        ParameterError: the inputs contradict each other.
    """

    params: RlweParams
    max_row_l2: float
    in_features: int
    pack: int
    upload_bytes: int

    def __post_init__(self) -> None:
        largest = 128 * math.sqrt(self.in_features)
        if not 0 <= self.max_row_l2 <= largest:
            raise ParameterError(
                f"A row norm of {self.max_row_l2} was announced for {self.in_features} int8 "
                f"weights; it lies between 0 and {largest:.0f}."
            )
        self.params.pack_factor(self.pack)  # a pack factor obeys the same rule as a slot count
        self.params.dropped_upload_bits(self.upload_bytes)

    @property
    def _row(self) -> float:
        """Norm of the weights behind one coefficient, in answer units."""
        scale = 2.0 ** (self.params.answer_bits - self.params.log2_q)
        return self.max_row_l2 * math.sqrt(self.pack) * scale

    @property
    def error_std(self) -> float:
        """W e: the encryption errors, weighted by a row of W."""
        return self._row * self.params.error_std

    @property
    def upload_rounding_std(self) -> float:
        """W times the rounding of b, uniform over 2^dropped residues, ties to even."""
        dropped = self.params.dropped_upload_bits(self.upload_bytes)
        return self._row * 2.0**dropped / math.sqrt(12) if dropped else 0.0

    @property
    def answer_rounding_std(self) -> float:
        """Rounding of both answer parts; the first is multiplied by t, of weight <= 3N/4."""
        return math.sqrt((1 + 0.75 * self.params.ring_degree) / 12)

    @property
    def std(self) -> float:
        """All terms together."""
        return math.hypot(self.error_std, self.upload_rounding_std, self.answer_rounding_std)

    @property
    def allowed(self) -> float:
        """Noise that still decrypts."""
        return 2.0 ** (self.params.answer_bits - self.params.log2_p - 1) - _BIAS_SLACK

    @property
    def sigmas(self) -> float:
        """allowed / std."""
        return self.allowed / self.std

    @property
    def log2_failure(self) -> float:
        """log2 of the probability that any coefficient of a batch decrypts wrongly."""
        tail = 1 - self.sigmas**2 / (2 * math.log(2)) + LOG2_BATCH_COEFFICIENTS
        high, low = sorted((tail, self.params.log2_heavy_secret), reverse=True)
        return high + math.log2(1 + 2.0 ** (low - high))


def choose_upload_bytes(params: RlweParams, max_row_l2: float, in_features: int, pack: int) -> int:
    """Fewest bytes per coefficient of b that keep a batch's failure below 2^-40.

    A pure function of public values: client and server call it and must agree.
    max_row_l2: int8 units. pack: N / num_slots.

    Raises:
        ParameterError: not even unrounded b keeps the failure that low.
    """
    for upload_bytes in params.upload_bytes:
        budget = NoiseBudget(params, max_row_l2, in_features, pack, upload_bytes)
        if budget.log2_failure <= MAX_LOG2_FAILURE:
            return upload_bytes
    raise ParameterError(
        f"A map with row norm {max_row_l2:.0f} in batches of {params.ring_degree // pack} slots "
        f"would decrypt wrongly with probability 2^{budget.log2_failure:.0f}; prepare more slots "
        f"per batch."
    )
