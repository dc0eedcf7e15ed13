"""One generation: its tokens, why it ended, and what it cost."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from otpipe.client.mode import AHEAD, Mode

FinishReason = Literal["stop", "length", "connection_lost"]


@dataclass
class GenerationStats:
    """Figures of one generation, online phase only: what was prepared ahead of a token is apart.

    Attributes:
        tokens_per_s: generated tokens after the first, over the time they took.
        bytes_sent, bytes_received: on the wire, from the first masked row to the last.
        round_trips: requests answered.
        slots_used: slots spent, one a token position.
        prepare_s: time spent on preparations inside this call: slots, and with private weights what
            ``operations`` names as done ahead, with its bytes and rounds.
        prefill_s: time from the first masked row to the first token.
    """

    tokens_per_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    round_trips: int = 0
    slots_used: int = 0
    prepare_s: float = 0.0
    prefill_s: float = 0.0


@dataclass
class Generation:
    """Everything about one generation; grows while it runs."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: FinishReason | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    operations: dict[str, dict[str, float]] = field(default_factory=dict)
    """With private weights: seconds, bytes and rounds by operation of the program."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, as ``otpipe generate --json`` prints them."""
        values = asdict(self)
        return values if self.operations else {k: values[k] for k in values if k != "operations"}


@dataclass
class Text:
    """A text as the model knows it.

    Attributes:
        cache: keys and values of its tokens, in the mode's own representation.
        token_ids: those in the cache.
    """

    cache: Any
    token_ids: list[int] = field(default_factory=list)


class OnlineMeter:
    """Fills in the figures of a generation as it goes."""

    def __init__(self, mode: Mode, generation: Generation) -> None:
        self._mode = mode
        self._generation = generation
        self._stats = generation.stats
        self._traffic = mode.current_traffic()
        self._round_trips = mode.round_trips
        self._slots_used = mode.slots_used
        self._operations = mode.operations()
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._tokens = 0

    def token_done(self) -> None:
        now_s = time.monotonic() - self._ahead("seconds")
        self._tokens += 1
        if self._first_token_s is None:
            self._first_token_s = now_s
            self._stats.prefill_s = now_s - self._started_s
        else:
            self._stats.tokens_per_s = (self._tokens - 1) / (now_s - self._first_token_s)

    def stop(self) -> None:
        traffic = self._mode.current_traffic()
        for name, totals in self._mode.operations().items():
            self._generation.operations[name] = self._since(name, totals)
        sent = traffic.bytes_sent - self._traffic.bytes_sent
        received = traffic.bytes_received - self._traffic.bytes_received
        rounds = self._mode.round_trips - self._round_trips
        self._stats.bytes_sent = sent - int(self._ahead("bytes_sent"))
        self._stats.bytes_received = received - int(self._ahead("bytes_received"))
        self._stats.round_trips = rounds - int(self._ahead("rounds"))
        self._stats.slots_used = self._mode.slots_used - self._slots_used
        self._stats.prepare_s += self._ahead("seconds")

    def _since(self, name: str, totals: dict[str, float]) -> dict[str, float]:
        before = self._operations.get(name, {})
        return {key: value - before.get(key, 0) for key, value in totals.items()}

    def _ahead(self, key: str) -> float:
        """Of what was done ahead since this began."""
        operations = self._mode.operations()
        return sum(
            self._since(name, totals)[key]
            for name, totals in operations.items()
            if name.endswith(AHEAD)
        )
