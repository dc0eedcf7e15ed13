"""Exact products with a ternary polynomial in Z[X]/(X^N + 1), N = 2048, by float64 FFT.

X^N + 1 = (X^M - i)(X^M + i) with M = N/2, so a real polynomial is determined by its residue
sum_k (x_k + i x_{k+M}) X^k modulo X^M - i; substituting X = w Y, w = exp(i pi / N), turns products
there into cyclic ones of length M (the "right-angle" convolution, Crandall and Fagin 1994).

Exactness. A factor is split into two signed limbs of at most 28 bits, so |limb| <= 2^27 and its
2-norm is at most 2^27 sqrt(N). By Higham, Accuracy and Stability, theorem 24.2, a length-M FFT has
relative 2-norm error below 7 u log2(M), u = 2^-53 (a radix-4 pass is two of radix 2 that share a
multiplication); two transforms of data and one of t, the twists and the pointwise product together
stay below E = 25 u log2(N). The spectrum of t is at most ||t||_1 <= N, so every coefficient of a
product is off by at most E * 2^27 * sqrt(N) * N; for N = 2048 this is below 0.38 for 28-bit limbs
and 0.19 for the 27-bit limbs in use, that is, less than the 1/2 that rounding forgives, for every
input.

Each kernel takes a polynomial from its bytes to its bytes while it stays in the first-level cache.

Shape suffixes: J polynomials, N ring degree, M = N/2, D digit planes, T slots.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from otpipe.crypto import fft
from otpipe.kernels.cpu import Array, kernel, pack_words, unpack_words

MAX_LIMB_BITS = 28
#: adding and subtracting 1.5 * 2^52 rounds to the nearest integer, below 2^51, in two vector adds
_ROUND = 6755399441055744.0
#: the bits of x + 1.5 * 2^52 as an integer are these plus x: rounding and conversion in one
_ROUND_BITS = 0x4338000000000000

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
    """Transform of a ternary polynomial, scaled by 1/M for a product: (N/2,) complex128."""
    half = t_N.size // 2
    real, imaginary = twist(t_N.size)
    folded = (t_N[:half] + 1j * t_N[half:]) * (real + 1j * imaginary)
    return np.fft.fft(folded) / half


def multiply(folded: NDArray[np.complex128], by: Spectrum) -> None:
    """Replace folded polynomials (..., M), of any degree, by their products with ``by``'s."""
    np.fft.fft(folded, out=folded)
    folded *= by
    np.fft.ifft(folded, norm="forward", out=folded)  # ``by`` already carries the 1/M


@functools.cache
def _tables() -> NDArray[np.float64]:
    """One array of everything that the transforms look up: float64 (7, 2, 1024).

    Rows 0: twist; 1 to 3: ``fft.FORWARD``; 4 to 6: ``fft.INVERSE``.
    """
    twists = np.stack(twist(2 * fft.LENGTH))[None]
    return np.concatenate([twists, fft.FORWARD.reshape(3, 2, fft.LENGTH), fft.INVERSE])


def tables_for(by: Spectrum) -> NDArray[np.float64]:
    """What the kernels below need to multiply by the polynomial behind ``by``: (8, 2, 1024)."""
    return np.concatenate([_tables(), fft.in_order(by)[None]])


