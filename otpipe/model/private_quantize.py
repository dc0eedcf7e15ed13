"""Weights for private mode: int8 rows, small integer channel multipliers, one scale a segment.

In public mode row i has a scale s_i of its own, which everybody knows. In private mode s_i is part
of what must stay hidden, and the shares that come out of a map need one common scale. So row i is

    w_i ~ S * c_i * W_i,   c_i an integer from 1 to C, W_i int8,

with one public scale S for each segment of rows (q, k and v, say, are separate values afterwards)
and secret c_i and W_i. S = max_i s_i / C and c_i = ceil(s_i / S), s_i = max|w_i| / 127 being the
step of public mode: the smallest multiplier under which the row fits in int8.

Extra error. A weight is rounded to a multiple of c_i S < s_i + S instead of s_i, so its error is
larger by a factor below 1 + S / s_i = 1 + max s / (C s_i): none for the largest row, 1 + 4/C at
most for a row of a quarter of its scale (6 % for C = 64), and never more than S / 2 = max s / (2C)
in absolute terms, small beside the errors of the larger rows.

The embedding is looked up by a one-hot column, and its tokens are the columns of W, so a scale per
token would have to be hidden in another way. Instead the table is rounded to 16-bit integers with
one scale and split into two int8 digits: W = [high; low] has 2 H outputs, c_i = 1, and the two
parties each take 256 * high + low of their shares. The error is at most S / 2 with
S = max|E| / 32639.

Shape suffixes: m output rows, n input columns, V tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.model.quantize import INT8_MAX, rows_per_chunk

DEFAULT_MULTIPLIER = 64
#: largest integer of two signed digits: 127 * 256 + 127
_DIGITS_MAX = 32639
_SMALLEST_STEP = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class PrivateMap:
    """One linear map for private mode. Weight and multipliers are secret, scales are public."""

    weight: Tensor  # (m, n) int8, any strides
    multipliers: Tensor  # (m,) int64 on the weight's device, 1 to 127
    scales: tuple[float, ...]  # S of each segment
    segments: tuple[int, ...]  # rows of each segment, in order


def quantize_private(
    weight: Tensor, segments: Sequence[int] | None = None, max_multiplier: int = DEFAULT_MULTIPLIER
) -> PrivateMap:
    """Quantise a map for private mode.

    Args:
        weight: (m, n), any float dtype, finite.
        segments: rows of each segment, adding up to m; one segment if None.
        max_multiplier: C, 1 to 127: more costs log2(C) bits of the ring and less precision if few.

    Only correctly rounded operations are used, so every device agrees on every bit.
    """
    m, n = weight.shape
    parts = (m,) if segments is None else tuple(segments)
    if sum(parts) != m or min(parts) < 1:
        raise ValueError(f"Segments {parts} do not add up to {m} rows.")
    if not 1 <= max_multiplier <= INT8_MAX:
        raise ValueError(f"Channel multipliers go up to 1 to {INT8_MAX}, not {max_multiplier}.")
    chunk = rows_per_chunk(n)
    largest_m = torch.cat([rows.float().abs().amax(1) for rows in weight.split(chunk)])
    scales, multipliers, steps = [], [], []
    for rows in largest_m.split(parts):
        # By a tensor: CUDA divides by a Python number through its rounded reciprocal.
        scale = rows.max() / torch.full_like(rows[0], INT8_MAX * max_multiplier)
        scale = torch.where(scale < _SMALLEST_STEP, 1.0, scale)  # a segment of zeros
        multiplier = (rows / (scale * INT8_MAX)).ceil_().clamp_(1, max_multiplier)
        scales.append(float(scale))
        multipliers.append(multiplier)
        steps.append(multiplier * scale)
    step_m = torch.cat(steps)
    quantised = torch.empty((m, n), dtype=torch.int8, device=weight.device)
    for lo in range(0, m, chunk):
        rounded = (weight[lo : lo + chunk].float() / step_m[lo : lo + chunk, None]).round_()
        quantised[lo : lo + chunk] = rounded.clamp_(-INT8_MAX, INT8_MAX)
    return PrivateMap(quantised, torch.cat(multipliers).long(), tuple(scales), parts)


def split_embedding(table_VH: Tensor) -> PrivateMap:
    """The embedding for private mode: W (2 H, V), first the high, then the low digits.

    Args:
        table_VH: (V, H), any float dtype, finite, one token a row.

    The row of token v is S * (256 * y[:H] + y[H:]) with y = W e_v.
    """
    num_tokens, hidden = table_VH.shape
    chunk = rows_per_chunk(hidden)
    largest = torch.stack([rows.float().abs().max() for rows in table_VH.split(chunk)]).max()
    scale = largest / torch.full_like(largest, _DIGITS_MAX)
    scale = torch.where(scale < _SMALLEST_STEP, 1.0, scale)
    digits = torch.empty((num_tokens, 2 * hidden), dtype=torch.int8, device=table_VH.device)
    for lo in range(0, num_tokens, chunk):
        rows = table_VH[lo : lo + chunk].float()
        value = (rows / scale).round_().clamp_(-_DIGITS_MAX, _DIGITS_MAX).to(torch.int32)
        high = (value + 128) >> 8
        digits[lo : lo + chunk, :hidden] = high
        digits[lo : lo + chunk, hidden:] = value - (high << 8)
    ones = torch.ones(2 * hidden, dtype=torch.int64, device=table_VH.device)
    return PrivateMap(digits.t(), ones, (float(scale),), (2 * hidden,))


def join_embedding(shares_2H: Tensor) -> Tensor:
    """A party's shares (..., 2 H) of y as its shares (..., H) of 256 * high + low; local."""
    high, low = shares_2H.chunk(2, dim=-1)
    return (high << 8) + low


def dequantize_private(quantised: PrivateMap) -> Tensor:
    """The float32 weight (m, n) that a map of ``quantize_private`` stands for."""
    lengths = torch.tensor(quantised.segments)
    scale_m = torch.tensor(quantised.scales).repeat_interleave(lengths)
    step_m = quantised.multipliers * scale_m.to(quantised.weight.device)
    return quantised.weight.float() * step_m[:, None]
