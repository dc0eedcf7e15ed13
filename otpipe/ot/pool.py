"""COTs made ahead of time, taken in the order in which they were made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from otpipe.errors import ParameterError
from otpipe.ot.params import OtParams

A = TypeVar("A")


class CotPool(Generic[A]):
    """First in, first out. A block is a tuple of arrays of one length (keys, choices, ...).

    COTs are numbered from 0 over the whole session; a number is handed out once.
    """

    def __init__(self, params: OtParams, join: Callable[[Sequence[A]], A]) -> None:
        """``join`` concatenates arrays of the kind that blocks hold."""
        self._limit = params.max_cots
        self._join = join
        self._blocks: deque[tuple[A, ...]] = deque()
        self._used_of_first = 0
        self.num_made = 0
        self.num_taken = 0

    @property
    def available(self) -> int:
        """COTs that can be taken."""
        return self.num_made - self.num_taken

    def check_room(self, count: int) -> None:
        """Refuse to make more than the session may have.

        Raises:
            ParameterError: the session would pass its limit.
        """
        if self.num_made + count > self._limit:
            raise ParameterError(
                f"This OT session would pass its limit of {self._limit} transfers; "
                f"open a new connection, which has new keys."
            )

    def put(self, block: tuple[A, ...], count: int) -> None:
        """Add a block of ``count`` COTs."""
        self._blocks.append(block)
        self.num_made += count

    def take(self, count: int) -> tuple[int, tuple[A, ...]]:
        """Number of the first of ``count`` COTs, and their arrays; there must be so many."""
        assert 0 < count <= self.available
        first = self.num_taken
        self.num_taken += count
        parts: list[tuple[A, ...]] = []
        while count > 0:
            block = self._blocks[0]
            size = len(block[0])  # type: ignore[arg-type]
            stop = min(size, self._used_of_first + count)
            parts.append(tuple(a[self._used_of_first : stop] for a in block))  # type: ignore[index]
            count -= stop - self._used_of_first
            self._used_of_first = stop
            if stop == size:
                self._blocks.popleft()
                self._used_of_first = 0
        if len(parts) == 1:
            return first, parts[0]
        return first, tuple(self._join(arrays) for arrays in zip(*parts, strict=True))
