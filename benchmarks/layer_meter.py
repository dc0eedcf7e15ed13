"""Seconds, bytes and rounds of one party of ``private_layers.py``, by operation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from layer_costs import PRODUCTS
from secure_channel import Peer

from otpipe.secure import Share, Step
from otpipe.secure.decoder import AttentionProducts
from otpipe.secure.operations import SecureOperations

Figures = dict[str, float]


class Meter:
    """Adds up seconds, processor seconds, waiting, bytes and rounds of one party, by name.

    What is counted inside a block that is counted is left out of the outer one.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._apart: Figures = {}
        self.totals: dict[str, Figures] = {}

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Count the block; the device is idle at both ends."""
        before, outer = self._now(), self._apart
        inner = self._apart = dict.fromkeys(before, 0.0)
        yield
        total = self.totals.setdefault(name, dict.fromkeys(before, 0.0))
        for key, value in self._now().items():
            taken = value - before[key]
            total[key] += taken - inner[key]
            outer[key] = outer.get(key, 0.0) + taken
        self._apart = outer

    def measure(self, name: str, operation: Step[Share]) -> Step[Share]:
        """Count an operation of the program; see ``private_program.Runner``."""
        with self.count(name):
            return (yield from operation)

    def _now(self) -> Figures:
        self._peer.wait_for_device()
        channel = self._peer.channel
        return {
            "seconds": time.perf_counter(),
            "cpu_s": time.process_time(),
            "waited_s": channel.waited_s,
            "sent_bytes": sum(channel.sent_bytes.values()),
            "rounds": channel.rounds,
        }


class CountedProducts:
    """Attention's products with their local work counted apart; their messages count outside.

    The context's round is one with other transfers, whose time cannot be told from its own.
    """

    def __init__(self, products: AttentionProducts, meter: Meter) -> None:
        self._products, self._meter = products, meter

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``decoder.AttentionProducts``."""
        return self._local(self._products.scores(ops, layer, q_KRD, keys_KPD, bits))

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``decoder.AttentionProducts``."""
        return self._local(self._products.context(ops, layer, weights_KRP, values_KPD, bits))

    def _local(self, step: Step[Share]) -> Step[Share]:
        answers: list[Any] | None = None
        while True:
            with self._meter.count(PRODUCTS):
                try:
                    requests = next(step) if answers is None else step.send(answers)
                except StopIteration as stop:
                    result: Share = stop.value
                    return result
            answers = yield requests
