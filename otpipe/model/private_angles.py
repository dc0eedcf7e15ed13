"""Cosines and sines that are the same bits on every machine.

Both parties multiply their shares by the rotary angles' functions, rounded to integers. If one of
them rounded one angle another way, the product would be no share of anything: a uniform number. So
library functions, whose last place differs between machines, are not good enough. Here are only
float64 additions, multiplications and roundings, one at a time, which IEEE 754 fixes to the bit.

Shape suffixes: T rows, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TERMS = 9  # of either series: below 2^-53 for |r| <= pi/4
# pi/2 in three parts; products of the first two with n < 2^25 are exact (Cody and Waite, 1980).
_PARTS = (1.570796325802803, 9.920935739593517e-10, 5.721188726109832e-18)


def rotary_rows(
    inverse_frequencies: Sequence[float], first: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """(cos, signed sin) of positions first, first + 1, ...: float64 (T, 1, D) on the CPU.

    The layout is that of ``clear_ops.RopeTables.rows``. Angles are float32 products, as there.
    """
    positions = np.arange(first, first + num_rows, dtype=np.float32)
    angles = positions[:, None] * np.array(inverse_frequencies, dtype=np.float32)
    cos, sin = cos_sin(angles.astype(np.float64))
    cos_TD = np.concatenate((cos, cos), axis=1)
    sin_TD = np.concatenate((-sin, sin), axis=1)
    return torch.from_numpy(cos_TD)[:, None], torch.from_numpy(sin_TD)[:, None]


def cos_sin(angles: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine of angles in [0, 2^25], to about 2^-50."""
    n = np.rint(angles * (2 / np.pi))
    r = angles
    for part in _PARTS:
        r = r - n * part
    square = r * r
    cos, sin = np.zeros_like(r), np.zeros_like(r)
    for k in range(_TERMS, 0, -1):  # Horner: 1 - r^2/(1*2) (1 - r^2/(3*4) (1 - ...
        cos = 1.0 - square * (1.0 / ((2 * k - 1) * (2 * k))) * (cos if k < _TERMS else 1.0)
        sin = 1.0 - square * (1.0 / ((2 * k) * (2 * k + 1))) * (sin if k < _TERMS else 1.0)
    sin = sin * r
    quadrant = n.astype(np.int64) & 3
    odd, negative_cos, negative_sin = quadrant % 2 == 1, (quadrant + 1) & 2, quadrant & 2
    cos_out = np.where(odd, sin, cos)
    sin_out = np.where(odd, cos, sin)
    return np.where(negative_cos, -cos_out, cos_out), np.where(negative_sin, -sin_out, sin_out)
