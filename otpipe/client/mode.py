"""What :class:`otpipe.client.client.Client` needs of a mode, public or private weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from otpipe.client.preparation import PreparationReport, Progress
from otpipe.client.store import PadStore
from otpipe.model.program import LogitsFor
from otpipe.model.spec import ModelSpec
from otpipe.protocol.wire import Traffic

if TYPE_CHECKING:
    from otpipe.model.bundle import ModelBundle
    from otpipe.model.private_bundle import PrivateBundle


AHEAD = ", ahead"
"""Ends the name of an operation that is done before the tokens it is for, and counted apart."""


class Mode(Protocol):
    """One model at one server, and this client's slots for it.

    Attributes:
        spec: sizes of the model.
        fingerprint: what slots are bound to, 64 hex digits.
        files: tokenizer and generation files.
        store: the slots.
        prefill_rows: prompt positions that go through the model at once.
        batch_slots: slots that are prepared when they run out.
        max_positions: tokens of the longest text.
    """

    @property
    def bundle(self) -> ModelBundle | PrivateBundle:
        """The server's public description."""

    spec: ModelSpec
    fingerprint: str
    files: Mapping[str, bytes]
    store: PadStore
    prefill_rows: int
    batch_slots: int
    max_positions: int

    def new_cache(self) -> Any:
        """An empty cache: the beginning of a text."""

    def expect(self, cache: Any, num_positions: int, progress: Progress | None) -> None:
        """Be told how long a text is to become, and prepare what its next pass takes.

        Optional. Needs no tokens: the text may be empty.
        """

    def forward(self, token_ids: Sequence[int], cache: Any, wanted: LogitsFor) -> Tensor | None:
        """One pass over the next tokens of a text: float32 (rows, vocab), or None for "none"."""

    def prepare(self, num_slots: int, progress: Progress | None) -> PreparationReport:
        """Prepare at least ``num_slots`` more slots."""

    @property
    def slots_used(self) -> int:
        """Slots drawn so far."""

    @property
    def round_trips(self) -> int:
        """How often this client waited for the server so far, in passes."""

    def current_traffic(self) -> Traffic:
        """Bytes and frames of passes so far."""

    def operations(self) -> dict[str, dict[str, float]]:
        """Seconds, bytes and rounds of passes so far, by operation of the program; may be empty.

        What was done ahead of the tokens has a name that ends in :data:`AHEAD`.
        """

    def costs(self) -> dict[str, int]:
        """What a token and a slot cost, as ``otpipe info`` prints it."""

    def close(self) -> None:
        """Leave the server and unlock the store. Safe to call twice."""
