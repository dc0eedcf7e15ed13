"""Seconds, bytes and rounds of the operations of a session, by name."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from otpipe.protocol.wire import Traffic
from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share


class OperationMeter:
    """Adds up what operations take; what happens inside one that is counted apart is left out."""

    def __init__(
        self,
        totals: defaultdict[str, dict[str, float]],
        traffic: Callable[[], Traffic],
        rounds: Callable[[], int],
    ) -> None:
        self._totals, self._traffic, self._rounds = totals, traffic, rounds
        self._apart: dict[str, float] = {}

    def measure(self, name: str, operation: Step[Share]) -> Step[Share]:
        """Run one operation of the program; see ``Runner``."""
        with self.count(name):
            return (yield from operation)

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Count the block under a name."""
        before, outer = self._now(), self._apart
        inner = self._apart = dict.fromkeys(before, 0.0)
        try:
            yield
        finally:
            total = self._totals[name]
            for key, value in self._now().items():
                taken = value - before[key]
                total[key] += taken - inner[key]
                outer[key] = outer.get(key, 0.0) + taken
            self._apart = outer

    def _now(self) -> dict[str, float]:
        traffic = self._traffic()
        return {
            "seconds": time.monotonic(),
            "bytes_sent": traffic.bytes_sent,
            "bytes_received": traffic.bytes_received,
            "rounds": self._rounds(),
        }
