"""Where a rank's sessions find the shares of the residual stream that other ranks hand them.

Every share says whose it is: session, pass and stage. So whatever becomes of a session on the one
rank, its shares can never be taken for another's: without a session that waits, they are dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

POLL_S = 0.2
"""How often somebody who waits looks after its client."""


class ShareKey(NamedTuple):
    """Which share of the residual stream."""

    session: bytes
    pass_number: int
    stage: int


class Mailbox:
    """Shares that have arrived on one rank. Thread-safe."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._open: dict[bytes, dict[ShareKey, Tensor]] = {}

    def open(self, session: bytes) -> bool:
        """Accept shares for a session from now on; False if it is open already."""
        with self._arrived:
            if session in self._open:
                return False
            self._open[session] = {}
            return True

    def put(self, key: ShareKey, share: Tensor) -> None:
        """Leave a share for its session; dropped if that is gone."""
        with self._arrived:
            shares = self._open.get(key.session)
            if shares is not None:
                shares[key] = share
                self._arrived.notify_all()

    def take(self, key: ShareKey, has_left: Callable[[], bool], timeout_s: float) -> Tensor | None:
        """Wait for a share; None if its client has left or it did not come in time."""
        deadline_s = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                share = self._open[key.session].pop(key, None)
                if share is not None:
                    return share
                if time.monotonic() >= deadline_s or has_left():
                    return None
                self._arrived.wait(POLL_S)

    def close(self, session: bytes) -> None:
        """Forget a session and its shares."""
        with self._arrived:
            self._open.pop(session, None)
