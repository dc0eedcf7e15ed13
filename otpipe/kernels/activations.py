"""The client's two passes around a masked linear map, each fused into one loop over memory.

``mask_rows`` chooses a row's scale, rounds it and subtracts the pad; ``open_rows`` adds the
correction and returns to float32. The choice of scale and its bound are derived in
``otpipe.protocol.fixed_point``, whose plain-torch functions are the twins these are tested against.

Shape suffixes: T rows, n inputs, m outputs.
"""

from __future__ import annotations

import numpy as np

from otpipe.kernels.cpu import Array, float_kernel, kernel, parallel_for
from otpipe.kernels.row_ops import float_of_bits

INT8_LIMIT = 127.0
MAX_OUTLIERS = 64
"""Largest set of coordinates bounded by their absolute sum."""

_SLACK = 0.8
_BLOCK = 64
"""Coordinates looked through at once for one above the threshold."""

_TO_INTEGER = 1.5 * 2.0**52
"""Adding and subtracting it rounds a float64 below 2^51 to the nearest integer, ties to even."""

_PARALLEL_ELEMENTS = 1 << 17


@float_kernel
def _energy(x: Array) -> float:
    """Sum of squares in float64; NaN or infinity if x has one."""
    energy = 0.0
    for j in range(x.shape[0]):
        energy += np.float64(x[j]) * np.float64(x[j])
    return energy


@float_kernel
def _peak(x: Array) -> np.float32:
    """Largest |x_j|; NaN if x has one.

    Bits of positive numbers are ordered as the numbers are, and unlike the numbers' their maximum
    is computed on vectors.
    """
    bits, peak = x.view(np.uint32), np.uint32(0)
    for j in range(bits.shape[0]):
        peak = max(peak, bits[j] & np.uint32(0x7FFFFFFF))
    return np.float32(float_of_bits(np.int32(peak)))


@kernel
def _largest_above(x: Array, threshold: np.float32, largest: Array) -> int:
    """The largest |x_j| above a threshold, as many as ``largest`` holds, in falling order."""
    room, count = largest.shape[0], 0
    for start in range(0, x.shape[0], _BLOCK):
        block = x[start : start + _BLOCK]
        if not _peak(block) > threshold:
            continue
        for j in range(block.shape[0]):
            value = np.float64(abs(block[j]))
            if not value > threshold or (count == room and value <= largest[room - 1]):
                continue
            at = min(count, room - 1)
            count = min(count + 1, room)
            while at > 0 and largest[at - 1] < value:
                largest[at] = largest[at - 1]
                at -= 1
            largest[at] = value
    return count


@kernel
def _row_bound(x: Array, max_row_l2: float) -> tuple[float, float]:
    """Bound on |W_i x| over all rows i, and the largest |x_j|; NaN or infinity if x has one."""
    energy, peak = _energy(x), _peak(x)
    norm = np.sqrt(energy)
    bound = max_row_l2 * norm
    if not peak * max_row_l2 > INT8_LIMIT * norm or not np.isfinite(energy):
        return bound, np.float64(peak)
    # A coordinate a helps only if 127 a < L2 (R - sqrt(R^2 - a^2)) <= L2 a^2 / R, where R is the
    # norm of what has not been taken out yet. So those above 127 norm / L2 are collected, and again
    # with what they leave of the norm, until that hardly changes.
    largest = np.empty(MAX_OUTLIERS, np.float64)
    remaining = norm
    while True:
        threshold = np.float32(_SLACK * INT8_LIMIT * remaining / max_row_l2)
        count = _largest_above(x, threshold, largest)
        taken = 0.0
        for i in range(count):
            taken += largest[i] * largest[i]
        left = np.sqrt(max(energy - taken, 0.0))
        if count == MAX_OUTLIERS or left >= _SLACK * remaining or left == 0.0:
            break
        remaining = left
    outliers, rest = 0.0, energy
    lost = (x.shape[0] + 2 * MAX_OUTLIERS) * 2.3e-16 * energy
    for i in range(count):
        outliers += largest[i]
        rest -= largest[i] * largest[i]
        # The subtraction cancels, and summing n squares in any order loses at most (n - 1) 2^-53 of
        # their sum (Higham, Accuracy and Stability, section 4.2): what may have been lost is put
        # back, so that this stays a bound.
        kept = max(rest, 0.0) + lost
        bound = min(bound, INT8_LIMIT * outliers + max_row_l2 * np.sqrt(kept))
    return bound, np.float64(peak)


@kernel
def mask_row(
    x: Array, mask: Array, max_row_l2: float, headroom: float, peak_limit: float, out: Array
) -> float:
    """:func:`mask_rows` of one row (n,), inside compiled code; returns its unit or NaN."""
    bound, peak = _row_bound(x, max_row_l2)
    if not np.isfinite(bound):
        return np.nan
    scale = headroom / bound if bound > 0 else 1.0
    if peak > 0:
        scale = min(scale, peak_limit / peak)
    for j in range(x.shape[0]):
        rounded = (np.float64(x[j]) * scale + _TO_INTEGER) - _TO_INTEGER
        out[j] = np.uint32(np.int32(rounded)) - mask[j]
    return 1.0 / scale


