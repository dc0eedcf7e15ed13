"""Private weights: the client holds its share of everything, and learns its logits alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from otpipe.client.bundle_cache import check_name, load_bundle_bytes
from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.preparation import PreparationReport, Progress
from otpipe.client.private_pads import RING_BYTES, map_shapes
from otpipe.client.private_preparation import (
    MAX_BATCH_SLOTS,
    prepare_private_slots,
    wire_bytes_a_slot,
)
from otpipe.client.private_session import PrivateSession
from otpipe.client.store import PadStore
from otpipe.errors import ConnectionLost, UsageError
from otpipe.model.private_bundle import PrivateBundle
from otpipe.model.private_program import PrivateProgram
from otpipe.model.program import LogitsFor, check_tokens
from otpipe.pipeline.placement import Placement
from otpipe.protocol.wire import Traffic
from otpipe.secure.decoder import ShareCache

log = logging.getLogger("otpipe.client")


class PrivateMode:
    """See :class:`otpipe.client.mode.Mode`.

    A session with the ranks is opened for the first text and kept for those that follow. It holds
    one text at a time, since the ranks have their shares of one; it cannot be resumed.
    """

    prefill_rows = 128
    batch_slots = 256

    def __init__(self, link: ServerLink, options: LinkOptions, root: Path) -> None:
        """``root``: directory of pads and model descriptions."""
        self._link = link
        self._options = options
        self.bundle = PrivateBundle.from_bytes(load_bundle_bytes(link, root / "models"))
        check_name(link.welcome.fingerprint, self.bundle.fingerprint)
        self.spec = self.bundle.spec
        self.fingerprint = self.bundle.fingerprint
        self.files: Mapping[str, bytes] = self.bundle.files
        self._program = PrivateProgram(self.bundle.description)
        self.max_positions = self._program.product_blocks.max_text
        self._placement = Placement.for_model(self.spec, link.welcome.num_ranks)
        self.store = PadStore.open(
            root / "pads",
            self.fingerprint,
            map_shapes(self.bundle.description),
            on_warning=lambda problem: log.warning("%s", problem),
        )
        self._session: PrivateSession | None = None
        self._text: ShareCache | None = None
        self._expected = 0  # positions of that text, if that is known
        self._progress: Progress | None = None
        self._past_traffic = Traffic()
        self._past_rounds = 0
        self._past_operations: dict[str, dict[str, float]] = {}
        self.slots_used = 0

    def new_cache(self) -> ShareCache:
        """See ``Mode``."""
        return self._program.new_cache()

    def expect(self, cache: ShareCache, num_positions: int, progress: Progress | None) -> None:
        """See ``Mode``: attention products are prepared, in blocks, between the passes of a text.

        Raises:
            UsageError: more positions than the model has, or another text was begun.
            ConnectionLost: the session has ended, and with it the shares of the text so far.
        """
        self._check_length(num_positions)
        session = self._session_for(cache, num_positions)
        self._expected, self._progress = num_positions, progress
        needed = min(num_positions, cache.length + self.prefill_rows)
        session.make_ready(cache.length, needed, num_positions, progress)

    def forward(
        self, token_ids: Sequence[int], cache: ShareCache, wanted: LogitsFor
    ) -> Tensor | None:
        """See ``Mode``.

        Raises:
            UsageError: tokens or positions that the model does not have, or another text was begun.
            ConnectionLost: the session has ended, and with it the shares of the text so far.
            StoreError: no slots, or a damaged one.
        """
        check_tokens(self.spec, token_ids, cache.length)
        needed = cache.length + len(token_ids)
        self._check_length(needed)
        session = self._session_for(cache, needed)
        session.make_ready(cache.length, needed, self._expected, self._progress)
        with self.store.draw(len(token_ids)) as lease:
            self.slots_used += len(token_ids)
            return session.forward(token_ids, cache, wanted, lease)

    def _check_length(self, num_positions: int) -> None:
        if not 1 <= num_positions <= self.max_positions:
            raise UsageError(
                f"a text of {num_positions} tokens was asked for; with the private weights of this "
                f"model it has 1 to {self.max_positions}: shorten the prompt or generate fewer"
            )

    def _session_for(self, cache: ShareCache, num_positions: int) -> PrivateSession:
        """The session that holds this text; a new one for a new text, if need be."""
        alive = self._session is not None and self._session.alive
        if cache.length:
            if cache is not self._text:
                raise UsageError(
                    "another text was begun on this client; with private weights a client has one "
                    "text at a time, use a second Client for a second one"
                )
            if not alive:
                raise ConnectionLost(
                    "the session with the server has ended, and with it the server's shares of "
                    "this text; generate again"
                )
        elif not alive or not self._session_has_room(num_positions):
            self._leave()
            self._session = PrivateSession(
                self._options, self.fingerprint, self._program, self._placement
            )
        if cache is not self._text:
            self._text, self._expected = cache, 0
        assert self._session is not None
        return self._session

    def _session_has_room(self, num_positions: int) -> bool:
        return self._session is not None and self._session.has_room_for(num_positions)

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._past_traffic = self.current_traffic()
            self._past_rounds = self.round_trips
            self._past_operations = self.operations()
            self._session = None

    def prepare(self, num_slots: int, progress: Progress | None) -> PreparationReport:
        """See ``Mode``."""
        return prepare_private_slots(
            self.store,
            self.bundle.description,
            self._placement,
            self._options,
            self.fingerprint,
            num_slots,
            progress,
        )

    @property
    def round_trips(self) -> int:
        """See ``Mode``."""
        return self._past_rounds + (self._session.rounds if self._session else 0)

    def current_traffic(self) -> Traffic:
        """See ``Mode``."""
        past = self._past_traffic
        live = self._session.current_traffic() if self._session else Traffic()
        return Traffic(
            past.bytes_sent + live.bytes_sent,
            past.bytes_received + live.bytes_received,
            past.frames_sent + live.frames_sent,
            past.frames_received + live.frames_received,
        )

    def operations(self) -> dict[str, dict[str, float]]:
        """See ``Mode``. "turn" is the wait for it, "logits" what is left, their opening mostly."""
        totals = {name: dict(values) for name, values in self._past_operations.items()}
        for name, values in (self._session.operations if self._session else {}).items():
            total = totals.setdefault(name, dict.fromkeys(values, 0))
            for key, value in values.items():
                total[key] += value
        return totals

    def costs(self) -> dict[str, int]:
        """See ``Mode``; in full batches. What oblivious transfer takes grows with the text."""
        description = self.bundle.description
        up, down = wire_bytes_a_slot(description, MAX_BATCH_SLOTS)
        return {
            "prepare_bytes_up_a_slot": up,
            "prepare_bytes_down_a_slot": down,
            "store_bytes_a_slot": RING_BYTES * sum(m.out_features for m in description.maps),
        }

    def close(self) -> None:
        """See ``Mode``."""
        self._leave()
        self._link.close()
        self.store.close()
