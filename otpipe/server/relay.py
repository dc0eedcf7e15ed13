"""One client's bytes to a rank and back: the gateway reads none of them.

One thread for both directions: an SSL object may not be used by two threads at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from dataclasses import dataclass, field

CHUNK_BYTES = 1 << 18
STALL_S = 10.0
"""A side that takes no bytes for so long is given up, and so is the other."""
POLL_S = 1.0

_WAIT = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_GONE = select.POLLERR | select.POLLNVAL


@dataclass
class _Flow:
    """One direction: what was read from ``source`` and waits for ``sink``."""

    source: socket.socket
    sink: socket.socket
    waiting: memoryview = field(default_factory=lambda: memoryview(b""))
    ended: bool = False  # the source has closed
    since_s: float = 0.0  # when the sink last took bytes

    def step(self) -> bool:
        """Move what can be moved now; whether anything was."""
        if not self.waiting and not self.ended:
            try:
                data = self.source.recv(CHUNK_BYTES)
            except _WAIT:
                return False
            self.ended = not data
            self.waiting, self.since_s = memoryview(data), time.monotonic()
        if not self.waiting:
            return False
        try:
            sent = self.sink.send(self.waiting)
        except _WAIT:
            return False
        self.waiting, self.since_s = self.waiting[sent:], time.monotonic()
        return True

    @property
    def stalled(self) -> bool:
        return bool(self.waiting) and time.monotonic() - self.since_s > STALL_S


def relay(client: socket.socket, rank: socket.socket) -> None:
    """Carry bytes both ways until one side closes or stalls; then close the rank's side.

    What the rank sent before it closed still reaches the client, whose socket is left to the
    caller.
    """
    flows = (_Flow(client, rank), _Flow(rank, client))
    try:
        for sock in (client, rank):
            sock.setblocking(False)
        with contextlib.suppress(OSError):
            _run(flows)
    finally:
        with contextlib.suppress(OSError):
            rank.shutdown(socket.SHUT_RDWR)
        rank.close()


def _run(flows: tuple[_Flow, _Flow]) -> None:
    up, down = flows
    while True:
        moved = [flow.step() for flow in flows]
        if any(flow.stalled for flow in flows) or up.ended:
            return
        if down.ended and not down.waiting:
            return
        if not any(moved) and _wait(flows):
            return


def _wait(flows: tuple[_Flow, _Flow]) -> bool:
    """Wait until a step can move something; True if a side is gone."""
    events = {flow.source.fileno(): 0 for flow in flows}
    for flow in flows:
        if flow.waiting:
            events[flow.sink.fileno()] |= select.POLLOUT
        elif not flow.ended:
            events[flow.source.fileno()] |= select.POLLIN
    poll = select.poll()
    for fileno, wanted in events.items():
        if wanted:
            poll.register(fileno, wanted)
    return any(event & _GONE for _, event in poll.poll(POLL_S * 1000))
