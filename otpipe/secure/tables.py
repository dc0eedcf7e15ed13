"""Tables of functions of a shared number: what the server looks up at every point it may be at.

The client's part of x is cut into b index bits and s low bits d. The server, which knows its own
part in full, knows x up to d for each of the 2^b indices: base = x - d. So an entry is fitted to
the interval [base, base + 2^s) wherever that begins, at the full resolution of x, and no carry
between the parties' low bits is involved. (A table indexed by the high bits of both shares would
have to cover two segments an entry.)

On the interval f(base + d) = c_0(base) + sum_k c_k(base) phi_k(d) with public functions phi_k,
which the client knows at its d: slope and intercept for phi_1 = d, one more term for phi_2 = d^2;
and for the exponential exactly exp(base) * exp(d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.secure.entries import Rows, in_intervals

Floats = NDArray[np.float64]
FieldFunction = Callable[[Tensor], list[Tensor]]
"""From int64 values of x, in [0, 2^bits), to one int64 tensor a field."""


@dataclass(frozen=True)
class Intervals:
    """Whether a number lies in each of some intervals: a ``FieldFunction`` of one-bit fields.

    Attributes:
        bits: x is a number mod 2^bits.
        intervals: (low, size) of each; x is inside if (x - low) mod 2^bits < size.
    """

    bits: int
    intervals: tuple[tuple[int, int], ...]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """int64 0 or 1 for each interval."""
        return in_intervals(x, self.bits, self.intervals)


@dataclass(frozen=True, eq=False, repr=False)
class PiecewiseTable:
    """A function on a window of fixed-point numbers, as an inner product of two tables.

    Attributes:
        name: for messages.
        function: float64 -> float64, what the table approximates (and the reference evaluates).
        in_frac: scale of x.
        low: the window is [low, low + 2^window_bits) units of x; x is taken mod 2^window_bits.
        window_bits: W.
        index_bits: b; an interval has 2^(W - b) units.
        out_bits, out_frac: ring and scale of the result.
        raw_drop: bits of the inner product below the result's unit.
        intercept_drop: low bits that the intercept does without.
        basis_bits: of each phi_k.
        basis: int64 (terms, 2^(W - b)), phi_k(d) in [0, 2^basis_bits).
        coefficients: int64 (2^W, fields); at x mod 2^W. First the intercept, if there is one.
        has_intercept: whether there is one.
    """

    name: str
    function: Callable[[Floats], Floats]
    in_frac: int
    low: int
    window_bits: int
    index_bits: int
    out_bits: int
    out_frac: int
    raw_drop: int
    intercept_drop: int
    basis_bits: tuple[int, ...]
    basis: Tensor
    coefficients: Tensor
    has_intercept: bool

    @property
    def raw_bits(self) -> int:
        """Ring of the inner product."""
        return self.out_bits + self.raw_drop

    @property
    def field_bits(self) -> tuple[int, ...]:
        """Rings of the fields of an entry."""
        intercept = (self.raw_bits - self.intercept_drop,) if self.has_intercept else ()
        return intercept + (self.raw_bits,) * len(self.basis_bits)

    @cached_property
    def _rows(self) -> dict[torch.device, Rows]:
        return {}

    def rows(self, device: torch.device) -> Rows:
        """The coefficients on a device, copied there once."""
        if device not in self._rows:
            self._rows[device] = Rows(self.coefficients.to(device))
        return self._rows[device]

    @cached_property
    def error(self) -> float:
        """Largest distance from the function, over every base and d, before the last rounding."""
        raw = float(1 << (self.out_frac + self.raw_drop))
        low_bits = self.window_bits - self.index_bits
        stride = max(1, (1 << low_bits) // 64)
        d = torch.arange(0, 1 << low_bits, stride)
        d = torch.cat((d, torch.tensor([(1 << low_bits) - 1])))
        first, last = self.low, self.low + (1 << self.window_bits) - (1 << low_bits)
        worst = 0.0
        for lo in range(first, last + 1, 1 << 12):
            base = torch.arange(lo, min(last + 1, lo + (1 << 12)))
            fields = self.coefficients[base & ((1 << self.window_bits) - 1)]
            value = torch.zeros((len(base), len(d)), dtype=torch.int64)
            at = 0
            if self.has_intercept:
                value += fields[:, :1] << self.intercept_drop
                at = 1
            for k in range(len(self.basis_bits)):
                value += fields[:, at + k, None] * self.basis[k, d]
            exact = self.function((base[:, None] + d).numpy() / float(1 << self.in_frac))
            worst = max(worst, float(np.abs(value.numpy() / raw - exact).max()))
        return worst

    def reference(self, x: Tensor) -> Tensor:
        """The function at int64 ``x``, any representatives, rounded to the result's scale."""
        offset = x - self.low
        inside = (offset & ((1 << self.window_bits) - 1)) + self.low
        exact = self.function(inside.cpu().numpy() / float(1 << self.in_frac))
        return torch.from_numpy(np.rint(exact * float(1 << self.out_frac)).astype(np.int64))


