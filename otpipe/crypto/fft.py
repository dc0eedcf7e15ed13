"""Complex FFT of length 1024 for compiled loops that keep one polynomial in the first-level cache.

Five radix-4 passes of the self-sorting kind (Stockham; Van Loan, Computational Frameworks for the
Fast Fourier Transform, 1992, section 1.7). In the first three, a Stockham pass would have inner
loops of 1, 4 and 16 elements; ``_spread`` walks through all 256 butterflies in one loop instead and
leaves each quadruple of results side by side, as in Pease's constant-geometry form. That exchanges
the three lowest base-4 digits of the output index, which a pointwise product does not mind:
``inverse`` takes the same order back, and ``in_order`` brings numpy's output into it.

Real and imaginary parts are in arrays of their own: float64 (2, 1024).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from otpipe.kernels.cpu import Array, kernel

LENGTH = 1024
_QUARTER = LENGTH // 4


def _twiddles() -> NDArray[np.float64]:
    """(3, 2, 4, 256) real and imaginary parts of 1, w, w^2, w^3 for the three spreading passes.

    In a pass after s = 1, 4, 16 results stand together, w = exp(-2 pi i (t - t mod s) / 1024) at
    butterfly t. The later passes take every s-th of the first table.
    """
    t = np.arange(_QUARTER)
    power = np.arange(4)[:, None]
    angles = [-2 * np.pi * power * (t - t % together) / LENGTH for together in (1, 4, 16)]
    return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


#: for ``forward`` by powers, and for ``inverse`` (3, 2, 1024) with the four powers side by side
FORWARD = _twiddles()
INVERSE = np.ascontiguousarray(FORWARD.swapaxes(2, 3)).reshape(3, 2, LENGTH)


def in_order(spectrum: NDArray[np.complex128]) -> NDArray[np.float64]:
    """A spectrum (1024,) of numpy's order in the order of ``forward``: float64 (2, 1024)."""
    index = np.arange(LENGTH)
    low = index % 64
    swapped = index - low + (low % 4) * 16 + low // 4 % 4 * 4 + low // 16
    return np.stack([spectrum.real[swapped], spectrum.imag[swapped]])


@kernel
def forward(xr: Array, xi: Array, yr: Array, yi: Array, twiddles: Array) -> None:
    """Transform x into y, sign -1, unscaled, in this module's order; x is overwritten.

    twiddles: ``FORWARD``.
    """
    for step in range(3):  # in loops, since every call is compiled anew where it stands
        _spread(xr, xi, yr, yi, twiddles[step])
        xr, xi, yr, yi = yr, yi, xr, xi
    for together in (64, 256):
        _split(xr, xi, yr, yi, together, twiddles[0])
        xr, xi, yr, yi = yr, yi, xr, xi


@kernel
def inverse(
    yr: Array, yi: Array, xr: Array, xi: Array, twiddles: Array, side_by_side: Array
) -> None:
    """x = 1024 times the array whose ``forward`` is y; y is overwritten.

    twiddles: ``FORWARD``. side_by_side: ``INVERSE``.
    """
    for together in (256, 64):
        _join(yr, yi, xr, xi, together, twiddles[0])
        xr, xi, yr, yi = yr, yi, xr, xi
    for step in range(2, -1, -1):
        _collect(yr, yi, xr, xi, side_by_side[step, 0], side_by_side[step, 1])
        xr, xi, yr, yi = yr, yi, xr, xi


# Each butterfly loads everything before it stores anything, and rows are arguments of their own:
# else the compiler sees too many possible overlaps to use vector instructions.


