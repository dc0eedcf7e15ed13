"""When a call of an OT session is in order: after setup, one at a time, never after an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """The state of one party's session, apart from its secrets.

    Misuse raises ``RuntimeError``: it is a bug of the program, not of its input or of the peer. A
    call that fails half-way ends the session, since the parties can no longer agree on which
    transfer comes next.
    """

    def __init__(self, owner: str) -> None:
        """``owner``: class name, for errors."""
        self._owner = owner
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._ready = False
        self._failed = False

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Hold the session for one call of ``method``; "setup" must be the first.

        Raises:
            RuntimeError: out of order, concurrent, after an error, or in a forked process.
        """
        name = f"{self._owner}.{method}"
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{name} was called in another process than the one that made the session; "
                f"both would use the same masks. Make a session in each process."
            )
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{name} was called while another call of this session runs; "
                f"use a session from one thread at a time."
            )
        try:
            if self._failed:
                raise RuntimeError(
                    f"{name} was called after an error ended this session; open a new connection."
                )
            if method == "setup" and self._ready:
                raise RuntimeError(f"{name} was called a second time; once is enough.")
            if method != "setup" and not self._ready:
                raise RuntimeError(f"{name} was called before setup(); call setup() first.")
            self._failed = True  # until the call has come to its end
            yield
            self._failed = False
            self._ready = True
        finally:
            self._lock.release()
