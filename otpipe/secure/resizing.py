"""Between rings and scales: truncation, extension, and selection, with the wrap bit by OT.

A share of n bits stands for x = x_server + x_client - 2^n * wrap. What is moved to a larger ring,
or loses low bits without losing high ones, needs the wrap. It is the OR of the two top bits if x is
known to be non-negative (Huang et al., Cheetah, USENIX Security 2022, section 3.2.3), so an offset
is added to signed values first; the price is one bit of headroom.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.secure.entries import Entries, RowEntries, Rows
from otpipe.secure.rounds import Pending, Step, in_one_round
from otpipe.secure.shares import Share, reduced
from otpipe.secure.transfers import bit_times_value, product, table


@dataclass(frozen=True)
class Split:
    """A share as integers: x = part_server + part_client + 2^bits * nowrap_server * nowrap_client.

    Attributes:
        part: int64, this party's; the client's is in [0, 2^bits).
        nowrap: int64 of 0 and 1, this party's: its top bit, complemented.
        bits: of the ring that x comes from.
    """

    part: Tensor
    nowrap: Tensor
    bits: int

    @classmethod
    def of(cls, is_server: bool, x: Share, nonnegative: bool = False) -> Split:
        """Split a share whose secret is in [-2^(n-2), 2^(n-2)), or in [0, 2^(n-1))."""
        if x.bits < 3:
            raise ValueError(f"A ring of {x.bits} bits has no headroom; use at least 3 bits.")
        offset = 0 if nonnegative else 1 << (x.bits - 2)
        if not is_server:
            return cls(x.data, 1 - (x.data >> (x.bits - 1)), x.bits)
        moved = reduced(x.data + offset, x.bits)
        # wrap = top_s or top_c = 1 - nowrap_s nowrap_c, and what the offset added goes again.
        return cls(moved - (1 << x.bits) - offset, 1 - (moved >> (x.bits - 1)), x.bits)


def rescale(is_server: bool, x: Share, shift: int, bits: int, nonnegative: bool) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.rescale`."""
    kept = x.bits - shift
    if shift < 0 or kept < 3:
        raise ValueError(f"{shift} bits cannot be dropped from a ring of {x.bits}.")
    # Each party drops its own low bits: together 0 or 1 too few. One unit more at the server
    # makes that 0 or 1 too many of x / 2^shift, right in expectation over the shares.
    up = 1 if is_server and shift else 0
    if bits <= kept:
        return Share.of((x.data >> shift) + up, bits, x.frac - shift)
    split = Split.of(is_server, x, nonnegative)
    # The server's part is a multiple of 2^shift away from a ring element, so >> drops the same.
    high, missing = (split.part >> shift) + up, bits - kept
    (nowrap,) = yield from in_one_round(bit_times_value(is_server, split.nowrap, missing))
    return Share.of(high + (nowrap << kept), bits, x.frac - shift)


def shifted(
    x: Share, values: Tensor, shifts: Sequence[int], bits: int, *, up: bool = False,
    halves: bool = False,
) -> Share:  # fmt: skip
    """See :meth:`otpipe.secure.operations.SecureOperations.shifted`.

    values: of x, any representatives. up: one unit more where low bits were dropped, as in
    ``rescale``; halves: half a unit before they are.
    """
    if x.bits - max(shifts) < bits:
        raise ValueError(f"{max(shifts)} bits cannot be dropped from {x!r} to leave {bits} bits.")
    added = [(1 << s) >> 1 if halves and s > 0 else 0 for s in shifts]
    places = [[max(s, 0) for s in shifts], [max(-s, 0) for s in shifts]]
    table = torch.tensor([*places, added, [int(up and s > 0) for s in shifts]]).to(values.device)
    down, left, before, after = table.view(4, -1, *([1] * (values.ndim - 1)))
    return Share.of((((values + before) >> down) << left) + after, bits)


def select(
    is_server: bool, condition: Share, x: Share, bits: int, nonnegative: bool
) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.select`."""
    if condition.bits != 1 or condition.shape != x.shape:
        raise ValueError(f"{condition!r} cannot select from {x!r}: one bit an element is needed.")
    if bits <= x.bits:
        (got,) = yield from in_one_round(
            chosen(is_server, condition.data, reduced(x.data, bits), bits, bits)
        )
        return Share.of(got, bits, x.frac)
    split = Split.of(is_server, x, nonnegative)
    got, nowrap = yield from in_one_round(
        chosen(is_server, condition.data, split.part, x.bits, bits),
        _nowrap_and(is_server, split.nowrap, condition.data, bits - x.bits),
    )
    return Share.of(got + (nowrap << x.bits), bits, x.frac)


def chosen(
    is_server: bool, bit: Tensor, part: Tensor, part_bits: int, bits: int
) -> Pending[Tensor]:
    """Shares mod 2^bits of (bit_s xor bit_c) * (part_s + part_c).

    The client's part is in [0, 2^part_bits). With b = b_s + b_c - 2 b_s b_c and, where b_c = 1,
    -p_c = q_c - (2^n - 1) for the complement q_c = 2^n - 1 - p_c, the product is

        b_s p_s + b_c p_c  +  b_c [(1 - 2 b_s) p_s - b_s (2^n - 1)]  +  b_s (q_c if b_c else p_c):

    local terms, one correlated OT chosen by b_c, and n chosen by the bits of a value the client
    knows. (Both in the one direction; with the roles changed in the second, it would be one OT as
    in Rathee et al., CrypTFlow2, CCS 2020, section 3.1.3.)
    """
    full = (1 << part_bits) - 1
    if is_server:
        first = bit_times_value(True, (1 - 2 * bit) * part - bit * full, bits)
        second = product(True, bit, part_bits, bits)
    else:
        first = bit_times_value(False, bit, bits)
        second = product(False, torch.where(bit.bool(), full - part, part), part_bits, bits)
    count = len(first.requests)
    return Pending(
        first.requests + second.requests,
        lambda got: bit * part + first.finish(got[:count]) + second.finish(got[count:]),
    )


def _nowrap_and(is_server: bool, nowrap: Tensor, bit: Tensor, bits: int) -> Pending[Tensor]:
    """Shares mod 2^bits of nowrap_s nowrap_c (bit_s xor bit_c): a table of four."""
    own = (nowrap | (bit << 1)).reshape(-1)

    def entries() -> Entries:
        return RowEntries(_nowrap_rows(own.device), own << 2, 1, 4)

    pending = table(is_server, own, 2, (bits,), entries)
    return Pending(pending.requests, lambda got: pending.finish(got)[0].view(nowrap.shape))


@functools.cache
def _nowrap_rows(device: torch.device) -> Rows:
    """nowrap_s nowrap_c (bit_s xor bit_c) at row 4 (nowrap_s + 2 bit_s) + nowrap_c + 2 bit_c."""
    both = torch.arange(16, device=device)
    server, client = both >> 2, both & 3
    return Rows(((server & client & 1) * ((server ^ client) >> 1))[:, None])
