"""Where the threads of a pass spend their time, by wrapping the steps of the client.

Only the steps of :data:`STEPS` are wrapped, none of which contains another one, so that their times
add up. What remains of a thread's time is Python between them.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional

from otpipe.client import chunk_executor, row_exchange, row_streams, store_rows
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
    "rotate, write keys": (chunk_executor, "rotate_rows"),
    "wait for keys": (row_streams._Pass, "keys_written"),
    "attention": (functional, "scaled_dot_product_attention"),
    "attention, few positions": (chunk_executor, "attend_rows"),
    "norm": (chunk_executor, "rms_norm_rows"),
    "swiglu": (chunk_executor.ChunkExecutor, "swiglu"),
    "add": (chunk_executor.ChunkExecutor, "add"),
}
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

    @contextmanager
    def running(self) -> Iterator[StepTimer]:
        """Time everything inside."""
        wrapped = {**STEPS, "receive": RECEIVE}
        real = {name: getattr(owner, attribute) for name, (owner, attribute) in wrapped.items()}
        try:
            for name, (owner, attribute) in wrapped.items():
                setattr(owner, attribute, self._timed(name, real[name]))
            yield self
        finally:
            for name, (owner, attribute) in wrapped.items():
                setattr(owner, attribute, real[name])
            for times in (self.wall_s, self.cpu_s):
                times["receive"] -= times["wait for the answer"]
