"""Shared by the tests of private mode: an INSECURE small set, Python-integer references, exchanges.

The small sets exist in tests only. They have the modulus, messages, answers and flooding of the
real ones, so that all code runs as it is, in a ring too small to hide anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.crypto import negacyclic_wide, private_evaluate
from otpipe.crypto.private_cpu import CompiledBackend
from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivatePacking, PrivateParams
from otpipe.crypto.private_rlwe import decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import (
    AnswerSecrets,
    MaskStream,
    draw_secrets,
    empty_secrets,
    fresh_mask_key,
)
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.rlwe import BatchSecret, expand_a

MAP_INDEX = 3
MODULUS = 1 << 128
PRIVATE44 = PRIVATE_PARAMS["private44"]


class InsecureTestParams(PrivateParams):
    """INSECURE: a ring degree outside the table, refused everywhere but here."""

    def __post_init__(self) -> None:
        """Check nothing."""


INSECURE = InsecureTestParams(
    name="INSECURE",
    ring_degree=64,
    log2_q=128,
    log2_p=44,
    first_bits=56,
    second_bits=48,
    flood_shift=18,
)
#: as products of two parties' matrices have it: the first part is a whole limb
INSECURE_LIMB = InsecureTestParams(
    name="INSECURE",
    ring_degree=64,
    log2_q=128,
    log2_p=51,
    first_bits=64,
    second_bits=56,
    flood_shift=11,
)


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let evaluators on the CPU use the compiled or the torch backend."""

    def backend(packing: PrivatePacking, device: torch.device) -> CompiledBackend | TorchBackend:
        return CompiledBackend(packing) if name == "compiled" else TorchBackend(packing, device)

    monkeypatch.setattr(private_evaluate, "_backend", backend)


# --- Python integers ---------------------------------------------------------------------------


def integers(x: Tensor) -> list[list[int]]:
    """(2, J, N) limbs as Python integers in [0, 2^128)."""
    low, high = (limb.tolist() for limb in x)
    return [
        [(h % (1 << 64)) << 64 | lo % (1 << 64) for h, lo in zip(hs, los, strict=True)]
        for hs, los in zip(high, low, strict=True)
    ]


def from_octets(block: NDArray[np.uint8]) -> list[list[int]]:
    """Little-endian integers (J, N, bytes)."""
    return [[int.from_bytes(c.tobytes(), "little") for c in polynomial] for polynomial in block]


def from_digits(planes_JDN: NDArray[np.int8]) -> list[list[int]]:
    """Polynomials behind signed base-256 digits, mod 2^128."""
    return [
        [
            sum(int(digit) << (8 * i) for i, digit in enumerate(column)) % MODULUS
            for column in polynomial.T
        ]
        for polynomial in planes_JDN
    ]


def times(x: list[int], y: list[int]) -> list[int]:
    """Negacyclic product mod 2^128 of polynomials; ``y`` is the sparse or small one."""
    degree = len(x)
    out = [0] * degree
    for shift, factor in enumerate(y):
        if factor:
            for k, value in enumerate(x):
                at = k + shift
                out[at % degree] += (-factor if at >= degree else factor) * value
    return [value % MODULUS for value in out]


def power(degree: int, exponent: int) -> list[int]:
    """X^exponent as a polynomial, any sign of exponent."""
    out = [0] * degree
    out[exponent % degree] = -1 if exponent % (2 * degree) >= degree else 1
    return out


def plus(*polynomials: list[int]) -> list[int]:
    """Sum mod 2^128."""
    return [sum(values) % MODULUS for values in zip(*polynomials, strict=True)]


def centred(value: int, modulus: int = MODULUS) -> int:
    """The residue of least magnitude."""
    value %= modulus
    return value - modulus if value >= modulus // 2 else value