@kernel
def times(values: Array, limb_bits: int, tables: Array, work: Array, out: Array) -> None:
    """out = values * t mod 2^64, int64 (N,), for |values| < 2^(2 limb_bits - 1).

    tables: ``tables_for`` of the spectrum of t. work: float64 (4, M).
    """
    half_ring = work.shape[1]
    xr, xi, yr, yi = work[0], work[1], work[2], work[3]
    real, imag = tables[0, 0], tables[0, 1]
    spectrum_r, spectrum_i = tables[7, 0], tables[7, 1]
    forward = tables[1:4].reshape((3, 2, 4, half_ring // 4))
    first, second = values[:half_ring], values[half_ring:]
    first_out, second_out = out[:half_ring], out[half_ring:]
    rounded_r, rounded_i = xr.view(np.int64), xi.view(np.int64)
    half = np.int64(1) << np.int64(limb_bits - 1)
    mask = (half << np.int64(1)) - np.int64(1)
    for limb in range(2):
        # 32 bits hold a limb, and convert to float64 in vectors on every CPU.
        if limb == 0:
            for k in range(half_ring):
                x = np.float64(np.int32(((first[k] + half) & mask) - half))
                y = np.float64(np.int32(((second[k] + half) & mask) - half))
                xr[k] = x * real[k] - y * imag[k]
                xi[k] = x * imag[k] + y * real[k]
        else:
            for k in range(half_ring):
                x = np.float64(np.int32((first[k] + half) >> np.int64(limb_bits)))
                y = np.float64(np.int32((second[k] + half) >> np.int64(limb_bits)))
                xr[k] = x * real[k] - y * imag[k]
                xi[k] = x * imag[k] + y * real[k]
        fft.forward(xr, xi, yr, yi, forward)
        fft.multiply(yr, yi, spectrum_r, spectrum_i)
        fft.inverse(yr, yi, xr, xi, forward, tables[4:7])
        for k in range(half_ring):
            r = xr[k] * real[k] + xi[k] * imag[k]
            i = xi[k] * real[k] - xr[k] * imag[k]
            xr[k] = r + _ROUND
            xi[k] = i + _ROUND
        if limb == 0:
            for k in range(half_ring):
                first_out[k] = rounded_r[k] - _ROUND_BITS
                second_out[k] = rounded_i[k] - _ROUND_BITS
        else:
            for k in range(half_ring):
                first_out[k] += (rounded_r[k] - _ROUND_BITS) << np.int64(limb_bits)
                second_out[k] += (rounded_i[k] - _ROUND_BITS) << np.int64(limb_bits)


@kernel
def sign_extend(values: Array, bits: int) -> None:
    """The signed residue mod 2^bits of every int64, in place."""
    unused = np.int64(64 - bits)
    for k in range(values.shape[0]):
        values[k] = (values[k] << unused) >> unused


@kernel
def encrypt(
    planes_JDN: Array,
    error_JN: Array,
    message_TJ: Array,
    first_message: int,
    log2_q: int,
    delta_shift: int,
    dropped_bits: int,
    num_bytes: int,
    tables: Array,
    words_JW: Array,
) -> None:
    """b = a t + e + (r << delta_shift) mod q, ``dropped_bits`` rounded away, ties to even, packed.

    The reduction is part of the security: the bits of the integer a t above q are not covered by
    the RLWE assumption and must not leave.
    planes: signed base-256 digits of a, int8. message: uint32, one row a slot, from column
    first_message. words: uint64 (J, N*num_bytes/8).
    """
    count, num_planes, degree = planes_JDN.shape
    limb_bits = (log2_q + 1) // 2
    num_slots = message_TJ.shape[0]
    together = 16  # columns of the message that one cache line holds
    work = np.empty((4, degree // 2), np.float64)
    values, product = np.empty(degree, np.int64), np.empty(degree, np.int64)
    # Rows a power of two apart would compete for the same few lines of the first-level cache.
    message = np.empty((together, num_slots + 64), message_TJ.dtype)
    drop = np.int64(dropped_bits)
    below_half = (np.int64(1) << (drop - np.int64(1))) - np.int64(1) if dropped_bits else 0
    mask = (np.int64(1) << np.int64(log2_q - dropped_bits)) - np.int64(1)
    for j in range(count):
        if j % together == 0:
            columns = min(together, count - j)
            for t in range(num_slots):
                for i in range(columns):
                    message[i, t] = message_TJ[t, first_message + j + i]
        values[:] = 0
        for d in range(num_planes):
            plane = planes_JDN[j, d]
            for k in range(degree):
                values[k] += np.int64(plane[k]) << np.int64(8 * d)
        sign_extend(values, log2_q)
        times(values, limb_bits, tables, work, product)
        row = message[j % together]
        for k in range(num_slots):
            product[k] += np.int64(row[k]) << np.int64(delta_shift)
        error = error_JN[j]
        if dropped_bits:
            for k in range(degree):
                b = product[k] + np.int64(error[k])
                # Rounding halves up instead would add 1/2 to every b, which a row sum of W
                # multiplies: ties go to even.
                product[k] = ((b + below_half + ((b >> drop) & np.int64(1))) >> drop) & mask
        else:
            for k in range(degree):
                product[k] = (product[k] + np.int64(error[k])) & mask
        pack_words(product, num_bytes, words_JW[j])


@kernel
def decrypt(words_J2W: Array, num_bytes: int, log2_p: int, tables: Array, out_JN: Array) -> None:
    """out = round((B - A t) / 2^(8 num_bytes - log2_p)).

    words: packed A and B, uint64 (J, 2, N*num_bytes/8). out: uint32, the result mod 2^32.
    """
    degree = out_JN.shape[1]
    limb_bits = 4 * num_bytes
    work = np.empty((4, degree // 2), np.float64)
    values, product = np.empty(degree, np.int64), np.empty(degree, np.int64)
    shift = np.int64(8 * num_bytes - log2_p)
    half = np.int64(1) << (shift - np.int64(1))
    for j in range(words_J2W.shape[0]):
        unpack_words(words_J2W[j, 0], num_bytes, values)
        sign_extend(values, 8 * num_bytes)
        times(values, limb_bits, tables, work, product)
        unpack_words(words_J2W[j, 1], num_bytes, values)
        row = out_JN[j]
        for k in range(degree):
            row[k] = (values[k] - product[k] + half) >> shift
