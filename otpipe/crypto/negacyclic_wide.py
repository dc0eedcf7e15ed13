"""Exact products of a ternary polynomial with coefficients of up to 128 bits, by float64 FFT.

The transform is that of ``negacyclic``: a polynomial of Z[X]/(X^N + 1) as one complex polynomial of
length M = N/2. Here a coefficient is split into as many signed limbs as exactness asks for.

Exactness. By the bound in ``negacyclic`` a coefficient of limb * t is off by at most
E * 2^(l-1) * sqrt(N) * N for l-bit limbs, E = 25 u log2(N), u = 2^-53. At N = 8192 this is below
0.056 for the 22-bit limbs of 128-bit coefficients (6 limbs) and 0.007 for the 19-bit limbs of
56-bit ones (3 limbs): less than the 1/2 that rounding forgives, for every input, with a factor of
9 to spare for transforms (cuFFT) whose constant is larger. ``limbs`` refuses what this does not
cover.

Shape suffixes: J polynomials, L limbs, N ring degree, M = N/2, D digits.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.crypto.negacyclic import _ROUND, twist
from otpipe.kernels import wide
from otpipe.kernels.cpu import Array, kernel, unpack_words

#: proven error of a coefficient; 1/2 would still round correctly
_MAX_ERROR = 0.06


@functools.cache
def limbs(bits: int, ring_degree: int) -> tuple[int, int]:
    """(number, width in bits) of limbs that make products of ``bits``-bit coefficients exact."""
    error_of_one_bit = 25 * 2.0**-53 * math.log2(ring_degree) * ring_degree**1.5
    widest = math.floor(math.log2(_MAX_ERROR / error_of_one_bit)) + 1
    if widest < 16:
        raise ValueError(f"Products of degree {ring_degree} would need limbs of {widest} bits.")
    # One bit of slack for the carry out of the last limb.
    number = -(-(bits + 1) // widest)
    return number, -(-(bits + 1) // number)


def buffer(count: int, num_limbs: int, ring_degree: int) -> tuple[NDArray[np.complex128], Array]:
    """For ``count`` folded polynomials: complex (count, L, M) and its float64 view (.., M, 2)."""
    folded = np.empty((count, num_limbs, ring_degree // 2), np.complex128)
    return folded, folded.view(np.float64).reshape(count, num_limbs, ring_degree // 2, 2)


@kernel
def fold(words: Array, limb_bits: int, real: Array, imag: Array, out: Array) -> None:
    """Twisted limbs of the residues mod 2^128 in words (N, 2) uint64: out (L, M, 2).

    All limbs but the last are signed digits in base 2^l, found as in ``ring_gemm.digit_planes``:
    add 2^(l-1) at every digit, and each group of l bits is its digit + 2^(l-1). The last, short one
    is what remains.
    """
    half_ring, num_limbs = real.shape[0], out.shape[0]
    degree = 2 * half_ring
    half = np.uint64(1) << np.uint64(limb_bits - 1)
    bias_low, bias_high = np.uint64(0), np.uint64(0)
    for limb in range(num_limbs - 1):
        at = limb * limb_bits
        if at < 64:
            bias_low += half << np.uint64(at)
            if at + limb_bits > 64:
                bias_high += half >> np.uint64(64 - at)
        else:
            bias_high += half << np.uint64(at - 64)
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    for k in range(degree):
        total = words[k, 0] + bias_low
        low[k] = total
        high[k] = words[k, 1] + bias_high + np.uint64(total < bias_low)
    digit = np.empty(degree, np.int64)
    for limb in range(num_limbs):
        at = limb * limb_bits
        last = limb == num_limbs - 1
        mask = ~np.uint64(0) if last else (half << np.uint64(1)) - np.uint64(1)
        offset = np.int64(0) if last else np.int64(half)
        if at == 0:
            for k in range(degree):
                digit[k] = np.int64(low[k] & mask) - offset
        elif at < 64:
            down, up = np.uint64(at), np.uint64(64 - at)
            for k in range(degree):
                digit[k] = np.int64(((low[k] >> down) | (high[k] << up)) & mask) - offset
        else:
            down = np.uint64(at - 64)
            for k in range(degree):
                digit[k] = np.int64((high[k] >> down) & mask) - offset
        first, second, target = digit[:half_ring], digit[half_ring:], out[limb]
        for k in range(half_ring):
            x, y = np.float64(first[k]), np.float64(second[k])
            target[k, 0] = x * real[k] - y * imag[k]
            target[k, 1] = x * imag[k] + y * real[k]


@kernel
def fold_small(values_N: Array, real: Array, imag: Array, out: Array) -> None:
    """Twist a polynomial of small integers, int8 (N,): out (M, 2)."""
    half_ring = real.shape[0]
    first, second = values_N[:half_ring], values_N[half_ring:]
    for k in range(half_ring):
        x, y = np.float64(first[k]), np.float64(second[k])
        out[k, 0] = x * real[k] - y * imag[k]
        out[k, 1] = x * imag[k] + y * real[k]


@kernel
def unfold(
    product: Array, limb_bits: int, real: Array, imag: Array, low: Array, high: Array
) -> None:
    """Undo twist and limbs of a product (L, M, 2): low and high words (N,) uint64 mod 2^128."""
    half_ring, num_limbs = real.shape[0], product.shape[0]
    low[:] = np.uint64(0)
    high[:] = np.uint64(0)
    value = np.empty(2 * half_ring, np.int64)
    first, second = value[:half_ring], value[half_ring:]
    for limb in range(num_limbs):
        part = product[limb]
        for k in range(half_ring):
            re = part[k, 0] * real[k] + part[k, 1] * imag[k]
            im = part[k, 1] * real[k] - part[k, 0] * imag[k]
            first[k] = np.int64((re + _ROUND) - _ROUND)
            second[k] = np.int64((im + _ROUND) - _ROUND)
        wide.add_shifted(value, 1, limb * limb_bits, low, high)


@kernel
def fold_all(words: Array, limb_bits: int, real: Array, imag: Array, out: Array) -> None:
    """``fold`` of polynomials (J, N, 2): out (J, L, M, 2)."""
    for j in range(words.shape[0]):
        fold(words[j], limb_bits, real, imag, out[j])


@kernel
def fold_packed(
    packed: Array, num_bytes: int, limb_bits: int, real: Array, imag: Array, out: Array
) -> None:
    """``fold`` of packed integers of up to 8 bytes, uint64 words (J, N * num_bytes / 8)."""
    degree = 2 * real.shape[0]
    values = np.empty(degree, np.int64)
    words = np.empty((degree, 2), np.uint64)
    unused = np.int64(64 - 8 * num_bytes)
    for j in range(packed.shape[0]):
        unpack_words(packed[j], num_bytes, values)
        for k in range(degree):
            value = (values[k] << unused) >> unused
            words[k, 0] = np.uint64(value)
            words[k, 1] = np.uint64(value >> np.int64(63))
        fold(words, limb_bits, real, imag, out[j])


@kernel
def finish_encryption(
    product: Array,
    error_JN: Array,
    message_Tn: Array,
    inputs: int,
    delta_shift: int,
    limb_bits: int,
    real: Array,
    imag: Array,
    words: Array,
) -> None:
    """b = a t + e + (message << delta_shift) mod 2^128.

    product: a t in the transformed domain, (J, L, M, 2). message: uint64, any number of columns;
    polynomial j gets columns j * inputs + w at X^(w T). delta_shift > 64, so that bits above the
    modulus fall away. words: uint64 (J, N, 2).
    """
    degree = error_JN.shape[1]
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    for j in range(error_JN.shape[0]):
        unfold(product[j], limb_bits, real, imag, low, high)
        error = error_JN[j].astype(np.int64)
        wide.add_shifted(error, 1, 0, low, high)
        for turn in range(min(inputs, message_Tn.shape[1] - j * inputs)):
            column, at = j * inputs + turn, turn * message_Tn.shape[0]
            for k in range(message_Tn.shape[0]):
                high[at + k] += message_Tn[k, column] << np.uint64(delta_shift - 64)
        for k in range(degree):
            words[j, k, 0] = low[k]
            words[j, k, 1] = high[k]


# --- torch, any device -------------------------------------------------------------------------


@functools.cache
def _twist_torch(ring_degree: int, device: torch.device) -> Tensor:
    real, imag = twist(ring_degree)
    return torch.from_numpy(real + 1j * imag).to(device)


def spectrum_torch(values_N: Tensor) -> Tensor:
    """Transform of small integer polynomials (..., N), any real dtype: (..., M) complex128."""
    half = values_N.shape[-1] // 2
    wide_N = values_N.double()
    folded = torch.complex(wide_N[..., :half], wide_N[..., half:])
    return torch.fft.fft(folded * _twist_torch(2 * half, values_N.device))


def limb_spectra_torch(x: Tensor, num_limbs: int, limb_bits: int) -> Tensor:
    """Transforms of the limbs of (2, ..., N): (..., L, M) complex128."""
    rest, found = x, []
    half = 1 << (limb_bits - 1)
    for _ in range(num_limbs):
        limb = ((rest[0] + half) & (2 * half - 1)) - half
        found.append(limb)
        rest = wide.add_(wide.from_signed(-limb), rest)
        mask = (1 << (64 - limb_bits)) - 1
        low = ((rest[0] >> limb_bits) & mask) | (rest[1] << (64 - limb_bits))
        rest = torch.stack([low, rest[1] >> limb_bits])
    return spectrum_torch(torch.stack(found, -2))


def product_torch(spectra_LM: Tensor, by_M: Tensor, limb_bits: int) -> Tensor:
    """Products of limb spectra (..., L, M) with spectra (..., M): (2, ..., N) mod 2^128."""
    half = by_M.shape[-1]
    untwist = _twist_torch(2 * half, by_M.device).conj()
    total: Tensor | None = None
    for limb in range(spectra_LM.shape[-2]):
        part = torch.fft.ifft(spectra_LM[..., limb, :] * by_M) * untwist
        value = torch.cat([part.real, part.imag], -1).round_().long()
        shifted = wide.shifted_left(wide.from_signed(value), limb * limb_bits)
        total = shifted if total is None else wide.add_(total, shifted)
    assert total is not None
    return total
