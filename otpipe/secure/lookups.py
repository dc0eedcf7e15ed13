"""Functions of a shared number by one 1-of-2^b oblivious transfer.

The server's table holds T[i] = f(x_s + i * 2^s) - rho for every index i the client may have, under
a fresh mask rho an element; the client's index is the top b bits of its part (Ishai, Kushilevitz,
Meldgaard, Orlandi, Paskin-Cherniavsky, TCC 2013, section 3: one-time truth tables, here from OT as
in Dessouky et al., NDSS 2017, and SiRnn, IEEE S&P 2021). Nothing is revealed to either party, and
the wrap of the shares is a multiple of the table's period.
"""

from __future__ import annotations

from collections.abc import Sequence

from otpipe.secure.entries import Entries, FunctionEntries, IntervalEntries, RowEntries
from otpipe.secure.rounds import Step, in_one_round
from otpipe.secure.shares import Share, reduced
from otpipe.secure.tables import FieldFunction, Intervals, PiecewiseTable
from otpipe.secure.transfers import product, random_fields, table


def lookup(
    is_server: bool, x: Share, index_bits: int, function: FieldFunction, field_bits: Sequence[int]
) -> Step[list[Share]]:
    """See :meth:`otpipe.secure.operations.SecureOperations.lookup`."""
    flat = x.data.reshape(-1)
    low_bits = x.bits - index_bits

    def entries() -> Entries:
        if isinstance(function, Intervals):
            return IntervalEntries(flat, 1 << low_bits, x.bits, function.intervals)
        return FunctionEntries(function, flat, 1 << low_bits, x.bits)

    index = flat if is_server else flat >> low_bits
    (got,) = yield from in_one_round(table(is_server, index, index_bits, field_bits, entries))
    return [Share(field.view(x.shape), bits) for field, bits in zip(got, field_bits, strict=True)]


def evaluate(is_server: bool, x: Share, function: PiecewiseTable) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.evaluate`.

    The client gets each coefficient less the server's mask rho_k. What is missing, rho_k phi_k(d),
    is a product of the server's rho_k with the client's phi_k(d), so it needs no second round.
    """
    if x.frac != function.in_frac:
        raise ValueError(f"{function.name} takes scale {function.in_frac}, got {x!r}.")
    flat = x.low_bits(function.window_bits).data.reshape(-1)
    low_bits = function.window_bits - function.index_bits
    raw_bits, rings = function.raw_bits, function.field_bits
    first = 1 if function.has_intercept else 0
    masks = random_fields(flat, rings) if is_server else None
    index = flat if is_server else flat >> low_bits

    def entries() -> Entries:
        rows = function.rows(flat.device)
        return RowEntries(rows, flat, 1 << low_bits, function.window_bits)

    chosen = table(is_server, index, function.index_bits, rings, entries, masks)
    if masks is not None:
        factors = list(masks[first:].unbind(0))
    else:
        d = reduced(flat, low_bits)
        factors = [phi[d] for phi in function.basis]
    crosses = [
        product(is_server, factor, bits, raw_bits)
        for factor, bits in zip(factors, function.basis_bits, strict=True)
    ]
    fields, *products = yield from in_one_round(chosen, *crosses)
    total = sum(products)
    if function.has_intercept:
        total = total + (fields[0] << function.intercept_drop)
    if not is_server:
        for factor, field in zip(factors, fields[first:], strict=True):
            total = total + factor * field
    raw = reduced(total, raw_bits)
    # Rounds as rescale does: local, since the high bits of the inner product are not needed.
    out = (raw >> function.raw_drop) + (1 if is_server else 0)
    return Share.of(out.view(x.shape), function.out_bits, function.out_frac)
