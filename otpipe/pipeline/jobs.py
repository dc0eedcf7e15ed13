"""What the gateway asks of a rank: a fixed row of integers plus raw bytes, nothing pickled."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import torch

_LAYOUT = struct.Struct("<8q")
HEADER_BYTES = _LAYOUT.size


class Op(IntEnum):
    """What a job asks for, and how its answer ended."""

    LINEAR = 1
    OLE_BEGIN = 2
    OLE_BLOCK = 3
    OLE_NEXT = 4
    OLE_DROP = 5
    DESCRIBE = 6
    HAND_OVER = 7
    DONE = 100
    FAILED = 101


@dataclass(frozen=True, slots=True)
class JobHeader:
    """Eight int64 that precede every payload between ranks.

    Attributes:
        op: an :class:`Op`.
        map_index: the linear map meant, or 0; the stage that a HAND_OVER is for.
        rows: rows of a LINEAR; slots of an OLE_BEGIN; count of an OLE_BLOCK; groups of an answer.
        session: number of the preprocessing session on that rank; of a HAND_OVER, the first half
            of the client's session.
        first: first coordinate of an OLE_BLOCK; first group of an answer; -1 when there is none;
            the pass of a HAND_OVER.
        extra: upload bytes of an OLE_BEGIN; of a HAND_OVER, the second half of the session.
        payload_bytes: length of the payload that follows; filled in by the transport.
        reserved: 0.
    """

    op: int
    map_index: int = 0
    rows: int = 0
    session: int = 0
    first: int = 0
    extra: int = 0
    payload_bytes: int = 0
    reserved: int = 0

    def write(self, message: memoryview, payload_bytes: int) -> None:
        """Write the header to the first bytes of ``message``, with ``payload_bytes`` filled in."""
        _LAYOUT.pack_into(
            message,
            0,
            self.op,
            self.map_index,
            self.rows,
            self.session,
            self.first,
            self.extra,
            payload_bytes,
            self.reserved,
        )

    @classmethod
    def read(cls, message: memoryview) -> JobHeader:
        """Inverse of :meth:`write`."""
        return cls(*_LAYOUT.unpack_from(message, 0))


EMPTY = torch.empty(0, dtype=torch.uint8)
