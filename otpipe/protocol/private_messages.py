"""The messages of the private-weights protocol, beside those that both modes share.

A connection begins as in public mode (HELLO, WELCOME). ATTACH then ties it to one rank for its
life, and what follows is between the client and that rank: exchanges of the preparation, or a
session (JOIN, then OT setup, then preparations of attention products, and passes). Inside a session
the two parties run the program of the model in lockstep; what they say to each other there travels
in CHANNEL frames.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from otpipe.errors import ProtocolError
from otpipe.protocol.messages import Message, MessageType

BATCH_ID_BYTES = 16
SESSION_ID_BYTES = 16

MAX_PASS_ROWS = 512
MAX_PASS_SPANS = 64
"""Runs of consecutive slots that one pass may draw from."""

LOGITS_FOR = ("none", "last", "all")
"""What a pass computes logits for; the place in this list is what travels."""

_SPAN = struct.Struct("<16sII")


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Tie this connection to ``rank``; the client sends nothing more until ATTACHED."""

    TYPE = MessageType.ATTACH
    rank: int


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """The rank itself speaks from now on."""

    TYPE = MessageType.ATTACHED
    rank: int


@dataclass(frozen=True, slots=True)
class Join(Message):
    """Begin a session on this rank: empty on rank 0, elsewhere the number that rank 0 gave."""

    TYPE = MessageType.JOIN
    session: bytes


@dataclass(frozen=True, slots=True)
class Joined(Message):
    """The session's number; the setup of oblivious transfer follows."""

    TYPE = MessageType.JOINED
    session: bytes


@dataclass(frozen=True, slots=True)
class Pass(Message):
    """One pass of the program over ``rows`` positions from ``position`` on.

    ``number`` counts the passes of the session from 0; ``logits_for`` is an index of
    :data:`LOGITS_FOR`; the payload names the slots of the rows, ``spans`` runs of them.
    ``position`` is the length of the text so far; PREPARE has come for it and the rows.
    """

    TYPE = MessageType.PASS
    number: int
    position: int
    rows: int
    logits_for: int
    spans: int


@dataclass(frozen=True, slots=True)
class PassReady(Message):
    """It is this client's turn: its pass may begin. From rank 0 only."""

    TYPE = MessageType.PASS_READY
    number: int


@dataclass(frozen=True, slots=True)
class PassDone(Message):
    """The pass is complete on all ranks: the next client may have its turn. To rank 0 only."""

    TYPE = MessageType.PASS_DONE
    number: int


@dataclass(frozen=True, slots=True)
class Prepare(Message):
    """Prepare the attention products of ``count`` positions from ``first`` on, on this rank.

    Between passes. ``first`` is where the preparation before has ended, or 0: that begins a new
    text, and forgets the one before. The exchanges follow PREPARE_READY.
    """

    TYPE = MessageType.PREPARE
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class PrepareReady(Message):
    """The rank has room for this preparation: it may begin."""

    TYPE = MessageType.PREPARE_READY
    first: int


@dataclass(frozen=True, slots=True)
class MaskedBegin(Message):
    """Start the oblivious linear evaluation of one map for a batch of slots, with masks.

    The client draws ``batch`` at random and names its slots by it ever after. ``a_key`` expands to
    the public polynomials on both sides. OLE_READY, OLE_BLOCK and OLE_ANSWER follow as in public
    mode; a block counts polynomials.
    """

    TYPE = MessageType.MASKED_BEGIN
    map_index: int
    num_slots: int
    batch: bytes
    a_key: bytes


@dataclass(frozen=True, slots=True)
class ChannelMessage(Message):
    """One message of the two parties' programs to each other; see ``otpipe.ot.channel``.

    ``number`` counts the messages of one direction from 0.
    """

    TYPE = MessageType.CHANNEL
    number: int
    label: str


class SlotSpan(NamedTuple):
    """Consecutive slots of one batch."""

    batch: bytes
    first_slot: int
    num_slots: int


def spans_payload(spans: Sequence[SlotSpan]) -> bytes:
    """The payload of a PASS."""
    return b"".join(_SPAN.pack(*span) for span in spans)


def spans_bytes(message: Pass) -> int:
    """Length of the payload of a PASS.

    Raises:
        ProtocolError: more spans than a pass may have.
    """
    if not 1 <= message.spans <= MAX_PASS_SPANS:
        raise ProtocolError(
            f"a pass named {message.spans} runs of slots; 1 to {MAX_PASS_SPANS} are allowed"
        )
    return message.spans * _SPAN.size


def parse_spans(message: Pass, payload: bytes) -> tuple[SlotSpan, ...]:
    """The slots of a pass.

    Raises:
        ProtocolError: they are not as many as the pass has rows.
    """
    spans = tuple(SlotSpan(*fields) for fields in _SPAN.iter_unpack(payload))
    if any(span.num_slots < 1 for span in spans) or message.rows != sum(
        span.num_slots for span in spans
    ):
        raise ProtocolError(
            f"a pass over {message.rows} rows named {[span.num_slots for span in spans]} slots"
        )
    return spans
