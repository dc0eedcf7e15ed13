"""Exact products with a ternary polynomial in Z[X]/(X^N + 1), by float64 FFT.

X^N + 1 = (X^M - i)(X^M + i) with M = N/2, so a real polynomial is determined by its residue
sum_k (x_k + i x_{k+M}) X^k modulo X^M - i; substituting X = w Y, w = exp(i pi / N), turns products
there into cyclic ones of length M (the "right-angle" convolution, Crandall and Fagin 1994).

Exactness. A factor is split into two signed limbs of at most 28 bits, so |limb| <= 2^27 and its
2-norm is at most 2^27 sqrt(N). By Higham, Accuracy and Stability, theorem 24.2, a length-M FFT has
relative 2-norm error below 7 u log2(M), u = 2^-53; two transforms of data and one of t, the twists
and the pointwise product together stay below E = 25 u log2(N). The spectrum of t is at most
||t||_1 <= N, so every coefficient of a product is off by at most E * 2^27 * sqrt(N) * N; for
N = 2048 this is below 0.38 for 28-bit limbs and 0.19 for the 27-bit limbs in use, that is, less
than the 1/2 that rounding forgives, for every input.

Shape suffixes: J polynomials, N ring degree, M = N/2, D digit planes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otpipe.kernels.cpu import Array, kernel, pack_words, unpack_words

MAX_LIMB_BITS = 28
#: adding and subtracting 1.5 * 2^52 rounds to the nearest integer, below 2^51, in two vector adds
_ROUND = 6755399441055744.0

Spectrum = NDArray[np.complex128]


@functools.cache
def twist(ring_degree: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Real and imaginary part of w^k for k < N/2, w = exp(i pi / N). Read-only."""
    angle = np.pi * np.arange(ring_degree // 2) / ring_degree
    real, imaginary = np.cos(angle), np.sin(angle)
    real.setflags(write=False)
    imaginary.setflags(write=False)
    return real, imaginary


def spectrum(t_N: NDArray[np.int8]) -> Spectrum:
    """Transform of a ternary polynomial, scaled for ``multiply``: (N/2,) complex128."""
    half = t_N.size // 2
    real, imaginary = twist(t_N.size)
    folded = (t_N[:half] + 1j * t_N[half:]) * (real + 1j * imaginary)
    return np.fft.fft(folded) / half


def multiply(folded: NDArray[np.complex128], by: Spectrum) -> None:
    """Replace folded polynomials (..., N/2) by their products with the one behind ``by``."""
    np.fft.fft(folded, out=folded)
    folded *= by
    np.fft.ifft(folded, norm="forward", out=folded)  # ``by`` already carries the 1/M


@kernel
def _fold(values: Array, bits: int, limb_bits: int, real: Array, imag: Array, out: Array) -> None:
    """Two twisted limbs of the signed residues mod 2^bits of int64 values (N,): out (2, M, 2)."""
    half_ring = real.shape[0]
    unused = np.int64(64 - bits)
    mask = (np.int64(1) << np.int64(limb_bits)) - np.int64(1)
    half = np.int64(1) << np.int64(limb_bits - 1)
    low, high = out[0], out[1]
    first, second = values[:half_ring], values[half_ring:]
    for k in range(half_ring):
        x = (first[k] << unused) >> unused
        y = (second[k] << unused) >> unused
        x_low, y_low = ((x + half) & mask) - half, ((y + half) & mask) - half
        x_high, y_high = (x - x_low) >> np.int64(limb_bits), (y - y_low) >> np.int64(limb_bits)
        low[k, 0] = np.float64(x_low) * real[k] - np.float64(y_low) * imag[k]
        low[k, 1] = np.float64(x_low) * imag[k] + np.float64(y_low) * real[k]
        high[k, 0] = np.float64(x_high) * real[k] - np.float64(y_high) * imag[k]
        high[k, 1] = np.float64(x_high) * imag[k] + np.float64(y_high) * real[k]


@kernel
def _unfold(product: Array, limb_bits: int, real: Array, imag: Array, out: Array) -> None:
    """Undo twist and limbs of a product (2, M, 2): int64 coefficients (N,) mod 2^64."""
    half_ring = real.shape[0]
    low, high = product[0], product[1]
    first, second = out[:half_ring], out[half_ring:]
    for k in range(half_ring):
        low_re = low[k, 0] * real[k] + low[k, 1] * imag[k]
        low_im = low[k, 1] * real[k] - low[k, 0] * imag[k]
        high_re = high[k, 0] * real[k] + high[k, 1] * imag[k]
        high_im = high[k, 1] * real[k] - high[k, 0] * imag[k]
        first[k] = np.int64((low_re + _ROUND) - _ROUND) + (
            np.int64((high_re + _ROUND) - _ROUND) << np.int64(limb_bits)
        )
        second[k] = np.int64((low_im + _ROUND) - _ROUND) + (
            np.int64((high_im + _ROUND) - _ROUND) << np.int64(limb_bits)
        )


@kernel
def fold_digits(
    planes_JDN: Array, bits: int, limb_bits: int, real: Array, imag: Array, out: Array
) -> None:
    """Fold polynomials given as signed base-256 digits int8 (J, D, N): out (J, 2, M, 2) float64."""
    values = np.empty(planes_JDN.shape[2], np.int64)
    for j in range(planes_JDN.shape[0]):
        values[:] = 0
        for i in range(planes_JDN.shape[1]):
            row = planes_JDN[j, i]
            for k in range(values.shape[0]):
                values[k] += np.int64(row[k]) << np.int64(8 * i)
        _fold(values, bits, limb_bits, real, imag, out[j])


@kernel
def fold_packed(
    words: Array, num_bytes: int, limb_bits: int, real: Array, imag: Array, out: Array
) -> None:
    """Fold polynomials of packed integers, uint64 words (J, N*num_bytes/8): out (J, 2, M, 2)."""
    values = np.empty(2 * real.shape[0], np.int64)
    for j in range(words.shape[0]):
        unpack_words(words[j], num_bytes, values)
        _fold(values, 8 * num_bytes, limb_bits, real, imag, out[j])


@kernel
def finish_encryption(
    product: Array,
    error_JN: Array,
    message_JT: Array,
    log2_q: int,
    delta_shift: int,
    dropped_bits: int,
    num_bytes: int,
    limb_bits: int,
    real: Array,
    imag: Array,
    words: Array,
) -> None:
    """b = a t + e + (r << delta_shift) mod q, ``dropped_bits`` rounded away, ties to even, packed.

    The reduction is part of the security: the bits of the integer a t above q are not covered by
    the RLWE assumption and must not leave.
    product: a t as left by ``multiply``, (J, 2, M, 2). words: uint64 (J, N*num_bytes/8).
    """
    values = np.empty(error_JN.shape[1], np.int64)
    drop = np.int64(dropped_bits)
    below_half = (np.int64(1) << (drop - np.int64(1))) - np.int64(1) if dropped_bits else 0
    mask = (np.int64(1) << np.int64(log2_q - dropped_bits)) - np.int64(1)
    for j in range(error_JN.shape[0]):
        _unfold(product[j], limb_bits, real, imag, values)
        error, message = error_JN[j], message_JT[j]
        for k in range(message.shape[0]):
            values[k] += np.int64(message[k]) << np.int64(delta_shift)
        if dropped_bits:
            for k in range(values.shape[0]):
                b = values[k] + np.int64(error[k])
                # Rounding halves up instead would add 1/2 to every b, which a row sum of W
                # multiplies: ties go to even.
                values[k] = ((b + below_half + ((b >> drop) & np.int64(1))) >> drop) & mask
        else:
            for k in range(values.shape[0]):
                values[k] = (values[k] + np.int64(error[k])) & mask
        pack_words(values, num_bytes, words[j])


@kernel
def finish_decryption(
    product: Array,
    words: Array,
    num_bytes: int,
    log2_p: int,
    limb_bits: int,
    real: Array,
    imag: Array,
    out_JN: Array,
) -> None:
    """out = round((B - A t) / 2^(8 num_bytes - log2_p)) mod 2^log2_p.

    product: A t as left by ``multiply``, (J, 2, M, 2). words: packed B, uint64. out: unsigned.
    """
    values = np.empty(out_JN.shape[1], np.int64)
    second = np.empty(out_JN.shape[1], np.int64)
    shift = np.int64(8 * num_bytes - log2_p)
    half = np.int64(1) << (shift - np.int64(1))
    for j in range(out_JN.shape[0]):
        _unfold(product[j], limb_bits, real, imag, values)
        unpack_words(words[j], num_bytes, second)
        row = out_JN[j]
        for k in range(values.shape[0]):
            row[k] = (second[k] - values[k] + half) >> shift


def folded_buffer(count: int, ring_degree: int) -> tuple[NDArray[np.complex128], Any]:
    """A buffer for ``count`` folded polynomials: complex (count, 2, M) and its float64 view."""
    folded = np.empty((count, 2, ring_degree // 2), np.complex128)
    return folded, folded.view(np.float64).reshape(count, 2, ring_degree // 2, 2)