def linear_answers(
    packing: PrivatePacking, weight: Tensor, multipliers: Tensor, polynomials: list[list[int]]
) -> list[list[int]]:
    """Definition: sum_u X^(u v T) c_i sum_j W_ij X^(-w T) x_J for every answer."""
    degree = packing.params.ring_degree
    (m, n), outputs = weight.shape, packing.outputs
    answers = []
    for answer in range(packing.num_answers(m)):
        total = [0] * degree
        for u in range(min(outputs, m - answer * outputs)):
            i = answer * outputs + u
            for j in range(n):
                turn = u * packing.stride - (j % packing.inputs) * packing.num_slots
                factor = int(multipliers[i]) * int(weight[i, j])
                moved = times(polynomials[j // packing.inputs], power(degree, turn))
                total = plus(total, [factor * value for value in moved])
        answers.append(total)
    return answers


def times_secret(x_GN: Tensor, secret: BatchSecret) -> Tensor:
    """x * t mod 2^128, (2, G, N); test_negacyclic_wide has these products exact."""
    limbs = negacyclic_wide.limbs(128, x_GN.shape[-1])
    spectra = negacyclic_wide.limb_spectra_torch(x_GN, *limbs)
    by_M = negacyclic_wide.spectrum_torch(torch.from_numpy(secret._t_N))
    return negacyclic_wide.product_torch(spectra, by_M, limbs[1])


# --- exchanges ---------------------------------------------------------------------------------


def random_pads(num_slots: int, count: int) -> NDArray[np.uint64]:
    octets = bytearray(os.urandom(8 * num_slots * count))
    return np.frombuffer(octets, np.uint64).reshape(num_slots, count)


def random_map(m: int, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Weight with the extremes in it, and multipliers."""
    weight = torch.randint(-127, 128, (m, n), dtype=torch.int8)
    weight[0] = -128
    multipliers = torch.randint(0, 128, (m,))
    multipliers[0] = 127
    return weight.to(device), multipliers.to(device)


def drawn(count: int, packing: PrivatePacking) -> AnswerSecrets:
    """Fresh secrets of so many answers."""
    secrets = empty_secrets(count, packing)
    draw_secrets(packing, secrets)
    return secrets


def fresh_masks(m: int, params: PrivateParams = INSECURE) -> MaskStream:
    return MaskStream(fresh_mask_key(), MAP_INDEX, m, params.log2_p)


def results(
    weight: Tensor,
    multipliers: Tensor,
    r_Tn: NDArray[np.uint64],
    masks_Tm: NDArray[np.int64],
    bits: int = 44,
) -> NDArray[np.uint64]:
    """c (W r) - s mod 2^bits, (m, T), in exact arithmetic mod 2^64."""
    wide = weight.cpu().numpy().astype(np.int64).astype(np.uint64)
    scaled = (wide @ r_Tn.T) * multipliers.cpu().numpy().astype(np.uint64)[:, None]
    return (scaled - masks_Tm.T.astype(np.uint64)) & np.uint64((1 << bits) - 1)


def blocks(
    secret: BatchSecret,
    packing: PrivatePacking,
    a_key: bytes,
    r_Tn: NDArray[np.uint64],
    polynomials: int,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """What a client sends: the key, then so many polynomials at a time."""
    yield 0, encrypt_key(secret, a_key, MAP_INDEX)
    step, n = polynomials * packing.inputs, r_Tn.shape[1]
    for first in range(0, n, step):
        number = 1 + first // packing.inputs
        r_Tj = r_Tn[:, first : first + step]
        yield number, encrypt_block(secret, packing, a_key, MAP_INDEX, number, r_Tj)


@dataclass
class Exchange:
    """Everything of one exchange, both sides."""

    packing: PrivatePacking
    secret: BatchSecret
    a_key: bytes
    upload: NDArray[np.uint8]  # (polynomials, N, 16)
    answers: NDArray[np.uint8]  # (G, answer_bytes)
    got: NDArray[np.uint64]  # (m, T)
    want: NDArray[np.uint64]  # (m, T)


def exchange(
    packing: PrivatePacking,
    weight: Tensor,
    multipliers: Tensor,
    polynomials: int = 5,
    max_bytes: int = 1 << 16,
    masks: MaskStream | None = None,
    r_Tn: NDArray[np.uint64] | None = None,
) -> Exchange:
    """One whole exchange and the truth about it."""
    m, n = weight.shape
    params = packing.params
    secret, a_key = BatchSecret.generate(params), os.urandom(32)
    masks = fresh_masks(m, params) if masks is None else masks
    r_Tn = random_pads(packing.num_slots, n) if r_Tn is None else r_Tn
    evaluator = PrivateEvaluator(weight, multipliers, packing, MAP_INDEX, a_key, masks)
    upload = []
    for first, block in blocks(secret, packing, a_key, r_Tn, polynomials):
        evaluator.add_block(first, torch.from_numpy(block))
        upload.append(block)
    pieces = [piece.numpy() for _, piece in evaluator.answers(max_bytes)]
    answers = np.concatenate(pieces)
    return Exchange(
        packing,
        secret,
        a_key,
        np.concatenate(upload),
        answers,
        decrypt_block(secret, packing, answers, m),
        results(weight, multipliers, r_Tn, masks.rows(0, packing.num_slots), params.log2_p),
    )


def public_polynomials(packing: PrivatePacking, a_key: bytes, n: int) -> list[list[int]]:
    """a_0, a_1, ... of an exchange."""
    count = packing.num_polynomials(n)
    return from_digits(expand_a(a_key, MAP_INDEX, 0, count, packing.params))


def decoded(packing: PrivatePacking, answers: NDArray[np.uint8]) -> tuple[list, list]:
    """Both parts of answers as integers: A (G, N) of first_bits, B (G, g T) of second_bits."""
    params = packing.params
    split = params.ring_degree * params.first_bytes
    first = answers[:, :split].reshape(len(answers), -1, params.first_bytes)
    second = answers[:, split:].reshape(len(answers), -1, params.second_bytes)
    return from_octets(first), from_octets(second)
