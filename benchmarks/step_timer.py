"""Where the threads of a pass spend their time, by wrapping the steps of the client.

Only the steps of :data:`STEPS` are wrapped, none of which contains another one, so that their times
add up; those in compiled code time themselves. What remains of a thread's time is Python between
them, and a thread's rest when its chunks are done.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional

from otpipe.client import chunk_executor, chunk_steps, row_exchange, row_streams, store_rows
from otpipe.client.store_lease import SlotLease
from otpipe.protocol.wire import FrameConnection

STEPS: dict[str, tuple[Any, str]] = {
    "corrections, next pads": (store_rows.SpanReader, "advance"),
    "mask, send": (row_exchange, "send_masked"),
    "receive, open": (row_exchange, "receive_opened"),
    "embed: pads": (store_rows.SpanReader, "first_pads"),
    "embed: send": (FrameConnection, "send_frame"),
    "wait for the answer": (FrameConnection, "_wait"),
    "lm_head: pads": (SlotLease, "masks"),
    "lm_head: corrections": (SlotLease, "corrections"),
    "attention": (functional, "scaled_dot_product_attention"),
    "open connections": (row_streams.RowStreams, "_open"),
}
COMPILED = {
    chunk_steps.SENDING: "mask, send",
    chunk_steps.READING: "corrections, next pads",
    chunk_steps.RECEIVING: "receive, open",
    chunk_steps.ROTATE: "rotate, write keys",
    chunk_steps.WAITING: "wait for keys",
    chunk_steps.ATTEND: "attention, few positions",
    chunk_steps.NORM: "norm",
    chunk_steps.SWIGLU: "swiglu",
    chunk_steps.ADD: "add",
}
"""What compiled code times itself; how much of that was on a core it does not tell."""

RECEIVE = (FrameConnection, "receive_due")
"""Contains the wait for the first bytes; what is left of it is receiving."""


class StepTimer:
    """Sums the time of each step over all threads.

    Attributes:
        wall_s: by step, elapsed time.
        cpu_s: by step, time on a core.
    """

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
                with self._lock:
                    self.wall_s[name] += wall_s
                    self.cpu_s[name] += cpu_s

        return call

    def _compiled(self, run_steps: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return run_steps(*args)
            finally:
                (spent_ns,) = (a.spent_ns for a in args if isinstance(a, chunk_steps.ChunkTables))
                with self._lock:
                    for kind, name in COMPILED.items():
                        self.wall_s[name] += 1e-9 * spent_ns[kind]
                spent_ns[:] = 0

        return call

    @contextmanager
    def running(self) -> Iterator[StepTimer]:
        """Time everything inside."""
        wrapped = {**STEPS, "receive": RECEIVE}
        real = {name: getattr(owner, attribute) for name, (owner, attribute) in wrapped.items()}
        run_steps = chunk_executor.run_steps
        try:
            chunk_executor.run_steps = self._compiled(run_steps)
            for name, (owner, attribute) in wrapped.items():
                setattr(owner, attribute, self._timed(name, real[name]))
            yield self
        finally:
            chunk_executor.run_steps = run_steps
            for name, (owner, attribute) in wrapped.items():
                setattr(owner, attribute, real[name])
            for times in (self.wall_s, self.cpu_s):
                times["receive"] -= times["wait for the answer"]
