"""Comparison and the maximum of a row.

The millionaires' protocol of Rathee et al., CrypTFlow2 (CCS 2020), section 3.1: the numbers are cut
into digits, one 1-of-2^m OT a digit gives shares of the bits "less" and "equal", and these are
joined by AND gates. Here up to four digits are joined in one round by one lookup of all their bits
instead of a tree of single gates: fewer rounds at about the same bytes.

Shape suffixes: n elements, M messages, R rows, P columns, g members of a group.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from otpipe.secure.entries import Entries, RowEntries, Rows
from otpipe.secure.resizing import select
from otpipe.secure.rounds import Pending, Step, in_one_round
from otpipe.secure.shares import Share, concatenate, stack
from otpipe.secure.transfers import table

BitFunction = Callable[[list[Tensor]], list[Tensor]]

DIGIT_BITS = 4
"""1-of-16 OT, as in the paper; wider digits only where they spare a round."""
MAX_JOINED = 4
"""Digits joined in one round: at most 7 index bits."""
MAX_DIGIT_BITS = 6
RADIX = 4
"""Members of a group of the maximum's tree: half the rounds of pairs, 1.6 times the bytes."""


def digit_widths(num_bits: int) -> list[int]:
    """Digits of a comparison, lowest first: two rounds up to 24 bits, else digits of 4."""
    if num_bits <= MAX_DIGIT_BITS * MAX_JOINED:
        width = max(DIGIT_BITS, -(-num_bits // MAX_JOINED))
    else:
        width = DIGIT_BITS
    whole, rest = divmod(num_bits, width)
    return [width] * whole + ([rest] if rest else [])


def is_negative(is_server: bool, x: Share) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.is_negative`."""
    top = x.data >> (x.bits - 1)
    if x.bits == 1:
        return Share(top, 1)
    low_bits = x.bits - 1
    low = (x.data - (top << low_bits)).reshape(-1)
    # top(x) = top_s xor top_c xor carry, where low_s + low_c >= 2^(n-1) carries: that is
    # 2^(n-1) - 1 - low_s < low_c.
    own = (1 << low_bits) - 1 - low if is_server else low
    carry = yield from _server_less(is_server, own, low_bits)
    return Share(top ^ carry.view(x.shape), 1)


def row_max(is_server: bool, x_RP: Share) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.max`."""
    while x_RP.shape[1] > 1:
        R, P = x_RP.shape
        g = min(P, RADIX)
        missing = -P % g
        if missing:  # the same secret again: it changes no maximum
            x_RP = concatenate([x_RP, x_RP[:, -1:].expand(R, missing)], dim=1)
        x_RP = yield from _group_max(is_server, x_RP.reshape(R, -1, g))
    return x_RP[:, 0]


def _group_max(is_server: bool, x_Rng: Share) -> Step[Share]:
    """(R, n, g) -> (R, n): all pairs of a group are compared at once."""
    g = x_Rng.shape[2]
    pairs = [(i, j) for i in range(g) for j in range(i + 1, g)]
    differences = stack([x_Rng[..., i] - x_Rng[..., j] for i, j in pairs])
    less = yield from is_negative(is_server, differences)
    members = {pair: less[index] for index, pair in enumerate(pairs)}
    one = 1 if is_server else 0

    def beats(i: int, j: int) -> Share:
        """Whether member i counts as larger than j: of equal ones the first."""
        if j < i:
            return members[j, i]
        flipped = members[i, j]
        return Share(flipped.data ^ one, 1)

    wins = yield from truth_table(
        is_server,
        [
            stack([beats(i, [j for j in range(g) if j != i][k]) for i in range(1, g)])
            for k in range(g - 1)
        ],
        _all_of,
        1,
    )
    above = stack([x_Rng[..., i] - x_Rng[..., 0] for i in range(1, g)])
    added = yield from select(is_server, wins[0], above, x_Rng.bits, nonnegative=False)
    return x_Rng[..., 0] + added.sum(0)


def truth_table(
    is_server: bool,
    inputs: Sequence[Share],
    function: BitFunction,
    num_outputs: int,
) -> Step[list[Share]]:
    """Any function of up to 8 shared bits, elementwise, in one round.

    Args:
        inputs: bits, all of one shape.
        function: from int64 tensors of 0 and 1 to ``num_outputs`` such tensors; of a module, since
            its table is kept.
    """
    shape = inputs[0].shape
    if len(inputs) == 1:
        # A function of one bit is linear: f(b) = f(0) xor (f(0) xor f(1)) b.
        zero, one = (function([torch.full((), v)]) for v in (0, 1))
        own = inputs[0].data
        return [
            Share(own * (a ^ b).item() ^ (a.item() if is_server else 0), 1)
            for a, b in zip(zero, one, strict=True)
        ]
    pending = _joined(is_server, [x.data.reshape(-1) for x in inputs], function, num_outputs)
    (got,) = yield from in_one_round(pending)
    return [Share(each.view(shape), 1) for each in got]


def _joined(
    is_server: bool, own: Sequence[Tensor], function: BitFunction, num_outputs: int
) -> Pending[list[Tensor]]:
    count = len(own)
    index = own[0]
    for k in range(1, count):
        index = index | (own[k] << k)

    def entries() -> Entries:
        rows = _rows_of_bits(function, count, index.device)
        return RowEntries(rows, index, 1, count, flipped=True)

    return table(is_server, index, count, (1,) * num_outputs, entries)


@functools.lru_cache(maxsize=64)
def _rows_of_bits(function: BitFunction, count: int, device: torch.device) -> Rows:
    """The function of every ``count`` bits."""
    every = torch.arange(1 << count, device=device)
    return Rows(torch.stack(function([(every >> k) & 1 for k in range(count)]), 1))


def _server_less(is_server: bool, own: Tensor, num_bits: int) -> Step[Tensor]:
    """Own share (n,) of the bit: the server's number is below the client's; both (n,)."""
    widths = digit_widths(num_bits)
    # The lowest digit's "equal" is never asked for. All others of one width are one table.
    pendings, low = [], 0
    for width, group in itertools.groupby(enumerate(widths), lambda each: (each[1], each[0] > 0)):
        size = len(list(group))
        mask = (1 << width[0]) - 1
        digits = torch.stack([(own >> (low + k * width[0])) & mask for k in range(size)])
        pendings.append(_leaves(is_server, digits, width[0], with_equal=width[1]))
        low += size * width[0]
    leaves = yield from in_one_round(*pendings)
    # Lowest digit first.
    digits_of: list[tuple[Tensor, Tensor | None]] = [each for group in leaves for each in group]
    while len(digits_of) > 1:
        count = -(-len(digits_of) // MAX_JOINED)
        sizes = [len(digits_of) // count + (k < len(digits_of) % count) for k in range(count)]
        groups, at = [], 0
        for size in sizes:
            groups.append(digits_of[at : at + size])
            at += size
        joined = yield from in_one_round(*(_join(is_server, group) for group in groups))
        digits_of = [(each[0], each[1] if len(each) > 1 else None) for each in joined]
    return digits_of[0][0]


def _leaves(
    is_server: bool, digits: Tensor, width: int, with_equal: bool
) -> Pending[list[tuple[Tensor, Tensor | None]]]:
    """(less, equal) of several digits (places, n), a place after the other."""
    flat = digits.view(-1)

    def entries() -> Entries:
        rows = _leaf_rows(width, with_equal, flat.device)
        return RowEntries(rows, flat << width, 1, 2 * width)

    pending = table(is_server, flat, width, (1,) * (1 + with_equal), entries)

    def finish(got: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        fields = [field.view(digits.shape) for field in pending.finish(got)]
        return [
            (fields[0][place], fields[1][place] if with_equal else None)
            for place in range(len(digits))
        ]

    return Pending(pending.requests, finish)


@functools.cache
def _leaf_rows(width: int, with_equal: bool, device: torch.device) -> Rows:
    """Whether a < b, and a == b, at row 2^width a + b."""
    both = torch.arange(1 << (2 * width), device=device)
    a, b = both >> width, both & ((1 << width) - 1)
    columns = [a < b, a == b] if with_equal else [a < b]
    return Rows(torch.stack(columns, 1).to(torch.int64))


def _join(is_server: bool, group: Sequence[tuple[Tensor, Tensor | None]]) -> Pending[list[Tensor]]:
    """One (less, equal) of several digits, lowest first.

    less = less_top xor eq_top less_next xor eq_top eq_next less_... : at most one term is 1. The
    first is linear and stays out of the table.
    """
    size = len(group)
    top_less = group[-1][0]
    lowest_equal = group[0][1]
    lower = [each[0] for each in group[:-1]]
    equal = [each[1] for each in group[1:]]
    own = [*lower, *(each for each in equal if each is not None)]
    if size == 1:
        return Pending([], lambda got: [each for each in group[0] if each is not None])
    if lowest_equal is not None:
        own.append(lowest_equal)
        pending = _joined(is_server, own, _less_and_equal, 2)
    else:
        pending = _joined(is_server, own, _less_below_the_top, 1)

    def finish(got: list[Tensor]) -> list[Tensor]:
        fields = pending.finish(got)
        return [fields[0] ^ top_less, *fields[1:]]

    return Pending(pending.requests, finish)


def _less_below_the_top(bits: list[Tensor]) -> list[Tensor]:
    """From "less" of all digits but the top, then "equal" of all but the lowest; lowest first."""
    less, equals = bits[: len(bits) // 2], bits[len(bits) // 2 :]
    total, above = torch.zeros_like(bits[0]), torch.ones_like(bits[0])
    for k in reversed(range(len(less))):
        above = above & equals[k]
        total = total ^ (above & less[k])
    return [total]


def _less_and_equal(bits: list[Tensor]) -> list[Tensor]:
    """The same, with "equal" of the lowest digit as the last: also whether all are equal."""
    (below,) = _less_below_the_top(bits[:-1])
    (equal,) = _all_of(bits[len(bits) // 2 :])
    return [below, equal]


def _all_of(bits: list[Tensor]) -> list[Tensor]:
    result = bits[0]
    for each in bits[1:]:
        result = result & each
    return [result]
