"""From oblivious transfers to shares: products of one party's value with the other's, and tables.

Each function describes one round of both parties: the server passes what it holds, the client what
it holds, and both get additive shares of the result. The server always sends, the client always
chooses. Shapes and widths are public and equal on both sides.

Shape suffixes: n elements, w words of one row, M messages of one transfer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from otpipe.ot import ReceiveCorrelated, ReceiveOneOfMany, SendCorrelated, SendOneOfMany
from otpipe.ot.params import MAX_MESSAGE_BITS
from otpipe.secure.entries import Entries, Layout
from otpipe.secure.rounds import Pending
from otpipe.secure.shares import random_ring, reduced


def bit_times_value(is_server: bool, own: Tensor, bits: int) -> Pending[Tensor]:
    """Shares of (client's bit) * (server's value) mod 2^bits: one correlated OT an element.

    own: the server's value, int64 of any representatives; the client's bit, 0 or 1; any shape.
    """
    return product(is_server, own, 1, bits)


def product(is_server: bool, own: Tensor, choice_bits: int, bits: int) -> Pending[Tensor]:
    """Shares of (client's value) * (server's value) mod 2^bits, elementwise.

    Gilboa, Two Party RSA Key Generation (CRYPTO 1999), section 4: one correlated OT for each bit
    of the client's value; bit j matters mod 2^(bits - j) only, so no more is sent.

    own: the client's value in [0, 2^choice_bits); the server's, int64 of any representatives.
    """
    flat, factor_bits = own.reshape(-1), min(choice_bits, bits)
    if is_server:
        # The sender has u, the receiver u + product.
        return Pending(
            [SendCorrelated(flat, bits, factor_bits)], lambda got: (-got[0]).view(own.shape)
        )
    return Pending(
        [ReceiveCorrelated(_factor(flat, choice_bits, bits), bits, None, factor_bits)],
        lambda got: got[0].view(own.shape),
    )


def row_product(
    is_server: bool, own: Tensor, words: int, choice_bits: int, bits: int
) -> Pending[Tensor]:
    """Shares (n, words) of the client's value i times the server's row i, mod 2^bits.

    As :func:`product`, but one choice bit selects a whole row, so the COTs are paid once a row.

    own: the client's values (n,) in [0, 2^choice_bits); the server's rows (n, words).
    """
    # Rows longer than a message can be are cut into pieces of at most two lengths. Pieces of one
    # length are rows of one request.
    num_pieces = -(-words // (MAX_MESSAGE_BITS // bits))
    short, num_long = divmod(words, num_pieces)
    lengths = [
        (count, length)
        for count, length in ((num_long, short + 1), (num_pieces - num_long, short))
        if count
    ]
    factor_bits, at = min(choice_bits, bits), 0
    requests: list[Any] = []
    for count, length in lengths:
        if is_server:
            rows = own[:, at : at + count * length].reshape(-1, length)
            requests.append(SendCorrelated(rows, bits, factor_bits))
        else:
            value = _factor(own, choice_bits, bits).repeat_interleave(count)
            requests.append(ReceiveCorrelated(value, bits, length, factor_bits))
        at += count * length

    def finish(got: list[Tensor]) -> Tensor:
        parts = [
            each.view(len(own), count * length)
            for each, (count, length) in zip(got, lengths, strict=True)
        ]
        total = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return -total if is_server else total

    return Pending(requests, finish)


def _factor(values: Tensor, choice_bits: int, bits: int) -> Tensor:
    """The client's values without the bits that do not matter mod 2^bits."""
    return values if choice_bits <= bits else reduced(values, bits)


def table(
    is_server: bool,
    index: Tensor,
    index_bits: int,
    field_bits: Sequence[int],
    entries: Callable[[], Entries],
    masks: Tensor | None = None,
) -> Pending[list[Tensor]]:
    """Shares of the fields that the client's index chooses from the server's table: 1-of-2^b OT.

    The server keeps a mask for each field, the client gets the field less its mask; fields are
    packed end to end into one message.

    Args:
        index: int64 (n,), the client's, in [0, 2^index_bits); the server's gives shape and device.
        index_bits: b, 1 to 8.
        field_bits: ring of each field.
        entries: called at the server only: the fields.
        masks: server only: int64 (fields, n), uniform in the fields' rings, fresh; drawn here if
            not given.

    Returns:
        Own shares of the fields, int64 (n,) each.
    """
    layout = _layout(tuple(field_bits))
    if not is_server:
        request = ReceiveOneOfMany(index, index_bits, layout.word_bits, layout.words)
        return Pending([request], lambda got: layout.unpacked(got[0], len(field_bits)))
    own = random_fields(index, field_bits) if masks is None else masks
    packed = layout.packed(entries(), own, index_bits)
    return Pending([SendOneOfMany(packed, layout.word_bits)], lambda got: list(own.unbind(0)))


def random_fields(like: Tensor, field_bits: Sequence[int]) -> Tensor:
    """Fresh masks for the fields of ``like``'s elements: int64 (fields, n)."""
    parts = []
    for bits, group in itertools.groupby(field_bits):
        parts.append(random_ring((len(list(group)), *like.shape), bits, like.device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.cache
def _layout(field_bits: tuple[int, ...]) -> Layout:
    return Layout(field_bits)