@kernel
def _spread(xr: Array, xi: Array, yr: Array, yi: Array, w: Array) -> None:
    """Butterflies over x[t], x[t+256], x[t+512], x[t+768]; results in y[4t] to y[4t+3]."""
    n = _QUARTER
    ar, br, cr, dr = xr[:n], xr[n : 2 * n], xr[2 * n : 3 * n], xr[3 * n :]
    ai, bi, ci, di = xi[:n], xi[n : 2 * n], xi[2 * n : 3 * n], xi[3 * n :]
    w1r, w1i, w2r = w[0, 1], w[1, 1], w[0, 2]
    w2i, w3r, w3i = w[1, 2], w[0, 3], w[1, 3]
    for t in range(n):
        even_r = ar[t] + cr[t]
        even_i = ai[t] + ci[t]
        odd_r = ar[t] - cr[t]
        odd_i = ai[t] - ci[t]
        sum_r = br[t] + dr[t]
        sum_i = bi[t] + di[t]
        turn_r = bi[t] - di[t]  # -i (b - d)
        turn_i = dr[t] - br[t]
        r1 = odd_r + turn_r
        i1 = odd_i + turn_i
        r2 = even_r - sum_r
        i2 = even_i - sum_i
        r3 = odd_r - turn_r
        i3 = odd_i - turn_i
        y1r = r1 * w1r[t] - i1 * w1i[t]
        y1i = r1 * w1i[t] + i1 * w1r[t]
        y2r = r2 * w2r[t] - i2 * w2i[t]
        y2i = r2 * w2i[t] + i2 * w2r[t]
        y3r = r3 * w3r[t] - i3 * w3i[t]
        y3i = r3 * w3i[t] + i3 * w3r[t]
        yr[4 * t] = even_r + sum_r
        yr[4 * t + 1] = y1r
        yr[4 * t + 2] = y2r
        yr[4 * t + 3] = y3r
        yi[4 * t] = even_i + sum_i
        yi[4 * t + 1] = y1i
        yi[4 * t + 2] = y2i
        yi[4 * t + 3] = y3i


@kernel
def multiply(yr: Array, yi: Array, wr: Array, wi: Array) -> None:
    """y *= w, elementwise and complex; any length."""
    for t in range(yr.shape[0]):
        r = yr[t] * wr[t] - yi[t] * wi[t]
        i = yr[t] * wi[t] + yi[t] * wr[t]
        yr[t] = r
        yi[t] = i


@kernel
def _multiply_conjugate(yr: Array, yi: Array, wr: Array, wi: Array) -> None:
    for t in range(LENGTH):
        r = yr[t] * wr[t] + yi[t] * wi[t]
        i = yi[t] * wr[t] - yr[t] * wi[t]
        yr[t] = r
        yi[t] = i


@kernel
def _collect(yr: Array, yi: Array, xr: Array, xi: Array, wr: Array, wi: Array) -> None:
    """Inverse of ``_spread``, times 4. With the products inside its loop, LLVM gives up."""
    _multiply_conjugate(yr, yi, wr, wi)
    n = _QUARTER
    ar, br, cr, dr = xr[:n], xr[n : 2 * n], xr[2 * n : 3 * n], xr[3 * n :]
    ai, bi, ci, di = xi[:n], xi[n : 2 * n], xi[2 * n : 3 * n], xi[3 * n :]
    for t in range(n):
        z0r = yr[4 * t]
        z1r = yr[4 * t + 1]
        z2r = yr[4 * t + 2]
        z3r = yr[4 * t + 3]
        z0i = yi[4 * t]
        z1i = yi[4 * t + 1]
        z2i = yi[4 * t + 2]
        z3i = yi[4 * t + 3]
        even_r = z0r + z2r
        even_i = z0i + z2i
        odd_r = z0r - z2r
        odd_i = z0i - z2i
        sum_r = z1r + z3r
        sum_i = z1i + z3i
        turn_r = z3i - z1i  # i (z1 - z3)
        turn_i = z1r - z3r
        ar[t] = even_r + sum_r
        br[t] = odd_r + turn_r
        cr[t] = even_r - sum_r
        dr[t] = odd_r - turn_r
        ai[t] = even_i + sum_i
        bi[t] = odd_i + turn_i
        ci[t] = even_i - sum_i
        di[t] = odd_i - turn_i


