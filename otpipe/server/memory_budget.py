"""How much memory the sessions of a rank may hold for one purpose, all together."""

from __future__ import annotations

import threading


class MemoryBudget:
    """Bytes that are promised to sessions, by session. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._held: dict[bytes, int] = {}

    @property
    def held_bytes(self) -> int:
        """Of all sessions."""
        with self._lock:
            return sum(self._held.values())

    def resize(self, session: bytes, num_bytes: int) -> bool:
        """Promise ``num_bytes`` to a session in place of what it had.

        Returns:
            False if that would exceed the limit: then nothing has changed.
        """
        with self._lock:
            before = self._held.get(session, 0)
            total = sum(self._held.values()) - before + num_bytes
            if num_bytes > before and total > self.limit_bytes:
                return False
            self._held[session] = num_bytes
            return True

    def free(self, session: bytes) -> None:
        """Forget a session."""
        with self._lock:
            self._held.pop(session, None)
