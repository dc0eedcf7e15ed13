"""Functions of one shared number, over the whole range of its format, from the secure operations.

A table covers a window. Where a value lies is found by a coarse lookup of two bits, which may be
wrong by the coarse step near a border; so every border is placed where both sides agree. Outside
the window a function is its limit (SiLU: 0 or x; exp: 0), never a value from another period.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from otpipe.errors import ParameterError
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rounds import Step, together
from otpipe.secure.shares import Share, concatenate
from otpipe.secure.tables import (
    Floats,
    Intervals,
    PiecewiseTable,
    exponential_table,
    polynomial_table,
)

ZONE_INDEX_BITS = 8

# --- SiLU ---------------------------------------------------------------------------------------

_FOLD_WINDOW = (-2.5, 13.5)
_FOLD_STEP = 4.0
"""Largest step of the zone lookup: a number with the wrong sign bit is at most half of it off."""


def silu(ops: SecureOperations, x: Share) -> Step[Share]:
    """x / (1 + exp(-x)), in the ring and scale of x.

    silu(x) = (x if x >= 0 else 0) - k(|x|), where k(v) = v / (1 + exp(v)) vanishes for large v.
    Near 0, k(v) = v + k(-v) makes the same result of either sign, so the sign may be coarse.

    Range: |x| < 2^(n - 2) - 2^(n - 9) units, n = bits of x: 508 for 22 bits at scale 2^-11.
    Error: |result - silu(x)| < 8.5e-4 + 2 units; 3.0e-4 + 2 units for |x| < 9.5 or |x| >= 13.5
    (2.0e-4 of the table; up to 7.1e-4 where the zone lookup takes k as 0 between 9.5 and 13.5).
    Relative to silu(x): for x >= 9.5 below 7.5e-5 + 2 units.
    Rounds: 4.

    Raises:
        ValueError: the ring is so large for the scale that zones would be coarser than 4.
    """
    table = _silu_tail(x.frac)
    zones = x.low_bits(x.bits - 1)
    step = 1 << (zones.bits - ZONE_INDEX_BITS)
    if step > _FOLD_STEP * (1 << x.frac):
        raise ValueError(f"SiLU of {x!r} has zones coarser than {_FOLD_STEP}; take a smaller ring.")
    top = round(_FOLD_WINDOW[1] * (1 << x.frac))

    # The lookup sees a value with x in [value, value + step). The window is open above: x = -top
    # would be folded to its upper end.
    half = 1 << (zones.bits - 1)
    upper_from, inside_from = -(step // 2), 1 - top
    zone_bits = Intervals(
        zones.bits, ((upper_from, half - upper_from), (inside_from, top - step + 1 - inside_from))
    )
    upper, inside = yield from ops.lookup(zones, ZONE_INDEX_BITS, zone_bits, (1, 1))
    ramp = yield from ops.select(upper, x, x.bits)
    folded = ramp + ramp - x
    tail = yield from ops.evaluate(folded, table)
    kept = yield from ops.select(inside, tail, x.bits)
    return ramp - kept


def _silu_complement(v: Floats) -> Floats:
    return v / (1 + np.exp(v))


@functools.cache
def _silu_tail(frac: int) -> PiecewiseTable:
    """k(v) on a window of 16: values between -1.77 (at -2) and 0.28."""
    return polynomial_table(
        "silu tail",
        _silu_complement,
        in_frac=frac,
        low=_FOLD_WINDOW[0],
        window_bits=4 + frac,
        index_bits=5,
        degree=2,
        out_bits=frac + 3,
        out_frac=frac,
        precision_bits=14,
    )


# --- exp ----------------------------------------------------------------------------------------

EXP_UPPER = 0.6
_EXP_WINDOW = (-31.0, 1.0)
_EXP_ZERO_BELOW = -24.0
EXP_FRAC = 16
EXP_BITS = 18


def exp(ops: SecureOperations, x: Share, bits: int) -> Step[Share]:
    """exp(x) for x up to 0.6, in a ring of ``bits`` >= 18 bits at scale 2^-16.

    x is read as a number in [1 - 2^(n - frac), 1): with 23 bits at scale 2^-12, in [-2047, 1).

    Range: [1 - 2^(n - frac) + 2^(n - frac - 8), 0.6]: down to -2039 for 23 bits at scale 2^-12.
    Error: below 6.5e-5 exp(x) + 7.1e-6 + 1 unit. 0 for x < -24, and for some of [-24, -16], since
    the zone lookup is right up to 8; there exp(x) < 1.2e-7.
    Rounds: 2.
    """
    one, alive_from = 1 << x.frac, round(_EXP_ZERO_BELOW * (1 << x.frac))
    zone_bits = Intervals(x.bits, ((alive_from, one - alive_from),))
    (alive,), value = yield from together(
        ops.lookup(x, ZONE_INDEX_BITS, zone_bits, (1,)), ops.evaluate(x, _exp_table(x.frac))
    )
    return (yield from ops.select(alive, value, bits, nonnegative=True))


@functools.cache
def _exp_table(frac: int) -> PiecewiseTable:
    return exponential_table(
        "exp",
        in_frac=frac,
        low=_EXP_WINDOW[0],
        window_bits=5 + frac,
        index_bits=4,
        out_bits=EXP_BITS,
        out_frac=EXP_FRAC,
        guard_bits=3,
        basis_frac=13,
    )


# --- reciprocal and reciprocal square root ------------------------------------------------------

_MANTISSA_BITS = 16
_OCTAVE_FRAC = 15


def reciprocal(
    ops: SecureOperations, x: Share, low: int, high: int, bits: int, frac: int
) -> Step[Share]:
    """1 / x at scale 2^-frac in a ring of ``bits`` bits.

    Range: 2^low <= x < 2^high units of x.
    Error: relative 2^-13, and one unit.
    Rounds: those of a comparison in the ring of x, and 1.

    Raises:
        ParameterError: the largest result does not fit the ring.
    """
    return _by_octave(ops, x, low, high, bits, frac, 1.0, square_root=False)


def reciprocal_sqrt(
    ops: SecureOperations, x: Share, low: int, high: int, bits: int, frac: int, factor: float = 1.0
) -> Step[Share]:
    """factor / sqrt(x) at scale 2^-frac in a ring of ``bits`` bits; else as :func:`reciprocal`."""
    return _by_octave(ops, x, low, high, bits, frac, factor, square_root=True)


def _by_octave(
    ops: SecureOperations,
    x: Share,
    low: int,
    high: int,
    bits: int,
    frac: int,
    factor: float,
    *,
    square_root: bool,
) -> Step[Share]:
    """Every octave [2^e, 2^(e+1)) has the same table of its mantissa; which one holds is compared.

    x = 2^e u, u in [1, 2]: the result is rho(u) times a power of two, exact by a local shift. All
    octaves are looked up; comparisons with powers of two give the bits of the right one, and they
    run beside the lookups.
    """
    octaves = range(low, high)
    exponent = math.floor(math.log2(factor))
    factor /= 2.0**exponent
    scales = []  # the result is rho * 2^scale
    for e in octaves:
        place = e - x.frac
        scales.append(exponent - (place // 2 if square_root else place))
    guard = max(0, _OCTAVE_FRAC - (frac + min(scales)))
    largest = 1.4 * factor * 2.0 ** (max(scales) + frac)
    if largest >= 2.0 ** (bits - 1) or bits + guard > 62:
        raise ParameterError(
            f"A function of {x!r} from 2^{low} units reaches {largest:.3g} units, too large for a "
            f"ring of {bits} bits; take fewer fraction bits."
        )
    powers = torch.tensor([1 << e for e in octaves]).view(-1, *([1] * len(x.shape)))
    every = x.reshape(1, *x.shape)
    borders = ops.add_public(every.expand(len(octaves) - 1, *x.shape), -powers[1:])
    parities = sorted({(e - x.frac) % 2 if square_root else 0 for e in octaves})
    members = [[e for e in octaves if not square_root or (e - x.frac) % 2 == p] for p in parities]
    lookups = []
    for parity, group in zip(parities, members, strict=True):
        table = _octave_table(square_root, factor / math.sqrt(2) ** parity)
        # x / 2^e at scale 2^-16 mod 2
        shifts = [e - _MANTISSA_BITS for e in group]
        mantissas = ops.shifted(every, shifts, _MANTISSA_BITS + 1).at_frac(_MANTISSA_BITS)
        lookups.append(ops.evaluate(mantissas, table))
    below, *found = yield from together(ops.is_negative(borders), *lookups)
    order = [e for group in members for e in group]
    rho = concatenate(found)[[order.index(e) for e in octaves]]
    last = ops.add_public(Share(torch.zeros_like(below.data[:1]), 1), 1)
    reached = concatenate([below, last])  # x < 2^(e+1)
    before = concatenate([Share(torch.zeros_like(last.data), 1), below])  # x < 2^e
    chosen = yield from ops.select(reached - before, rho, bits + guard, nonnegative=True)
    weights = torch.tensor([1 << (frac + guard + scale - _OCTAVE_FRAC) for scale in scales])
    weights = weights.view(powers.shape).to(ops.device)
    total = chosen.times(weights).sum(0).at_frac(frac + guard)
    return (yield from ops.rescale(total, guard, bits))


@functools.cache
def _octave_table(square_root: bool, factor: float) -> PiecewiseTable:
    """factor / u or factor / sqrt(u) for u in [1, 2]; the window has a margin on either side."""

    def function(u: Floats) -> Floats:
        return factor / (np.sqrt(u) if square_root else u)

    return polynomial_table(
        "reciprocal square root" if square_root else "reciprocal",
        function,
        in_frac=_MANTISSA_BITS,
        low=0.75,
        window_bits=_MANTISSA_BITS + 1,
        index_bits=5,
        degree=2,
        out_bits=_OCTAVE_FRAC + 3,
        out_frac=_OCTAVE_FRAC,
        precision_bits=18,
    )
