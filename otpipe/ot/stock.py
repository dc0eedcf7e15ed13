"""COTs made before a pass of a program, so that it does not stop to make some in every round.

How many a pass takes, both parties see from the pass before: no message is needed to agree, and the
two never differ as long as they run the same passes. What is missing in the end is made when it is
asked for, as ever.
"""

from __future__ import annotations

from typing import Protocol

MAX_STOCK_COTS = 1 << 24
"""COTs of a session in stock: 256 MiB at the sender, 272 MiB at the receiver. Both parties' limit
must be the same."""

_MARGIN = 32
"""One part in so many more than the last pass took: a longer text takes more."""


class Session(Protocol):
    """``OtSender`` or ``OtReceiver``."""

    @property
    def available(self) -> int:
        """COTs in the pool."""

    @property
    def taken(self) -> int:
        """COTs that calls have used so far."""

    def extend(self, count: int) -> None:
        """Add COTs to the pool."""


class Stock:
    """One party's stock of one session. Both make the same calls in the same order."""

    def __init__(self, session: Session, max_cots: int = MAX_STOCK_COTS) -> None:
        self._session, self._max_cots = session, max_cots
        self._taken_before = 0
        self._last_cots = self._last_rows = 0

    def fill(self, num_rows: int) -> None:
        """Before a pass over ``num_rows`` rows: make what the last one took for as many.

        Raises what ``extend`` raises.
        """
        if self._last_rows:
            wanted = self._last_cots * num_rows // self._last_rows
            wanted = min(wanted + wanted // _MARGIN, self._max_cots)
            self._session.extend(max(0, wanted - self._session.available))
        self._taken_before = self._session.taken

    def note(self, num_rows: int) -> None:
        """After a pass over ``num_rows`` rows."""
        self._last_cots = self._session.taken - self._taken_before
        self._last_rows = num_rows
