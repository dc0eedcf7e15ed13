"""The next token from the logits: greedy, or drawn at a temperature, among top k, among top p.

Suffix legend: V vocabulary, C candidates left after a cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from otpipe.errors import OtpipeError, UsageError

# Top-p rarely keeps more than a few hundred tokens. So the vocabulary is parted after this many of
# the likeliest, then halved where that does not decide; only so few are ever sorted.
_MAX_SORTED = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature: 0 takes the likeliest token; above 0 draws from softmax(logits / temperature).
    top_p: draw among the fewest likeliest tokens that hold this much probability; 1 is off.
    top_k: draw among the ``top_k`` likeliest tokens; 0 is off.
    seed: makes the draws repeatable; None takes fresh randomness of the operating system.

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature is {self.temperature!r:.40}; use 0 (greedy) or a positive number"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p!r:.40}; use a number above 0, up to 1 (off)")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k!r:.40}; use 0 (off) or a positive integer")
        if self.seed is not None and not (_is_integer(self.seed) and 0 <= self.seed < 2**64):
            raise UsageError(f"seed is {self.seed!r:.40}; use an integer from 0 to 2^64-1, or none")


class Sampler:
    """Chooses tokens by one :class:`SamplingParams`; one sampler serves one generated text."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        # The choice of a token is no secret of the protocol: the server never learns it, and pads
        # come from elsewhere. A statistical generator is enough; None seeds it from the OS.
        self._rng = np.random.default_rng(params.seed)

    def choose(self, logits_V: NDArray[np.float32]) -> int:
        """A token id from float32 logits (V,); raises OtpipeError for NaN or infinity in them.

        Cuts and scales in the order of transformers: temperature, top k, top p. Tokens that tie
        with the k-th likeliest all stay, as there; of equally likely greedy ones the first wins.
        """
        if logits_V.ndim != 1 or logits_V.size == 0:
            raise ValueError(f"logits of shape {logits_V.shape}, not (V,)")
        _check_finite(logits_V)
        params = self.params
        likeliest = int(logits_V.argmax())
        if params.temperature == 0:
            return likeliest
        tokens_C, weights_C = self._candidates(logits_V, likeliest)
        sums_C = np.cumsum(weights_C)
        # random() is at most 1 - 2^-53, so the product is below sums_C[-1] after rounding as well;
        # side="right" never lands on a token of weight 0.
        drawn = int(np.searchsorted(sums_C, self._rng.random() * sums_C[-1], side="right"))
        return drawn if tokens_C is None else int(tokens_C[drawn])

    def _candidates(
        self, logits_V: NDArray[np.float32], likeliest: int
    ) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
        """Token ids (C,), None for all V in order, and unnormalised probabilities (C,)."""
        params = self.params
        tokens: NDArray[np.intp] | None = None
        kept = logits_V
        if 0 < params.top_k < logits_V.size:
            tokens = np.flatnonzero(logits_V >= _kth_largest(logits_V, params.top_k))
            kept = logits_V[tokens]
        # Subtracting the maximum first keeps a tiny temperature from overflowing: all are <= 0.
        scores = kept.astype(np.float64)
        scores -= float(logits_V[likeliest])
        with np.errstate(over="ignore"):  # -inf is what a vanishing probability should be
            scores /= params.temperature
        weights = np.exp(scores, out=scores)
        if params.top_p < 1:
            nucleus = _nucleus(weights, params.top_p)
            tokens = nucleus if tokens is None else tokens[nucleus]
            weights = weights[nucleus]
        return tokens, weights


def _kth_largest(logits_V: NDArray[np.float32], k: int) -> np.float32:
    return np.partition(logits_V, logits_V.size - k)[logits_V.size - k]


def _nucleus(weights_C: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest weights whose sum is at least ``top_p`` of the total.

    In no order, always at least one. transformers cuts the ascending order where the sum
    of the tail is at most 1 - top_p, which is the same set.
    """
    needed = top_p * float(weights_C.sum())
    kept: list[NDArray[np.intp]] = []
    open_ = np.arange(weights_C.size)
    num_largest = _MAX_SORTED
    while open_.size > _MAX_SORTED:
        split = open_.size - num_largest
        order = np.argpartition(weights_C[open_], split)
        largest = open_[order[split:]]
        mass = float(weights_C[largest].sum())
        if mass >= needed:
            open_ = largest
        else:
            kept.append(largest)
            needed -= mass
            open_ = open_[order[:split]]
        num_largest = open_.size // 2
    open_.sort()  # equal weights in token order
    order = open_[np.argsort(-weights_C[open_], kind="stable")]
    cut = int(np.searchsorted(np.cumsum(weights_C[order]), needed)) + 1
    return np.concatenate([*kept, order[:cut]])


def _check_finite(logits_V: NDArray[np.float32]) -> None:
    finite_V = np.isfinite(logits_V)
    if not finite_V.all():
        count = int(logits_V.size - np.count_nonzero(finite_V))
        first = int(finite_V.argmin())
        raise OtpipeError(
            f"{count} of {logits_V.size} logits are NaN or infinite (the first is token {first}),"
            " so no token can be chosen; check the weights that the server loaded."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
