"""The messages of the public-weights protocol and the checks on every field that arrives.

Each message knows its type number, how to write its header, and how to read one strictly. Payload
lengths follow from the message and the model; they are computed here so that both sides agree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache, lru_cache
from typing import ClassVar, Self

from otpipe.errors import ProtocolError
from otpipe.protocol.wire import Buffer, FrameConnection, Header, frame_head

MAX_LINEAR_BYTES = 64 << 20
"""Largest payload of one masked linear request or result; clients split rows to stay below it."""

MAX_LINEAR_ROWS = 512


def max_linear_rows(in_features: int, out_features: int, ring_bytes: int) -> int:
    """Most rows of one LINEAR request through a map of this shape; both sides use this."""
    widest = max(in_features, out_features) * ring_bytes
    return min(MAX_LINEAR_ROWS, max(1, MAX_LINEAR_BYTES // widest))


MAX_OLE_BLOCK_BYTES = 16 << 20
"""Largest uplink block or downlink answer piece of the preprocessing."""

A_KEY_BYTES = 32


class MessageType(IntEnum):
    """Type numbers; requests below 128, answers from 128. CHANNEL travels both ways."""

    HELLO = 1
    GET_BUNDLE = 2
    LINEAR = 3
    OLE_BEGIN = 4
    OLE_BLOCK = 5
    PING = 6
    ATTACH = 7
    JOIN = 8
    PASS = 9
    PASS_DONE = 10
    MASKED_BEGIN = 11
    CHANNEL = 12
    PREPARE = 13
    WELCOME = 128
    BUNDLE = 129
    RESULT = 130
    OLE_ANSWER = 131
    PONG = 132
    OLE_READY = 133
    ATTACHED = 134
    JOINED = 135
    PASS_READY = 136
    PREPARE_READY = 137
    ERROR = 255


@cache
def _field_types(message: type[Message]) -> dict[str, str]:
    """Name of the type of every field of a message."""
    return {field.name: str(field.type) for field in fields(message)}


@dataclass(frozen=True, slots=True)
class Message:
    """Base: a frozen set of ints, strings and byte strings that becomes a frame header."""

    TYPE: ClassVar[MessageType]

    def header(self) -> Header:
        """The msgpack map of this message."""
        return {name: getattr(self, name) for name in _field_types(type(self))}  # type: ignore[arg-type]

    @classmethod
    def parse(cls, header: Header) -> Self:
        """Build from a received header.

        Raises:
            ProtocolError: a field is missing, unknown, of the wrong type or out of range.
        """
        expected = _field_types(cls)  # type: ignore[arg-type]
        if header.keys() != expected.keys():
            raise ProtocolError(
                f"{cls.TYPE.name} has fields {sorted(header)}; expected {sorted(expected)}"
            )
        for name, kind in expected.items():
            value = header[name]
            if type(value).__name__ != kind:
                raise ProtocolError(
                    f"{cls.TYPE.name}.{name} is a {type(value).__name__}; expected {kind}"
                )
            if isinstance(value, int) and not 0 <= value < 2**63:
                raise ProtocolError(f"{cls.TYPE.name}.{name} is {value}; it may not be negative")
            if isinstance(value, str | bytes) and len(value) > 1024:
                raise ProtocolError(f"{cls.TYPE.name}.{name} is longer than 1024")
        return cls(**header)


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Client's first frame."""

    TYPE = MessageType.HELLO
    client: str


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Server's first frame: which weights it serves, and in which mode."""

    TYPE = MessageType.WELCOME
    server: str
    fingerprint: str
    weights: str
    num_ranks: int
    bundle_bytes: int
    bundle_sha256: bytes


@dataclass(frozen=True, slots=True)
class GetBundle(Message):
    """Ask for the public model description."""

    TYPE = MessageType.GET_BUNDLE


@dataclass(frozen=True, slots=True)
class Bundle(Message):
    """The public model description is the payload, ``bundle_bytes`` long."""

    TYPE = MessageType.BUNDLE


@dataclass(frozen=True, slots=True)
class Linear(Message):
    """Masked rows x - r of one map; payload rows * in_features ring elements."""

    TYPE = MessageType.LINEAR
    map_index: int
    rows: int


@dataclass(frozen=True, slots=True)
class Result(Message):
    """W (x - r); payload rows * out_features ring elements."""

    TYPE = MessageType.RESULT
    map_index: int
    rows: int


@dataclass(frozen=True, slots=True)
class OleBegin(Message):
    """Start the oblivious linear evaluation of one map for a batch of slots.

    ``a_key`` expands to the public polynomials a_j on both sides.
    """

    TYPE = MessageType.OLE_BEGIN
    map_index: int
    num_slots: int
    upload_bytes: int
    a_key: bytes


@dataclass(frozen=True, slots=True)
class OleReady(Message):
    """The rank has room for this exchange: the blocks may come."""

    TYPE = MessageType.OLE_READY
    map_index: int


@dataclass(frozen=True, slots=True)
class OleBlock(Message):
    """Ciphertexts b_j for ``count`` input coordinates from ``first`` on; in order, no gaps."""

    TYPE = MessageType.OLE_BLOCK
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class OleAnswer(Message):
    """Packed output ciphertexts, ``groups`` of them from ``first_group`` on."""

    TYPE = MessageType.OLE_ANSWER
    map_index: int
    first_group: int
    groups: int


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Ask whether the server is there."""

    TYPE = MessageType.PING


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """The server is there."""

    TYPE = MessageType.PONG


@dataclass(frozen=True, slots=True)
class Error(Message):
    """One sentence for the user; the connection closes after it."""

    TYPE = MessageType.ERROR
    text: str


@lru_cache(maxsize=4096)
def message_head(message: Message, payload_bytes: int) -> bytes:
    """The bytes of ``message``'s frame that come before its payload; kept for the next time."""
    return frame_head(message.TYPE, message.header(), payload_bytes)


def send_message(connection: FrameConnection, message: Message, payload: Buffer = b"") -> None:
    """Send ``message`` with its payload."""
    connection.send(message.TYPE, message.header(), payload)