def polynomial_table(
    name: str,
    function: Callable[[Floats], Floats],
    *,
    in_frac: int,
    low: float,
    window_bits: int,
    index_bits: int,
    degree: int,
    out_bits: int,
    out_frac: int,
    precision_bits: int,
) -> PiecewiseTable:
    """A piecewise polynomial through the Chebyshev nodes of every interval.

    Args:
        low: where the window begins.
        degree: 1 (slope and intercept) or 2.
        precision_bits: resolution 2^-precision_bits of each term; a few more than ``out_frac``.
    """
    low_bits = window_bits - index_bits
    nodes = (np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) + 1) / 2
    base = _window(low, in_frac, window_bits)
    width = float(1 << low_bits) / (1 << in_frac)
    values = function(base[:, None] / float(1 << in_frac) + nodes * width)
    terms = np.linalg.solve(np.vander(nodes, degree + 1, increasing=True), values.T).T
    # phi_1 = d is exact; phi_k is needed to the resolution of the terms only.
    basis_bits = tuple(
        low_bits if k == 1 else min(low_bits, precision_bits - 5) for k in range(1, degree + 1)
    )
    raw_frac = precision_bits + max(basis_bits)
    u = np.arange(1 << low_bits) / float(1 << low_bits)
    basis = np.stack(
        [
            np.minimum(np.rint(u**k * 2.0**bits), 2.0**bits - 1)
            for k, bits in enumerate(basis_bits, 1)
        ]
    )
    intercept_drop = raw_frac - precision_bits - 1
    scales = [raw_frac - intercept_drop, *(raw_frac - bits for bits in basis_bits)]
    return PiecewiseTable(
        name=name,
        function=function,
        in_frac=in_frac,
        low=int(base[0]),
        window_bits=window_bits,
        index_bits=index_bits,
        out_bits=out_bits,
        out_frac=out_frac,
        raw_drop=raw_frac - out_frac,
        intercept_drop=intercept_drop,
        basis_bits=basis_bits,
        basis=_integers(basis),
        coefficients=_at_residues(
            np.rint(terms * np.exp2(np.array(scales, float))), int(base[0]), window_bits
        ),
        has_intercept=True,
    )


def exponential_table(
    name: str,
    *,
    in_frac: int,
    low: float,
    window_bits: int,
    index_bits: int,
    out_bits: int,
    out_frac: int,
    guard_bits: int,
    basis_frac: int,
) -> PiecewiseTable:
    """exp on a window, by exp(base) * exp(d): exact but for rounding.

    Args:
        guard_bits: exp(base) is held at ``out_frac + guard_bits``.
        basis_frac: exp(d) is held at this scale.
    """
    low_bits = window_bits - index_bits
    base = _window(low, in_frac, window_bits)
    factor = np.exp(np.arange(1 << low_bits) / float(1 << in_frac)) * 2.0**basis_frac
    entries = np.exp(base / float(1 << in_frac)) * 2.0 ** (out_frac + guard_bits)
    bits = math.ceil(math.log2(factor[-1] + 1))
    return PiecewiseTable(
        name=name,
        function=np.exp,
        in_frac=in_frac,
        low=int(base[0]),
        window_bits=window_bits,
        index_bits=index_bits,
        out_bits=out_bits,
        out_frac=out_frac,
        raw_drop=guard_bits + basis_frac,
        intercept_drop=0,
        basis_bits=(bits,),
        basis=_integers(factor)[None],
        coefficients=_at_residues(np.rint(entries)[:, None], int(base[0]), window_bits),
        has_intercept=False,
    )


def _window(low: float, in_frac: int, window_bits: int) -> Floats:
    first = round(low * (1 << in_frac))
    return np.arange(first, first + (1 << window_bits), dtype=np.float64)


def _at_residues(rows: Floats, first: int, window_bits: int) -> Tensor:
    """Row i belongs to x = first + i: move it to x mod 2^window_bits."""
    return _integers(np.roll(rows, first % (1 << window_bits), axis=0))


def _integers(values: Floats) -> Tensor:
    return torch.from_numpy(np.rint(values).astype(np.int64))
