"""What a client can look for in answers, and how a test spoils what hides them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from private_helpers import (
    MAP_INDEX,
    MODULUS,
    centred,
    decoded,
    from_digits,
    integers,
    linear_answers,
    times_secret,
    use_backend,
)
from torch import Tensor

from otpipe.crypto import private_rlwe, private_secrets
from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import AnswerSecrets, draw_secrets
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.rlwe import BatchSecret, expand_a
from otpipe.kernels import wide

#: standard deviations of a normal statistic
NORMAL_LIMIT = 6.0
Fault = Callable[[AnswerSecrets], AnswerSecrets]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Draw secrets as usual, then spoil them."""

    def broken(packing: PrivatePacking, out: AnswerSecrets) -> None:
        draw_secrets(packing, out)
        for field, spoiled in zip(out, fault(out), strict=True):
            field[:] = spoiled

    monkeypatch.setattr(private_secrets, "draw_secrets", broken)


def matched_filter(noise: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    """Correlation of noise with what a guessed map would add, in standard deviations of chance."""
    noise, guess = noise - noise.mean(), guess - guess.mean()
    return float((noise * guess).sum() / np.sqrt((noise**2).mean() * (guess**2).sum()))


class Unrounded:
    """One exchange in a small ring, before its answers are rounded, and the client's errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Records exchanges of the torch backend from now on."""
        use_backend(monkeypatch, "torch")
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._errors: list[NDArray[np.int8]] = []
        rounded, sampled = TorchBackend.rounded, private_rlwe.centered_binomial

        def record_parts(backend: TorchBackend, first: Tensor, second: Tensor) -> Tensor:
            self._parts.append((first, second))
            return rounded(backend, first, second)

        def record_errors(count: int, eta: int) -> NDArray[np.int8]:
            self._errors.append(sampled(count, eta))
            return self._errors[-1]

        monkeypatch.setattr(TorchBackend, "rounded", record_parts)
        monkeypatch.setattr(private_rlwe, "centered_binomial", record_errors)

    def forget(self) -> None:
        """Start with the next exchange."""
        self._parts.clear()
        self._errors.clear()

    def noise(self, secret: BatchSecret, packing: PrivatePacking, results_mT: Tensor) -> NDArray:
        """B - A t - Delta * result of all results, float64 (m, T)."""
        first, second = (torch.cat(parts, 1) for parts in zip(*self._parts, strict=True))
        known = times_secret(first, secret).view(2, -1, packing.outputs, packing.stride)
        left = wide.add_(second.clone(), wide.negated(known[..., : packing.num_slots].contiguous()))
        left = left.view(2, -1, packing.num_slots)[:, : len(results_mT)].contiguous()
        left[1] -= results_mT << (packing.params.delta_shift - 64)
        return np.array([[float(centred(value)) for value in row] for row in integers(left)])

    def errors(self, degree: int) -> NDArray[np.float64]:
        """The client's errors but the key's: (J, N), in order if it had one thread."""
        return np.concatenate(self._errors).reshape(-1, degree)[1:].astype(np.float64)


def first_part_fits(
    packing: PrivatePacking,
    a_key: bytes,
    answers: NDArray[np.uint8],
    weight: Tensor,
    multipliers: Tensor,
) -> bool:
    """Whether A is what these weights make of the public polynomials, up to small errors."""
    dropped = 128 - packing.params.first_bits
    count = packing.num_polynomials(weight.shape[1])
    public = from_digits(expand_a(a_key, MAP_INDEX, 0, count, packing.params))
    linear = linear_answers(packing, weight, multipliers, public[1:])
    first, _ = decoded(packing, answers)
    off = (
        centred(got - (want >> dropped), MODULUS >> dropped)
        for row, known in zip(first, linear, strict=True)
        for got, want in zip(row, known, strict=True)
    )
    return all(abs(value) <= 1 for value in off)
