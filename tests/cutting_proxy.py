"""A recording proxy that cuts connections in the middle of a message, in either direction."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from proxies import Proxy


class CuttingProxy(Proxy):
    """Cuts the connection over which the next of some given numbers of bytes passes.

    Recorded is what left the client, forwarded or not, and what reached the client.

    Attributes:
        cuts: connections cut so far.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._lock = threading.Lock()
        self._limits: dict[bool, list[int]] = {True: [], False: []}
        self._passed = {True: 0, False: 0}
        self._stay_away = False
        self.cuts = 0
        super().__init__(target)

    def cut_upward(self, *num_bytes: int, stay_away: bool = False) -> None:
        """Cut after so many bytes to the server from now on, over all connections together.

        Args:
            stay_away: refuse every connection after the last cut.
        """
        self._arm(True, num_bytes, stay_away)

    def cut_downward(self, *num_bytes: int, stay_away: bool = False) -> None:
        """As :meth:`cut_upward`, for bytes to the client."""
        self._arm(False, num_bytes, stay_away)

    def _arm(self, upward: bool, num_bytes: tuple[int, ...], stay_away: bool) -> None:
        with self._lock:
            self._limits[upward] = sorted(num_bytes)
            self._passed[upward] = 0
            self._stay_away = stay_away

    def _allowed(self, upward: bool, length: int) -> int:
        """How many of the next ``length`` bytes may pass; fewer means: then cut."""
        with self._lock:
            limits, passed = self._limits[upward], self._passed[upward]
            if not limits or limits[0] > passed + length:
                self._passed[upward] += length
                return length
            kept = limits.pop(0) - passed
            self._passed[upward] += kept
            self.cuts += 1
            if self._stay_away and not limits:
                self.refuse = True
            return kept if kept < length else length - 1

    def _forwarded(self, data: bytes, record: bytearray, number: int, upward: bool) -> bytes:
        allowed = self._allowed(upward, len(data))
        record += data if upward else data[:allowed]
        return data[:allowed]


@contextmanager
def cutting_proxy(address: str) -> Iterator[CuttingProxy]:
    """A cutting proxy in front of ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    proxy = CuttingProxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()