@kernel
def _split(xr: Array, xi: Array, yr: Array, yi: Array, together: int, w: Array) -> None:
    """A Stockham pass after ``together`` results stand together."""
    n, s = _QUARTER, together
    for first in range(0, n, s):
        w1r, w1i, w2r = w[0, 1, first], w[1, 1, first], w[0, 2, first]
        w2i, w3r, w3i = w[1, 2, first], w[0, 3, first], w[1, 3, first]
        ar, ai = xr[first : first + s], xi[first : first + s]
        br, bi = xr[n + first : n + first + s], xi[n + first : n + first + s]
        cr, ci = xr[2 * n + first : 2 * n + first + s], xi[2 * n + first : 2 * n + first + s]
        dr, di = xr[3 * n + first : 3 * n + first + s], xi[3 * n + first : 3 * n + first + s]
        at = 4 * first
        y0r, y0i = yr[at : at + s], yi[at : at + s]
        y1r, y1i = yr[at + s : at + 2 * s], yi[at + s : at + 2 * s]
        y2r, y2i = yr[at + 2 * s : at + 3 * s], yi[at + 2 * s : at + 3 * s]
        y3r, y3i = yr[at + 3 * s : at + 4 * s], yi[at + 3 * s : at + 4 * s]
        for t in range(s):
            even_r = ar[t] + cr[t]
            even_i = ai[t] + ci[t]
            odd_r = ar[t] - cr[t]
            odd_i = ai[t] - ci[t]
            sum_r = br[t] + dr[t]
            sum_i = bi[t] + di[t]
            turn_r = bi[t] - di[t]
            turn_i = dr[t] - br[t]
            r1 = odd_r + turn_r
            i1 = odd_i + turn_i
            r2 = even_r - sum_r
            i2 = even_i - sum_i
            r3 = odd_r - turn_r
            i3 = odd_i - turn_i
            y0r[t] = even_r + sum_r
            y0i[t] = even_i + sum_i
            y1r[t] = r1 * w1r - i1 * w1i
            y1i[t] = r1 * w1i + i1 * w1r
            y2r[t] = r2 * w2r - i2 * w2i
            y2i[t] = r2 * w2i + i2 * w2r
            y3r[t] = r3 * w3r - i3 * w3i
            y3i[t] = r3 * w3i + i3 * w3r


@kernel
def _join(yr: Array, yi: Array, xr: Array, xi: Array, together: int, w: Array) -> None:
    """Inverse of ``_split``, times 4."""
    n, s = _QUARTER, together
    for first in range(0, n, s):
        w1r, w1i, w2r = w[0, 1, first], w[1, 1, first], w[0, 2, first]
        w2i, w3r, w3i = w[1, 2, first], w[0, 3, first], w[1, 3, first]
        ar, ai = xr[first : first + s], xi[first : first + s]
        br, bi = xr[n + first : n + first + s], xi[n + first : n + first + s]
        cr, ci = xr[2 * n + first : 2 * n + first + s], xi[2 * n + first : 2 * n + first + s]
        dr, di = xr[3 * n + first : 3 * n + first + s], xi[3 * n + first : 3 * n + first + s]
        at = 4 * first
        y0r, y0i = yr[at : at + s], yi[at : at + s]
        y1r, y1i = yr[at + s : at + 2 * s], yi[at + s : at + 2 * s]
        y2r, y2i = yr[at + 2 * s : at + 3 * s], yi[at + 2 * s : at + 3 * s]
        y3r, y3i = yr[at + 3 * s : at + 4 * s], yi[at + 3 * s : at + 4 * s]
        for t in range(s):
            z1r = y1r[t] * w1r + y1i[t] * w1i
            z1i = y1i[t] * w1r - y1r[t] * w1i
            z2r = y2r[t] * w2r + y2i[t] * w2i
            z2i = y2i[t] * w2r - y2r[t] * w2i
            z3r = y3r[t] * w3r + y3i[t] * w3i
            z3i = y3i[t] * w3r - y3r[t] * w3i
            even_r = y0r[t] + z2r
            even_i = y0i[t] + z2i
            odd_r = y0r[t] - z2r
            odd_i = y0i[t] - z2i
            sum_r = z1r + z3r
            sum_i = z1i + z3i
            turn_r = z3i - z1i
            turn_i = z1r - z3r
            ar[t] = even_r + sum_r
            br[t] = odd_r + turn_r
            cr[t] = even_r - sum_r
            dr[t] = odd_r - turn_r
            ai[t] = even_i + sum_i
            bi[t] = odd_i + turn_i
            ci[t] = even_i - sum_i
            di[t] = odd_i - turn_i
