"""Public weights: the client evaluates everything but the linear maps, in the clear."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from otpipe.client.bundle_cache import check_name, load_bundle_bytes
from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.masked_executor import MaskedExecutor
from otpipe.client.preparation import PreparationReport, Progress, prepare_slots
from otpipe.client.row_executor import RowExecutor
from otpipe.client.row_streams import RowStreams
from otpipe.client.store import MapShape, PadStore, SlotDamaged
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache
from otpipe.model.program import LogitsFor, forward
from otpipe.protocol.wire import Traffic

log = logging.getLogger("otpipe.client")

MAX_DAMAGED_PASSES = 3
"""Passes that may fail on damaged slots before the client gives up."""


class PublicMode:
    """See :class:`otpipe.client.mode.Mode`."""

    prefill_rows = 512
    batch_slots = 2048

    def __init__(self, link: ServerLink, options: LinkOptions, root: Path) -> None:
        """``root``: directory of pads and model descriptions."""
        self._link = link
        self._options = options
        self.bundle = ModelBundle.from_bytes(load_bundle_bytes(link, root / "models"))
        check_name(link.welcome.fingerprint, self.bundle.fingerprint)
        self.spec = self.bundle.spec
        self.fingerprint = self.bundle.fingerprint
        self.files: Mapping[str, bytes] = self.bundle.files
        self.max_positions = self.spec.max_positions
        shapes = tuple(
            MapShape(m.index, m.in_features, m.out_features, m.ring_bytes) for m in self.spec.maps
        )
        self.store = PadStore.open(
            root / "pads",
            self.fingerprint,
            shapes,
            on_warning=lambda problem: log.warning("%s", problem),
        )
        self.executor = MaskedExecutor(self.bundle, self.store, link)
        self.row_executor = RowExecutor(self.bundle, self.store, link)
        self._streams = RowStreams(self.bundle, self.store, link, options, self.executor)

    def new_cache(self) -> KVCache:
        """See ``Mode``."""
        return self.executor.new_cache()

    def expect(self, cache: KVCache, num_positions: int, progress: Progress | None) -> None:
        """See ``Mode``: a text takes nothing but its slots."""

    def forward(self, token_ids: Sequence[int], cache: KVCache, wanted: LogitsFor) -> Tensor | None:
        """See ``Mode``; repeated on fresh slots where the disk lost a correction."""
        for _ in range(MAX_DAMAGED_PASSES):
            try:
                return self._pass(list(token_ids), cache, wanted)
            except SlotDamaged as error:
                log.warning("%s; repeating the pass with other slots", error)
        return self._pass(list(token_ids), cache, wanted)

    def _pass(self, token_ids: list[int], cache: KVCache, wanted: LogitsFor) -> Tensor | None:
        if len(token_ids) > 1:
            return self._streams.forward(token_ids, cache, wanted)
        logits = forward(self.row_executor, token_ids, cache, wanted)
        return None if logits is None else torch.from_numpy(logits)

    def prepare(self, num_slots: int, progress: Progress | None) -> PreparationReport:
        """See ``Mode``."""
        return prepare_slots(self.store, self.bundle, self._options, num_slots, progress)

    @property
    def slots_used(self) -> int:
        """See ``Mode``."""
        return self.executor.slots_used + self.row_executor.slots_used

    @property
    def round_trips(self) -> int:
        """See ``Mode``."""
        return self._link.round_trips

    def current_traffic(self) -> Traffic:
        """See ``Mode``."""
        return self._link.current_traffic()

    def operations(self) -> dict[str, dict[str, float]]:
        """See ``Mode``."""
        return {}

    def costs(self) -> dict[str, int]:
        """See ``Mode``."""
        up = sum(m.in_features * m.ring_bytes for m in self.spec.maps)
        down = sum(m.out_features * m.ring_bytes for m in self.spec.maps)
        return {
            "bytes_up_a_token": up,
            "bytes_down_a_token": down,
            "round_trips_a_token": len(self.spec.maps),
            "store_bytes_a_slot": down,
        }

    def close(self) -> None:
        """See ``Mode``."""
        self._link.close()
        self.store.close()
