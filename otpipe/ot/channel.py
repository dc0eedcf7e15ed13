"""What the two parties of an OT session send to each other: ordered, reliable, labelled messages.

The OT stack knows nothing of sockets. Whoever connects the two programs implements ``Channel``;
``local_channel`` has the one for two threads of one process.

A label says what a message is, and at which oblivious transfer of the session: ``"kind@position"``.
Two parties that have come out of step therefore stop at the next message with an error, and never
go on with masks that do not belong together.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Channel(Protocol):
    """One party's end of an ordered, reliable stream of labelled messages.

    An implementation must never hang: a peer that is gone, or silent for longer than the
    implementation's limit, raises.
    """

    def send(self, label: str, payload: Bytes) -> None:
        """Send one message.

        Args:
            label: what it is, at most 64 ASCII characters.
            payload: uint8 (bytes,), contiguous; the caller may overwrite it after the call.

        Raises:
            ConnectionLost: the peer is gone.
        """

    def receive(self, label: str, num_bytes: int) -> Bytes:
        """The next message, uint8 (num_bytes,), as an array that the caller owns.

        Raises:
            ProtocolError: the next message has another label or another length.
            ConnectionLost: the peer is gone or silent.
        """


def label_kind(label: str) -> str:
    """The part of a label that says what a message is: all before the position."""
    return label.partition("@")[0]
