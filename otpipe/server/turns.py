"""A limited number of places, taken in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

POLL_S = 0.5
"""How often somebody who waits is looked after."""


class Turns:
    """``places`` at a time; further ones wait in line, and who has left is taken out of it."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._places = places
        self._line: deque[threading.Event] = deque()

    @property
    def free(self) -> int:
        """Places that nobody holds."""
        return self._free

    @property
    def waiting(self) -> int:
        """Length of the line."""
        return len(self._line)

    def take(self, has_left: Callable[[], bool]) -> bool:
        """Wait for a place and hold it.

        Args:
            has_left: whether the one who waits is gone; asked twice a second.

        Returns:
            False if it is gone: then it holds no place.
        """
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Event()
            self._line.append(turn)
        while not turn.wait(POLL_S):
            if has_left():
                with self._lock:
                    if not turn.is_set():
                        self._line.remove(turn)
                        return False
                self.give_back()  # its turn came just now
                return False
        return True

    def give_back(self) -> None:
        """Leave a place to the first in line."""
        with self._lock:
            if self._line:
                self._line.popleft().set()
                return
            assert self._free < self._places, "a place was given back twice"
            self._free += 1
