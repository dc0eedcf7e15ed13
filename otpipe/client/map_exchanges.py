"""Preparation, either mode: the exchanges of many maps at once, each by one thread.

A thread has a connection of its own and takes one map after another, so that encryption, network,
the server's products, decryption and disk overlap. What is exchanged is the subclass's.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from otpipe.client.link import LinkOptions, ServerLink
from otpipe.errors import ConnectionLost
from otpipe.kernels.cpu import in_this_thread

MAX_TRIES_A_MAP = 5

Plan = TypeVar("Plan")


class ProgressMeter:
    """Progress of one try, which can be taken back when the try fails."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._advance(num_bytes)

    def take_back(self) -> None:
        self._advance(-self._done)
        self._done = 0


class MapExchanges(ABC, Generic[Plan]):
    """Runs the exchanges of one batch.

    Attributes:
        bytes_sent, bytes_received: on the wire, all connections; complete when :meth:`_run` ends.
    """

    def __init__(
        self, options: LinkOptions, fingerprint: str, advance: Callable[[int], None]
    ) -> None:
        """``advance``: told of bytes on the wire, and of those of a failed try as negative."""
        self._options = options
        self._fingerprint = fingerprint
        self._advance = advance
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self.bytes_sent = 0
        self.bytes_received = 0

    @abstractmethod
    def _exchange(self, link: ServerLink, plan: Plan, meter: ProgressMeter) -> None:
        """Exchange one map. Every try must draw fresh randomness, and stop on ``_failure``."""

    def _connected(self, link: ServerLink, rank: int) -> None:
        """Called with every new connection for the plans of ``rank``."""

    def _run(self, plans: Mapping[int, Sequence[Plan]], threads_a_rank: int) -> None:
        """Exchange all ``plans``, which are given by the rank that a connection is for.

        Raises the first error of a thread; the others have then stopped.
        """
        todo: dict[int, queue.SimpleQueue[Plan]] = {}
        for rank, each in plans.items():
            todo[rank] = queue.SimpleQueue()
            for plan in each:
                todo[rank].put(plan)
        threads = [
            threading.Thread(
                target=self._work, args=(rank, todo[rank]), name=f"prepare {rank}.{i}", daemon=True
            )
            for i in range(threads_a_rank)
            for rank in plans
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # join() alone would not let Ctrl-C through on all systems
                thread.join(0.2)
        if self._failure is not None:
            raise self._failure

    def _work(self, rank: int, todo: queue.SimpleQueue[Plan]) -> None:
        link: ServerLink | None = None
        try:
            link = ServerLink(self._options, self._fingerprint)
            self._connected(link, rank)
            with in_this_thread():
                while self._failure is None:
                    try:
                        plan = todo.get_nowait()
                    except queue.Empty:
                        return
                    self._exchange_with_retries(link, rank, plan)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            if link is not None:
                link.close()
                traffic = link.current_traffic()
                with self._lock:
                    self.bytes_sent += traffic.bytes_sent
                    self.bytes_received += traffic.bytes_received

    def _exchange_with_retries(self, link: ServerLink, rank: int, plan: Plan) -> None:
        for attempt in range(1, MAX_TRIES_A_MAP + 1):
            meter = ProgressMeter(self._advance)
            try:
                return self._exchange(link, plan, meter)
            except ConnectionLost as error:
                if attempt == MAX_TRIES_A_MAP:
                    raise
                meter.take_back()
                link.restore(error)
                self._connected(link, rank)
        return None
