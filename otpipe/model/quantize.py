"""Weights as int8 with one float32 scale per output row, and what is public about them.

Shape suffixes: m output rows, n input columns. The rows of the embedding are its tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127
# A scale below the smallest normal float32 would round differently where subnormals are flushed,
# so such a row counts as zero. No effect on any logit: the row is below 2e-36.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# One chunk is quantised at a time: 64 MiB as float32, at most four such temporaries.
CHUNK_ELEMENTS = 1 << 24


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise every row by its largest absolute value.

    Args:
        weight: (m, n), any float dtype. Finite: the caller has checked.

    Returns:
        int8 (m, n) in [-127, 127] and float32 scale (m,), with weight ~ int8 * scale. Ties round
        to even. Only correctly rounded operations are used, so every device agrees on every bit.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1)
    # By a tensor: CUDA divides by a Python number through its rounded reciprocal.
    scale = largest / torch.full_like(largest, INT8_MAX)
    scale = torch.where(scale < _SMALLEST_SCALE, 0.0, scale)
    divisor = torch.where(scale == 0, torch.inf, scale)
    quantised = (weight / divisor[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return quantised.to(torch.int8), scale


def rows_per_chunk(num_columns: int) -> int:
    """How many rows are quantised at a time."""
    return max(1, CHUNK_ELEMENTS // max(1, num_columns))


@dataclass(frozen=True, eq=False)
class QuantizedMap:
    """One linear map: the int8 weight (secret in private mode) and its public companions.

    For the embedding, ``weight`` is the transposed view (hidden, vocab) of the per-token rows and
    ``scale`` belongs to its columns: the tokens. Norms and digest never depend on the device.
    """

    weight: Tensor  # (m, n) int8, any strides, on the device that serves it
    scale: Tensor  # (m,) float32 on the CPU; embedding: (n,)
    bias: Tensor | None  # (m,) float32 on the CPU
    max_row_l2: float  # largest Euclidean norm of a row of ``weight``, in int8 units
    max_row_l1: float  # largest sum of absolute values of a row of ``weight``, in int8 units
    digest: bytes  # SHA-256 of the int8 rows in memory order (embedding: token after token)


def row_norms(rows: Tensor, *, transposed: bool = False) -> tuple[float, float]:
    """Largest Euclidean norm and largest sum of absolute values of a row, both exact.

    Args:
        rows: (r, c) int8 without -128, contiguous.
        transposed: measure the columns of ``rows`` instead, the rows of the transposed map.
    """
    # 127^2 fits int16, and the sums are taken in int64: exact for every size.
    dim = 0 if transposed else 1
    squares, absolute = [], []
    for chunk in rows.split(rows_per_chunk(rows.shape[1])):
        wide = chunk.to(torch.int16)
        squares.append(wide.square().sum(dim, dtype=torch.int64))
        absolute.append(wide.abs_().sum(dim, dtype=torch.int64))
    if transposed:
        max_square, max_absolute = torch.stack(squares).sum(0).max(), torch.stack(absolute).sum(0)
    else:
        max_square, max_absolute = torch.cat(squares).max(), torch.cat(absolute)
    return math.sqrt(int(max_square)), float(max_absolute.max())


def rows_digest(rows: Tensor) -> bytes:
    """SHA-256 of contiguous int8 rows (r, c); copies to the CPU one chunk at a time."""
    digest = hashlib.sha256()
    for chunk in rows.split(rows_per_chunk(rows.shape[1])):
        digest.update(memoryview(chunk.cpu().numpy()).cast("B"))
    return digest.digest()


def dequantize(quantised: QuantizedMap, *, per_column: bool = False) -> Tensor:
    """The float32 weight (m, n) that the int8 map stands for; ``per_column`` for the embedding."""
    scale = quantised.scale.to(quantised.weight.device)
    return quantised.weight.float() * (scale if per_column else scale[:, None])
