"""From oblivious transfers to shares: products of one party's value with the other's, and tables.

Each function describes one round of both parties: the server passes what it holds, the client what
it holds, and both get additive shares of the result. The server always sends, the client always
chooses. Shapes and widths are public and equal on both sides.

Shape suffixes: n elements, w words of one row, M messages of one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from otpipe.ot import ReceiveCorrelated, ReceiveOneOfMany, SendCorrelated, SendOneOfMany
from otpipe.ot.params import MAX_MESSAGE_BITS, MAX_WORD_BITS
from otpipe.secure.rounds import Pending
from otpipe.secure.shares import random_ring, reduced


def bit_times_value(is_server: bool, own: Tensor, bits: int) -> Pending[Tensor]:
    """Shares of (client's bit) * (server's value) mod 2^bits: one correlated OT an element.

    own: the server's value, int64 of any representatives; the client's bit, 0 or 1; any shape.
    """
    flat = own.reshape(-1)
    if is_server:
        # The sender has u, the receiver u + bit * value.
        return Pending(
            [SendCorrelated(reduced(flat, bits), bits)], lambda got: (-got[0]).view(own.shape)
        )
    return Pending(
        [ReceiveCorrelated(flat.to(torch.uint8), bits)], lambda got: got[0].view(own.shape)
    )


_GROUP_VALUES = 1 << 16
_MAX_GROUP = 8
"""Bits of a factor in one request: several while it has few values, since a request takes as long
as some 10^4 of them. Bits after the first of a group are sent wider than they need to be, by 3.5
bits of some 60 at most on average."""


def bit_groups(num_values: int, num_bits: int) -> list[tuple[int, int]]:
    """(first bit, bits) of the requests of a product whose requests have ``num_values`` a bit."""
    size = min(_MAX_GROUP, max(1, _GROUP_VALUES // max(1, num_values)))
    return [(lo, min(size, num_bits - lo)) for lo in range(0, num_bits, size)]


def product(is_server: bool, own: Tensor, choice_bits: int, bits: int) -> Pending[Tensor]:
    """Shares of (client's value) * (server's value) mod 2^bits, elementwise.

    Gilboa, Two Party RSA Key Generation (CRYPTO 1999), section 4: one correlated OT for each bit
    of the client's value; bit j matters mod 2^(bits - j) only, so no more is sent than the first
    bit of its group needs.

    own: the client's value in [0, 2^choice_bits); the server's, int64 of any representatives.
    """
    flat = own.reshape(-1)
    groups = bit_groups(len(flat), min(choice_bits, bits))
    requests: list[Any] = []
    for lo, size in groups:
        width = bits - lo
        requests.append(
            SendCorrelated(reduced(flat, width).repeat(size), width)
            if is_server
            else ReceiveCorrelated(_choices(flat, lo, size), width)
        )
    return Pending(requests, lambda got: _weighted_sum(got, groups, is_server).view(own.shape))


def row_product(
    is_server: bool, own: Tensor, words: int, choice_bits: int, bits: int
) -> Pending[Tensor]:
    """Shares (n, words) of the client's value i times the server's row i, mod 2^bits.

    As :func:`product`, but one choice bit selects a whole row, so the COTs are paid once a row.

    own: the client's values (n,) in [0, 2^choice_bits); the server's rows (n, words).
    """
    # Rows longer than a message can be are cut into pieces of at most two lengths. Pieces of one
    # length are rows of one request, since a request takes longer than a row.
    room = MAX_MESSAGE_BITS // bits
    num_pieces = -(-words // room)
    short, num_long = divmod(words, num_pieces)
    lengths = [
        (count, length)
        for count, length in ((num_long, short + 1), (num_pieces - num_long, short))
        if count
    ]
    groups = bit_groups(len(own) * words, min(choice_bits, bits))
    requests: list[Any] = []
    at = 0
    for count, length in lengths:
        if is_server:
            rows = own[:, at : at + count * length].reshape(-1, length)
            requests += [
                SendCorrelated(reduced(rows, bits - lo).repeat(size, 1), bits - lo)
                for lo, size in groups
            ]
        else:
            value = own.repeat_interleave(count)
            requests += [
                ReceiveCorrelated(_choices(value, lo, size), bits - lo, words=length)
                for lo, size in groups
            ]
        at += count * length

    def finish(got: list[Tensor]) -> Tensor:
        parts = []
        for i, (count, length) in enumerate(lengths):
            results = got[i * len(groups) : (i + 1) * len(groups)]
            part = _weighted_sum(results, groups, is_server)
            parts.append(part.view(len(own), count * length))
        return torch.cat(parts, dim=1)

    return Pending(requests, finish)


Fields = Sequence[Tensor]
Messages = Callable[[slice], Fields]

_CPU_ENTRIES = 1 << 15
"""Entries of a table that are made at once on a CPU: passes over them stay in its cache."""


def table(
    is_server: bool,
    index: Tensor,
    index_bits: int,
    field_bits: Sequence[int],
    messages: Messages,
    masks: Fields | None = None,
) -> Pending[list[Tensor]]:
    """Shares of the fields that the client's index chooses from the server's table: 1-of-2^b OT.

    The server keeps a mask for each field, the client gets the field less its mask; fields are
    packed end to end into one message.

    Args:
        index: int64 (n,), the client's, in [0, 2^index_bits); the server's gives shape and device.
        index_bits: b, 1 to 8.
        field_bits: ring of each field.
        messages: server only: the fields of some of the n elements, int64 (elements, M) each, of
            any representatives.
        masks: server only: int64 (n,) for each field, uniform in its ring, fresh; drawn here if
            not given.

    Returns:
        Own shares of the fields, int64 (n,) each.
    """
    words, word_bits, pieces = _layout(field_bits)
    if not is_server:
        request = ReceiveOneOfMany(index, index_bits, word_bits, words)
        return Pending([request], lambda got: _unpack(got[0], field_bits, pieces))
    if masks is None:
        masks = [random_ring(index.shape, bits, index.device) for bits in field_bits]
    own = list(masks)
    packed = index.new_zeros((len(index), 1 << index_bits, words))
    step = len(index) if index.device.type != "cpu" else max(1, _CPU_ENTRIES >> index_bits)
    for lo in range(0, len(index), max(1, step)):
        part = slice(lo, lo + step)
        fields = messages(part)
        for field, field_lo, word, word_lo, bits in pieces:
            masked = fields[field] - own[field][part, None]
            packed[part, :, word] |= reduced(masked >> field_lo, bits) << word_lo
    return Pending([SendOneOfMany(packed, word_bits)], lambda got: own)


Piece = tuple[int, int, int, int, int]


def _layout(field_bits: Sequence[int]) -> tuple[int, int, list[Piece]]:
    """Words, their bits, and pieces (field, bit of the field, word, bit of the word, bits)."""
    total = sum(field_bits)
    words = -(-total // MAX_WORD_BITS)
    word_bits = -(-total // words)
    pieces: list[Piece] = []
    at = 0
    for field, bits in enumerate(field_bits):
        done = 0
        while done < bits:
            word, word_lo = divmod(at, word_bits)
            size = min(bits - done, word_bits - word_lo)
            pieces.append((field, done, word, word_lo, size))
            done, at = done + size, at + size
    return words, word_bits, pieces


def _unpack(words: Tensor, field_bits: Sequence[int], pieces: Sequence[Piece]) -> list[Tensor]:
    fields = [words.new_zeros(len(words)) for _ in field_bits]
    for field, field_lo, word, word_lo, bits in pieces:
        # An arithmetic shift is fine: the bits it repeats are cut off. 64-bit pieces do not occur,
        # since a field lives in a ring of at most 62 bits.
        fields[field] |= reduced(words[:, word] >> word_lo, bits) << field_lo
    return fields


def _choices(values: Tensor, lo: int, size: int) -> Tensor:
    """Bits lo to lo + size of values (n,), one bit of all after the other: uint8 (size n,)."""
    places = torch.arange(lo, lo + size)[:, None]
    return ((values >> places) & 1).to(torch.uint8).view(-1)


def _weighted_sum(
    got: Sequence[Tensor], groups: Sequence[tuple[int, int]], is_server: bool
) -> Tensor:
    """Sum of 2^j times the result of bit j; the sender's share is what it took away, negated."""
    total = None
    for (lo, size), results in zip(groups, got, strict=True):
        for i, each in enumerate(results.view(size, -1, *results.shape[1:])):
            part = each << (lo + i)
            total = part if total is None else total.add_(part)
    assert total is not None
    return -total if is_server else total
