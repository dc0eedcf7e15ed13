"""Reference implementations and statistics shared by the tests of otpipe.crypto.

The references know the secret and use other code paths than the package: negacyclic products are
ring GEMMs with the Toeplitz matrix of t, not transforms.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.crypto.evaluate import LinearEvaluator
from otpipe.crypto.noise import choose_upload_bytes
from otpipe.crypto.params import RlweParams
from otpipe.crypto.rlwe import BatchSecret, decrypt_block, encrypt_block, expand_a
from otpipe.kernels import combine_planes, ring_gemm, unpack_uints

MAP_INDEX = 5


def negacyclic_matrix(t_N: NDArray[np.int8]) -> Tensor:
    """int8 (N, N) whose product with the coefficients of x is x * t mod X^N + 1."""
    degree = t_N.size
    k = np.arange(degree)
    difference = k[:, None] - k[None, :]
    signed = np.where(difference >= 0, t_N[difference % degree], -t_N[difference % degree])
    return torch.from_numpy(signed.astype(np.int8))


def times_secret(secret: BatchSecret, x_RN: Tensor) -> Tensor:
    """Exact int64 products mod 2^64 of polynomials (R, N) with t."""
    return ring_gemm(x_RN, negacyclic_matrix(secret._t_N), 64)


def residual(
    secret: BatchSecret, a_key: bytes, block: NDArray[np.uint8], r_TJ: NDArray[np.unsignedinteger]
) -> Tensor:
    """b - a t - Delta r mod q, signed: the error if b travelled unrounded. (J, N) int64."""
    params = secret.params
    count = block.shape[0]
    a_JDN = torch.from_numpy(expand_a(a_key, MAP_INDEX, 0, count, params))
    a = combine_planes(a_JDN.movedim(1, 0).int().contiguous(), 8 * params.num_planes).long()
    b = unpack_uints(torch.from_numpy(block)) << params.dropped_upload_bits(block.shape[2])
    message = torch.zeros_like(b)
    message[:, : r_TJ.shape[0]] = torch.from_numpy(r_TJ.T.astype(np.int64))
    delta_shift = params.log2_q - params.log2_p
    return signed(b - times_secret(secret, a) - (message << delta_shift), params.log2_q)


def phase_noise(
    secret: BatchSecret,
    answer: Tensor,
    want: NDArray[np.unsignedinteger],
) -> Tensor:
    """Noise of every answer coefficient in answer units, given W r (m, T). (G, N) int64."""
    params = secret.params
    parts = unpack_uints(answer)
    degree = params.ring_degree
    phase = parts[:, 1] - times_secret(secret, parts[:, 0].contiguous())
    message = np.zeros((answer.shape[0] * degree,), np.int64)
    message[: want.size] = want.reshape(-1)
    wanted = torch.from_numpy(message).view(-1, degree) << (params.answer_bits - params.log2_p)
    return signed(phase - wanted, params.answer_bits)


def signed(x: Tensor, bits: int) -> Tensor:
    return (x << (64 - bits)) >> (64 - bits)


def random_pads(params: RlweParams, num_slots: int, count: int) -> NDArray[np.unsignedinteger]:
    size = num_slots * count * params.message_dtype.itemsize
    return np.frombuffer(bytearray(os.urandom(size)), params.message_dtype).reshape(
        num_slots, count
    )


@dataclass
class Exchange:
    """Everything both parties saw in one preprocessing exchange."""

    secret: BatchSecret
    upload_bytes: int
    answer: Tensor  # (G, 2, N, answer_bytes)
    got: NDArray[np.unsignedinteger]  # (m, T)
    want: NDArray[np.unsignedinteger]  # (m, T)


def exchange(
    params: RlweParams,
    weight: Tensor,
    num_slots: int,
    block_size: int = 64,
    max_bytes: int = 1 << 20,
) -> Exchange:
    """Encrypt pads, evaluate on the weight's device, decrypt, and compute the truth."""
    m, n = weight.shape
    pack = params.pack_factor(num_slots)
    max_row_l2 = float(weight.double().norm(dim=1).max())
    upload_bytes = choose_upload_bytes(params, max_row_l2, n, pack)
    secret, a_key = BatchSecret.generate(params), os.urandom(32)
    r_Tn = random_pads(params, num_slots, n)
    evaluator = LinearEvaluator(weight, params, MAP_INDEX, a_key, num_slots, upload_bytes)
    for first in range(0, n, block_size):
        r_TJ = r_Tn[:, first : first + block_size]
        block = encrypt_block(secret, a_key, MAP_INDEX, first, r_TJ, upload_bytes)
        evaluator.add_block(first, torch.from_numpy(block))
    got, answers = [], []
    for first_group, answer in evaluator.answers(max_bytes):
        num_outputs = min(len(answer) * pack, m - first_group * pack)
        got.append(decrypt_block(secret, params, answer.numpy(), num_slots, num_outputs))
        answers.append(answer.clone())  # its memory may serve the next
    wide = weight.cpu().numpy().astype(np.int64) @ r_Tn.T.astype(np.int64)
    return Exchange(
        secret,
        upload_bytes,
        torch.cat(answers),
        np.concatenate(got),
        wide.astype(params.message_dtype),
    )


def chi_square_z(octets: NDArray[np.uint8]) -> float:
    """How many standard deviations the byte histogram lies from uniform; beyond 6 is not chance."""
    counts = np.bincount(octets.reshape(-1), minlength=256)
    expected = octets.size / 256
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - 255) / np.sqrt(2 * 255)


def looks_uniform(octets: NDArray[np.uint8]) -> bool:
    """Every byte position of the last axis, and all together, pass the chi-square test."""
    columns = [octets[..., i] for i in range(octets.shape[-1])]
    return all(abs(chi_square_z(column)) < 6 for column in [octets, *columns])


def look_alike(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    """Two-sample chi-square on byte histograms, position by position."""
    for i in range(first.shape[-1]):
        a = np.bincount(first[..., i].reshape(-1), minlength=256).astype(float)
        b = np.bincount(second[..., i].reshape(-1), minlength=256).astype(float)
        present = (a + b) > 0
        statistic = float(((a - b)[present] ** 2 / (a + b)[present]).sum())
        freedom = int(present.sum()) - 1
        if freedom and (statistic - freedom) / np.sqrt(2 * freedom) > 6:
            return False
    return True


def has_fresh_error(error_JN: Tensor, eta: int) -> bool:
    """Values behave like centred binomial ones: range, mean, variance, no repetition by row."""
    error = error_JN.double()
    count = error.numel()
    variance = eta / 2
    if error.abs().max() > eta or abs(error.mean()) > 6 * (variance / count) ** 0.5:
        return False
    if abs(error.var() / variance - 1) > 6 * (2 / count) ** 0.5:
        return False
    return len({tuple(row.tolist()) for row in error_JN}) == len(error_JN)
