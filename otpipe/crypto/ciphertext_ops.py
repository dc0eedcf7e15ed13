"""Elementwise passes over ciphertexts: compiled for the CPU, and their torch twins for CUDA.

Shape suffixes: J inputs of a block, N ring degree, B bytes, D digit planes, R rows (outputs), G
groups of g outputs.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from torch import Tensor

from otpipe.crypto.params import RlweParams
from otpipe.kernels.cpu import (
    Array,
    kernel,
    on_team,
    pack_words,
    parallel_for,
    team_kernel,
    unpack_words,
)
from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.kernels.ring_gemm import digit_planes_torch


def split_packed(block_JNB: Tensor, out_JDN: Tensor) -> None:
    """Signed base-256 digits of packed integers (J, N, B) uint8 into (J, B, N) int8; CPU."""
    num_bytes = block_JNB.shape[2]
    flat = block_JNB.contiguous().view(block_JNB.shape[0], -1).numpy()
    if flat.ctypes.data % 8:
        flat = flat.copy()
    words, target = flat.view(np.uint64), out_JDN.numpy()
    bias = int.from_bytes(b"\x80" * num_bytes, "little")
    parallel_for(lambda lo, hi: _split_words(words, num_bytes, bias, target, lo, hi), len(words), 8)


def split_packed_torch(block_JNB: Tensor) -> Tensor:
    """``split_packed`` in plain torch, on any device: (J, B, N) int8."""
    num_bytes = block_JNB.shape[2]
    return digit_planes_torch(unpack_uints(block_JNB), 8 * num_bytes).transpose(0, 1)


@kernel
def _split_words(words: Array, num_bytes: int, bias: int, out_JDN: Array, lo: int, hi: int) -> None:
    values = np.empty(out_JDN.shape[2], np.int64)
    for j in range(lo, hi):
        unpack_words(words[j], num_bytes, values)
        for i in range(num_bytes):
            row = out_JDN[j, i]
            for k in range(values.shape[0]):
                row[k] = np.int8(((values[k] + bias) >> np.int64(8 * i)) ^ np.int64(0x80))


def add_products(products_RDN: Tensor, shift: int, sums_RN: Tensor) -> None:
    """sums += sum_i products[:, i] << (8 i + shift), mod 2^64; CPU."""
    on_team(_add_products, products_RDN.numpy(), shift, sums_RN.numpy())


def add_products_torch(products_RDN: Tensor, shift: int, sums_RN: Tensor) -> None:
    """``add_products`` in plain torch, on any device."""
    for i in range(products_RDN.shape[1]):
        sums_RN.add_(products_RDN[:, i], alpha=1 << (8 * i + shift))


@team_kernel
def _add_products(products: Array, shift: int, sums: Array) -> None:
    for r in nb.prange(products.shape[0]):
        total = sums[r]
        for i in range(products.shape[1]):
            row, up = products[r, i], np.int64(8 * i + shift)
            for k in range(total.shape[0]):
                total[k] += np.int64(row[k]) << up


def round_products(
    products_RDN: Tensor,
    shift: int,
    pack: int,
    params: RlweParams,
    answer: Tensor,
    first_group: int,
    half: int,
) -> None:
    """Combine digit products, pack groups of ``pack`` outputs, round and write bytes; CPU.

    products: int32 or int64 (R, D, N), the digits of R outputs; a last group may be partly filled.
    Writes ceil(R / pack) groups of ``answer``, uint8 (G, 2, N, answer_bytes), from ``first_group``.
    """
    words = answer.view(*answer.shape[:2], -1).numpy().view(np.uint64)
    on_team(
        _round_products,
        products_RDN.numpy(),
        shift,
        pack,
        params.log2_q - params.answer_bits,
        params.answer_bytes,
        words,
        first_group,
        half,
    )


@team_kernel
def _round_products(
    products: Array,
    shift: int,
    pack: int,
    dropped: int,
    num_bytes: int,
    words: Array,
    first_group: int,
    half: int,
) -> None:
    num_rows, degree = products.shape[0], products.shape[2]
    slots = degree // pack
    one_half = np.int64(1) << np.int64(dropped - 1)
    for group in nb.prange((num_rows + pack - 1) // pack):
        total = np.zeros(degree, np.int64)
        first_row = group * pack
        for r in range(first_row, min(first_row + pack, num_rows)):
            # Times X^start: the coefficients that pass X^N come back negated.
            start = (r - first_row) * slots
            upper, lower = total[start:], total[:start]
            for i in range(products.shape[1]):
                up = np.int64(8 * i + shift)
                stay, wrap = products[r, i, : degree - start], products[r, i, degree - start :]
                for k in range(stay.shape[0]):
                    upper[k] += np.int64(stay[k]) << up
                for k in range(wrap.shape[0]):
                    lower[k] -= np.int64(wrap[k]) << up
        for k in range(degree):
            total[k] = (total[k] + one_half) >> np.int64(dropped)
        pack_words(total, num_bytes, words[first_group + group, half])


def round_sums_torch(sums_RN: Tensor, pack: int, params: RlweParams) -> Tensor:
    """Pack and round sums mod 2^64, in plain torch, on any device.

    sums: int64 (R, N). Returns uint8 (ceil(R / pack), N, answer_bytes).
    """
    degree = params.ring_degree
    slots, dropped = degree // pack, params.log2_q - params.answer_bits
    missing = -len(sums_RN) % pack
    if missing:
        sums_RN = torch.nn.functional.pad(sums_RN, (0, 0, 0, missing))
    sums_GgN = sums_RN.view(-1, pack, degree)
    total = sums_GgN[:, 0].clone()
    for u in range(1, pack):
        start = u * slots
        total[:, start:] += sums_GgN[:, u, : degree - start]
        total[:, :start] -= sums_GgN[:, u, degree - start :]
    total = (total + (1 << (dropped - 1))) >> dropped
    return pack_uints(total, params.answer_bytes)
