"""Weights for private mode: int8 rows, small integer channel multipliers, one scale a segment.

In public mode row i has a scale s_i of its own, which everybody knows. In private mode s_i is part
of what must stay hidden, and the shares that come out of a map need one common scale. So row i is

    w_i ~ S * c_i * W_i,   c_i an integer from 1 to 127, W_i int8,

with one public scale S = 2^-e for each segment of rows (q, k and v, say, are separate values
afterwards) and secret c_i and W_i. c_i = ceil(s_i / S), s_i = max|w_i| / 127 being the step of
public mode: the smallest multiplier under which the row fits in int8. e is the largest exponent
under which all c_i of the segment fit, but not above ``finest``, where results would be at a finer
scale than the fixed-point format they go to.

Extra error. A weight is rounded to a multiple of c_i S < s_i + S instead of s_i, so its error is
larger by a factor below 1 + S / s_i, and never more than S / 2 more in absolute terms. The largest
row has s_i / S between 63.5 and 127 where ``finest`` allows it: 1.6 % at most for that row, 6 % for
a row of a quarter of its scale.

The embedding is looked up by a one-hot column, and its tokens are the columns of W, so a scale per
token would have to be hidden in another way. Instead the table is rounded to 16-bit integers with
one scale and split into two int8 digits: W = [high; low] has 2 H outputs, c_i = 1, and the two
parties each take 256 * high + low of their shares. The error is at most S / 2, where S = 2^-e is
at most max|E| / 16319.5, or 2^-finest.

Shape suffixes: m output rows, n input columns, V tokens, H hidden; r rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.model.quantize import INT8_MAX

#: largest multiplier, and the largest integer c_i * W_ij that a row is made of
MAX_MULTIPLIER = 127
_STEPS_MAX = INT8_MAX * MAX_MULTIPLIER
#: largest integer of two signed digits: 127 * 256 + 127
_DIGITS_MAX = 32639

Rows = Callable[[], Iterable[Tensor]]
"""All rows of a matrix from the first to the last, float (r, n) at a time; finite. Read twice."""


@dataclass(frozen=True, eq=False)
class PrivateMap:
    """One linear map for private mode. Weight and multipliers are secret, exponents are public."""

    weight: Tensor  # (m, n) int8, any strides
    multipliers: Tensor  # (m,) int64 on the weight's device, 1 to 127
    exponents: tuple[int, ...]  # e of each segment: S = 2^-e
    segments: tuple[int, ...]  # rows of each segment, in order


def quantize_private(
    rows: Rows, num_columns: int, segments: Sequence[int], finest: int
) -> PrivateMap:
    """Quantise a map for private mode.

    Args:
        rows: (r, n) chunks of the weight, on the device that is to hold it.
        num_columns: n.
        segments: rows of each segment, in order.
        finest: largest exponent e that a segment may have.

    Only correctly rounded operations are used, so every device agrees on every bit.
    """
    parts = tuple(segments)
    if min(parts) < 1:
        raise ValueError(f"Segments {parts} include one without rows.")
    largest_m = torch.cat([chunk.float().abs().amax(1) for chunk in rows()]).double()
    m = len(largest_m)
    if sum(parts) != m:
        raise ValueError(f"Segments {parts} do not add up to {m} rows.")
    exponents, multipliers, steps = [], [], []
    for largest in largest_m.split(parts):
        exponent = _exponent(float(largest.max()), _STEPS_MAX, finest)
        # By a tensor: CUDA divides by a Python number through its rounded reciprocal.
        step = torch.full_like(largest, INT8_MAX * 2.0**-exponent)
        multiplier = (largest / step).ceil_().clamp_(1, MAX_MULTIPLIER)
        exponents.append(exponent)
        multipliers.append(multiplier)
        steps.append((multiplier * 2.0**-exponent).float())
    step_m = torch.cat(steps)
    quantised = torch.empty((m, num_columns), dtype=torch.int8, device=largest_m.device)
    lo = 0
    for chunk in rows():
        hi = lo + len(chunk)
        rounded = (chunk.float() / step_m[lo:hi, None]).round_()
        quantised[lo:hi] = rounded.clamp_(-INT8_MAX, INT8_MAX)
        lo = hi
    return PrivateMap(quantised, torch.cat(multipliers).long(), tuple(exponents), parts)


def split_embedding(rows: Rows, num_tokens: int, hidden: int, finest: int) -> PrivateMap:
    """The embedding for private mode: W (2 H, V), first the high, then the low digits.

    Args:
        rows: (r, H) chunks of the table, one token a row.
        num_tokens: V.
        hidden: H.
        finest: largest exponent e that the table may have.

    The row of token v is 2^-e * (256 * y[:H] + y[H:]) with y = W e_v.
    """
    largest = torch.stack([chunk.float().abs().max() for chunk in rows()]).max()
    exponent = _exponent(float(largest), _DIGITS_MAX, finest)
    digits = torch.empty((num_tokens, 2 * hidden), dtype=torch.int8, device=largest.device)
    lo = 0
    for chunk in rows():
        hi = lo + len(chunk)
        value = (chunk.float() * 2.0**exponent).round_().clamp_(-_DIGITS_MAX, _DIGITS_MAX)
        whole = value.to(torch.int32)
        high = (whole + 128) >> 8
        digits[lo:hi, :hidden] = high
        digits[lo:hi, hidden:] = whole - (high << 8)
        lo = hi
    ones = torch.ones(2 * hidden, dtype=torch.int64, device=largest.device)
    return PrivateMap(digits.t(), ones, (exponent,), (2 * hidden,))


def join_embedding(shares_2H: Tensor) -> Tensor:
    """A party's shares (..., 2 H) of y as its shares (..., H) of 256 * high + low; local."""
    high, low = shares_2H.chunk(2, dim=-1)
    return (high << 8) + low


def dequantize_private(quantised: PrivateMap) -> Tensor:
    """The float32 weight (m, n) that a map of ``quantize_private`` stands for."""
    steps = [2.0**-exponent for exponent in quantised.exponents]
    scale_m = torch.tensor(steps).repeat_interleave(torch.tensor(quantised.segments))
    step_m = quantised.multipliers * scale_m.to(quantised.weight.device)
    return quantised.weight.float() * step_m[:, None]


def _exponent(largest: float, limit: int, finest: int) -> int:
    """The largest e <= ``finest`` with largest * 2^e <= limit."""
    if largest * 2.0**finest <= limit:
        return finest
    return math.frexp(limit / largest)[1] - 1
