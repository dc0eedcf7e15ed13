"""Arithmetic modulo 2^128 on pairs of 64-bit limbs, and its ring GEMM on int8 digit planes.

A wide array has a leading axis of two: ``x[0]`` the low and ``x[1]`` the high limb of every
element, int64 that hold the bits of unsigned words. Its 16 signed base-256 digits are products for
the int8 units exactly as in ``ring_gemm``. Four consecutive digit products, a *quarter*, combine in
one int64 before anything carries over, so a ring GEMM is four int8 products with four additions.

For W x with channel multipliers c, the result is added where a caller wants it: output i of a
group of ``pack`` lands, times X^(i * stride) in Z[X]/(X^N + 1), in the sum of its group.

CPU kernels and torch twins; the twins run on any device.

Shape suffixes: J polynomials, N coefficients, K consecutive ones of them, D = 16 digits, R outputs
(rows of W), G groups of outputs. A leading 2 is the limb axis.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from torch import Tensor

from otpipe.kernels.cpu import Array, kernel, on_team, parallel_for, team_kernel

NUM_DIGITS = 16
QUARTER_DIGITS = 4
#: |c * (p_0 + 2^8 p_1 + 2^16 p_2 + 2^24 p_3)| < 2^62 for int32 products p and c up to this
MAX_MULTIPLIER = 127

_SIGN = -(1 << 63)
_DIGIT_BIAS = int.from_bytes(b"\x80" * 8, "little")
_SIGNED_DIGIT_BIAS = int.from_bytes(b"\x80" * 8, "little", signed=True)


# --- torch, any device -------------------------------------------------------------------------


def below(a: Tensor, b: Tensor) -> Tensor:
    """a < b as unsigned 64-bit words."""
    return (a ^ _SIGN) < (b ^ _SIGN)


def add_(total: Tensor, other: Tensor) -> Tensor:
    """total += other mod 2^128, in place; both (2, ...)."""
    total[0] += other[0]
    total[1] += other[1]
    total[1] += below(total[0], other[0])
    return total


def negated(x: Tensor) -> Tensor:
    """-x mod 2^128."""
    return torch.stack([-x[0], ~x[1] + (x[0] == 0)])


def from_signed(x: Tensor) -> Tensor:
    """Sign-extension of int64 values (...) to (2, ...)."""
    return torch.stack([x, x >> 63])


def shifted_left(x: Tensor, bits: int) -> Tensor:
    """x * 2^bits mod 2^128 for 0 <= bits < 128."""
    if bits >= 64:
        return torch.stack([torch.zeros_like(x[0]), x[0] << (bits - 64)])
    if bits == 0:
        return x.clone()
    return torch.stack([x[0] << bits, (x[1] << bits) | _shifted_right(x[0], 64 - bits)])


def times_power(x_N: Tensor, power: int) -> Tensor:
    """x * X^power in Z[X]/(X^N + 1), (2, ..., N), 0 <= power < N."""
    degree = x_N.shape[-1]
    rolled = torch.roll(x_N, power, dims=-1)
    if power:
        rolled[..., :power] = negated(x_N[..., degree - power :])
    return rolled


def from_digits(planes_JDN: Tensor) -> Tensor:
    """The values (2, J, N) behind 16 signed digits int8 (J, D, N)."""
    total = torch.zeros(
        (2, planes_JDN.shape[0], planes_JDN.shape[2]), dtype=torch.int64, device=planes_JDN.device
    )
    for quarter in range(4):
        digits = planes_JDN[:, 4 * quarter : 4 * quarter + 4]
        part = digits[:, 0].long()
        for i in range(1, QUARTER_DIGITS):
            part.add_(digits[:, i], alpha=1 << (8 * i))
        add_(total, shifted_left(from_signed(part), 32 * quarter))
    return total


def to_digits(x: Tensor) -> Tensor:
    """16 signed base-256 digits of (2, J, N): int8 (D, J, N)."""
    # As in digit_planes: add 0x80...80, and each byte is its digit + 128.
    low = x[0] + _SIGNED_DIGIT_BIAS
    carry = below(low, torch.full_like(low, _SIGNED_DIGIT_BIAS))
    biased = torch.stack([low, x[1] + _SIGNED_DIGIT_BIAS + carry])
    octets = biased.view(torch.uint8).view(2, *x.shape[1:], 8)
    return (
        octets.movedim(-1, 1).reshape(NUM_DIGITS, *x.shape[1:]).bitwise_xor_(0x80).view(torch.int8)
    )


def from_bytes(packed: Tensor) -> Tensor:
    """Little-endian 16-byte integers (..., 16) uint8 as (2, ...)."""
    words = packed.contiguous().view(torch.int64)
    return words.movedim(-1, 0).contiguous()


def to_bytes(x: Tensor) -> Tensor:
    """Inverse of ``from_bytes``."""
    return x.movedim(0, -1).contiguous().view(torch.uint8)


def rounded_down(x: Tensor, dropped: int) -> Tensor:
    """round(x / 2^dropped), 64 <= dropped < 128, halves up: the low 128 - dropped bits, (...)."""
    if dropped == 64:  # the half is the low limb's top bit
        return x[1] + _shifted_right(x[0], 63)
    return (x[1] + (1 << (dropped - 65))) >> (dropped - 64)


def add_quarter_torch(
    products_RqN: Tensor, multipliers_R: Tensor, quarter: int, sums_RN: Tensor
) -> None:
    """sums += c * sum_i products[:, i] * 2^(8 i + 32 quarter) mod 2^128.

    products: int32 (R, 4, N). multipliers: int64 (R,), at most ``MAX_MULTIPLIER``. sums: (2, R, N).
    """
    part = products_RqN[:, 0].long()
    for i in range(1, QUARTER_DIGITS):
        part.add_(products_RqN[:, i], alpha=1 << (8 * i))
    part *= multipliers_R[:, None]
    if quarter == 0:
        add_(sums_RN, from_signed(part))
    elif quarter == 1:
        low = part << 32
        sums_RN[0] += low
        sums_RN[1] += part >> 32
        sums_RN[1] += below(sums_RN[0], low)
    else:
        sums_RN[1] += part << (32 * (quarter - 2))


def add_groups_torch(rows_RN: Tensor, first_row: int, pack: int, stride: int, sums: Tensor) -> None:
    """sums[i // pack] += X^((i % pack) * stride) * rows[i - first_row]; (2, R, N), (2, G, N)."""
    num_rows = rows_RN.shape[1]
    for place in range(pack):
        start = (place - first_row) % pack  # first row at this place of its group
        if start >= num_rows:
            continue
        moved = times_power(rows_RN[:, start::pack], place * stride)
        group = (first_row + start) // pack
        add_(sums[:, group : group + moved.shape[1]], moved)


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of 64-bit words, 0 < bits < 64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# --- compiled for the CPU ----------------------------------------------------------------------


def add_quarter(
    products_RqK: Tensor,
    multipliers_R: Tensor,
    first_row: int,
    pack: int,
    stride: int,
    first_coefficient: int,
    quarter: int,
    sums: Tensor,
    part: int,
) -> None:
    """``add_quarter_torch`` and ``add_groups_torch`` in one pass over K coefficients; CPU.

    products: int32 (R, 4, K), coefficients from ``first_coefficient`` of outputs from
    ``first_row``. multipliers: int64 (R,). sums: contiguous int64 (G, P, 2, N), of which ``part``
    of every group is meant; group 0 starts at output 0.
    """
    on_team(
        _add_quarter,
        products_RqK.numpy(),
        multipliers_R.numpy(),
        first_row,
        pack,
        stride,
        first_coefficient,
        quarter,
        sums.numpy().view(np.uint64),
        part,
    )


@kernel
def add_shifted(value: Array, sign: int, up: int, low: Array, high: Array) -> None:
    """(high, low) += sign * value * 2^up mod 2^128, elementwise; int64 values, sign 1 or -1."""
    factor = np.int64(sign)
    if up == 0:
        for k in range(value.shape[0]):
            signed = factor * value[k]
            word = np.uint64(signed)
            total = low[k] + word
            low[k] = total
            high[k] += np.uint64(signed >> np.int64(63)) + np.uint64(total < word)
    elif up < 64:
        shift, rest = np.int64(up), np.int64(64 - up)
        for k in range(value.shape[0]):
            signed = factor * value[k]
            word = np.uint64(signed << shift)
            total = low[k] + word
            low[k] = total
            high[k] += np.uint64(signed >> rest) + np.uint64(total < word)
    else:
        shift = np.int64(up - 64)
        for k in range(value.shape[0]):
            high[k] += np.uint64((factor * value[k]) << shift)


@team_kernel
def _add_quarter(
    products: Array,
    multipliers: Array,
    first_row: int,
    pack: int,
    stride: int,
    first_coefficient: int,
    quarter: int,
    sums: Array,
    part: int,
) -> None:
    num_rows, count, degree = products.shape[0], products.shape[2], sums.shape[3]
    first_group = first_row // pack
    stop_group = (first_row + num_rows + pack - 1) // pack
    for group in nb.prange(first_group, stop_group):
        value = np.empty(count, np.int64)
        low, high = sums[group, part, 0], sums[group, part, 1]
        for row in range(
            max(first_row, group * pack), min(first_row + num_rows, (group + 1) * pack)
        ):
            r = row - first_row
            factor = multipliers[r]
            p_0, p_1, p_2, p_3 = products[r, 0], products[r, 1], products[r, 2], products[r, 3]
            for k in range(count):
                value[k] = factor * (
                    np.int64(p_0[k])
                    + (np.int64(p_1[k]) << np.int64(8))
                    + (np.int64(p_2[k]) << np.int64(16))
                    + (np.int64(p_3[k]) << np.int64(24))
                )
            # X^N = -1: coefficients that pass X^N come back negated, those that pass X^(2N) not.
            start = first_coefficient + (row - group * pack) * stride
            done = 0
            while done < count:
                at = (start + done) % (2 * degree)
                sign = -1 if at >= degree else 1
                target = at % degree
                length = min(count - done, degree - target)
                add_shifted(
                    value[done : done + length],
                    sign,
                    32 * quarter,
                    low[target : target + length],
                    high[target : target + length],
                )
                done += length


def spread_digits(
    words_JNq: Tensor, turns: int, stride: int, planes: Tensor, first_row: int
) -> None:
    """Digits of X^(-w stride) x for w < ``turns``, in the layout of the CPU's products.

    words: int64 (J, N, 2), low and high limb of every coefficient.
    planes: int8 (C, 4, inputs, 4, K): quarter and digit of K = N / C coefficients of each input;
    polynomial j and turn w fill input first_row + j * turns + w.
    """
    source, target = words_JNq.numpy().view(np.uint64), planes.numpy()

    def body(lo: int, hi: int) -> None:
        _spread_digits(source[lo:hi], turns, stride, target, first_row + lo * turns)

    parallel_for(body, len(source), 4)


@kernel
def _spread_digits(words: Array, turns: int, stride: int, planes: Array, first_row: int) -> None:
    degree, length = words.shape[1], planes.shape[4]
    bias, flip = np.uint64(_DIGIT_BIAS), np.uint64(0x80)
    low, high = np.empty(length, np.uint64), np.empty(length, np.uint64)
    for j in range(words.shape[0]):
        for turn in range(turns):
            row = first_row + j * turns + turn
            for chunk in range(planes.shape[0]):
                for k in range(length):
                    # X^(-s) x has coefficient x[k + s]; past N it is -x[k + s - N].
                    at = chunk * length + k + turn * stride
                    if at < degree:
                        lo, hi = words[j, at, 0], words[j, at, 1]
                    else:
                        lo, hi = words[j, at - degree, 0], words[j, at - degree, 1]
                        hi = ~hi + np.uint64(lo == np.uint64(0))
                        lo = ~lo + np.uint64(1)
                    biased = lo + bias
                    low[k] = biased
                    high[k] = hi + bias + np.uint64(biased < bias)
                for i in range(8):
                    up = np.uint64(8 * i)
                    plane = planes[chunk, i // 4, row, i % 4]
                    for k in range(length):
                        plane[k] = np.int8(((low[k] >> up) ^ flip) & np.uint64(0xFF))
                    plane = planes[chunk, 2 + i // 4, row, i % 4]
                    for k in range(length):
                        plane[k] = np.int8(((high[k] >> up) ^ flip) & np.uint64(0xFF))


@kernel
def words_from_digits(planes_JDN: Array, words_JNq: Array) -> None:
    """The values behind 16 signed digits int8 (J, D, N): uint64 (J, N, 2)."""
    part = np.empty(planes_JDN.shape[2], np.int64)
    low, high = np.empty(part.size, np.uint64), np.empty(part.size, np.uint64)
    for j in range(planes_JDN.shape[0]):
        low[:] = np.uint64(0)
        high[:] = np.uint64(0)
        for quarter in range(4):
            part[:] = 0
            for i in range(4):
                digit = planes_JDN[j, 4 * quarter + i]
                for k in range(part.size):
                    part[k] += np.int64(digit[k]) << np.int64(8 * i)
            add_shifted(part, 1, 32 * quarter, low, high)
        for k in range(part.size):
            words_JNq[j, k, 0] = low[k]
            words_JNq[j, k, 1] = high[k]
