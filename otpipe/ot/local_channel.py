"""A channel between two threads of one process that counts what crosses it.

For tests and benchmarks, and for whoever runs both parties in one process.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

from otpipe.errors import ConnectionLost, ProtocolError
from otpipe.ot.channel import Bytes, label_kind


class _Line:
    """What both ends share: one queue for each direction, and who spoke last."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queues: tuple[deque[tuple[str, Bytes]], ...] = (deque(), deque())
        self.closed_by: str | None = None


class LocalChannel:
    """One end of an in-process line; see :func:`local_channels`.

    Attributes:
        sent_bytes: payload bytes sent from this end, by kind of label.
        sent_messages: messages sent from this end, by kind of label.
        rounds: how often this end received something after it had sent something (or at first):
            messages of one direction that follow each other count once.
    """

    def __init__(self, line: _Line, side: int, timeout_s: float) -> None:
        self._line, self._side, self._timeout_s = line, side, timeout_s
        self._name = ("server", "client")[side]
        self._listening = False
        self.sent_bytes: Counter[str] = Counter()
        self.sent_messages: Counter[str] = Counter()
        self.rounds = 0

    def send(self, label: str, payload: Bytes) -> None:
        """Queue one message for the other end; see :class:`otpipe.ot.channel.Channel`."""
        if payload.dtype != np.uint8 or payload.ndim != 1:
            raise TypeError(f"A payload is uint8 (bytes,), not {payload.dtype} {payload.shape}.")
        with self._line.changed:
            self._check_open()
            self._line.queues[1 - self._side].append((label, payload.copy()))
            self._line.changed.notify_all()
        self.sent_bytes[label_kind(label)] += payload.size
        self.sent_messages[label_kind(label)] += 1
        self._listening = False

    def receive(self, label: str, num_bytes: int) -> Bytes:
        """Take the next message of the other end; see :class:`otpipe.ot.channel.Channel`."""
        queue = self._line.queues[self._side]
        with self._line.changed:
            arrived = self._line.changed.wait_for(
                lambda: queue or self._line.closed_by is not None, self._timeout_s
            )
            if not arrived:
                raise ConnectionLost(
                    f"The {self._name} waited {self._timeout_s:g} s for {label!r} in vain; "
                    f"look at the other party's error."
                )
            if not queue:
                self._check_open()
            got, payload = queue.popleft()
        if not self._listening:
            self._listening = True
            self.rounds += 1
        check_due(got, payload.size, label, num_bytes)
        return payload

    def close(self) -> None:
        """End the line; what was sent before can still be received, anything else raises."""
        with self._line.changed:
            if self._line.closed_by is None:
                self._line.closed_by = self._name
            self._line.changed.notify_all()

    def _check_open(self) -> None:
        if self._line.closed_by is not None:
            raise ConnectionLost(
                f"The {self._line.closed_by} closed the channel; open a new connection."
            )


def check_due(got_label: str, got_bytes: int, label: str, num_bytes: int) -> None:
    """Refuse a message that is not the one that is due.

    Raises:
        ProtocolError: another label, or another length.
    """
    if got_label != label:
        raise ProtocolError(
            f"The peer sent {got_label!r} where {label!r} is due: the two parties are out of step; "
            f"open a new connection."
        )
    if got_bytes != num_bytes:
        raise ProtocolError(
            f"The peer sent {got_bytes} bytes as {label!r} where {num_bytes} are due; "
            f"open a new connection."
        )


def local_channels(timeout_s: float = 60.0) -> tuple[LocalChannel, LocalChannel]:
    """The two ends of a new line: (server's, client's).

    Args:
        timeout_s: seconds that ``receive`` waits before it raises.
    """
    line = _Line()
    return LocalChannel(line, 0, timeout_s), LocalChannel(line, 1, timeout_s)