@kernel
def _mask_rows(
    x_Tn: Array,
    mask_Tn: Array,
    max_row_l2: float,
    headroom: float,
    peak_limit: float,
    out_Tn: Array,
    unit_T: Array,
    lo: int,
    hi: int,
) -> None:
    for t in range(lo, hi):
        unit_T[t] = mask_row(x_Tn[t], mask_Tn[t], max_row_l2, headroom, peak_limit, out_Tn[t])


@kernel
def rms_norm_range(
    x_Tn: Array, gain_n: Array, epsilon: float, out_Tn: Array, lo: int, hi: int
) -> None:
    """:func:`rms_norm_rows` of some rows, into ``out_Tn``."""
    for t in range(lo, hi):
        x, out = x_Tn[t], out_Tn[t]
        factor = np.float32(1.0 / np.sqrt(_energy(x) / x.shape[0] + epsilon))
        for j in range(x.shape[0]):
            out[j] = x[j] * factor * gain_n[j]


def rms_norm_rows(x_Tn: np.ndarray, gain_n: np.ndarray, epsilon: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + epsilon) * gain for every row, float32 with a float64 sum.

    A fused loop: the framework's operator costs several times as much on a single row.
    """
    out_Tn = np.empty_like(x_Tn)
    parallel_for(
        lambda lo, hi: rms_norm_range(x_Tn, gain_n, epsilon, out_Tn, lo, hi),
        x_Tn.shape[0],
        grain=1 + _PARALLEL_ELEMENTS // max(1, x_Tn.shape[1]),
    )
    return out_Tn


def mask_rows(
    x_Tn: np.ndarray,
    mask_Tn: np.ndarray,
    max_row_l2: float,
    headroom: float,
    peak_limit: float,
    out_Tn: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Round each row at the largest scale that keeps |W_i x| below ``headroom``, less its pad.

    Args:
        x_Tn: float32 (T, n).
        mask_Tn: uint32 (T, n), the pads r.
        max_row_l2: largest Euclidean norm of a row of W, int8 units.
        headroom: what an output may reach. peak_limit: what a rounded input may reach.
        out_Tn: uint32 (T, n) to fill; None for a new array.

    Returns:
        ``out_Tn``, uint32 (T, n) = round(scale x) - r mod 2^32; float64 (T,) 1 / scale, NaN for a
        row with a NaN or an infinity, whose output is then meaningless.
    """
    if out_Tn is None:
        out_Tn = np.empty_like(mask_Tn)
    unit_T = np.empty(x_Tn.shape[0], np.float64)
    parallel_for(
        lambda lo, hi: _mask_rows(
            x_Tn, mask_Tn, max_row_l2, headroom, peak_limit, out_Tn, unit_T, lo, hi
        ),
        x_Tn.shape[0],
        grain=1 + _PARALLEL_ELEMENTS // max(1, x_Tn.shape[1]),
    )
    return out_Tn, unit_T


@kernel
def open_row(
    y: Array, correction: Array, unit_64: float, scale_m: Array, bias_m: Array, out: Array
) -> None:
    """:func:`open_rows` of one row (m,), inside compiled code."""
    unit = np.float32(unit_64)
    if bias_m.shape[0] > 0:
        for i in range(y.shape[0]):
            opened = np.float32(np.int32(y[i] + correction[i]))
            out[i] = opened * scale_m[i] * unit + bias_m[i]
    else:
        for i in range(y.shape[0]):
            opened = np.float32(np.int32(y[i] + correction[i]))
            out[i] = opened * scale_m[i] * unit


@kernel
def _open_rows(
    y_Tm: Array,
    correction_Tm: Array,
    unit_T: Array,
    scale_m: Array,
    bias_m: Array,
    out_Tm: Array,
    lo: int,
    hi: int,
) -> None:
    for t in range(lo, hi):
        open_row(y_Tm[t], correction_Tm[t], unit_T[t], scale_m, bias_m, out_Tm[t])


def open_rows(
    y_Tm: np.ndarray,
    correction_Tm: np.ndarray,
    unit_T: np.ndarray,
    scale_m: np.ndarray,
    bias_m: np.ndarray,
    out_Tm: np.ndarray,
) -> None:
    """out = (y + correction mod 2^32, signed) * scale * unit + bias.

    Args:
        y_Tm, correction_Tm: uint32 (T, m). unit_T: float64 (T,) from :func:`mask_rows`.
        scale_m: float32 (m,). bias_m: float32 (m,) or (0,) for none.
        out_Tm: float32 (T, m), overwritten.
    """
    parallel_for(
        lambda lo, hi: _open_rows(y_Tm, correction_Tm, unit_T, scale_m, bias_m, out_Tm, lo, hi),
        y_Tm.shape[0],
        grain=1 + _PARALLEL_ELEMENTS // max(1, y_Tm.shape[1]),
    )
