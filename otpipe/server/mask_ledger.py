"""Which masks hide which slots: what a rank keeps of the preparation with private weights.

Every map of a client's batch has a mask key of 32 bytes, fresh for each exchange; the masks s are
expanded from it twice, for the exchange and for the one pass that uses a slot. Two answers under
one mask would tell the client c W (x - x'), so a slot is answered once: a batch has a mark that
only rises, and a pass takes slots at or above it. All of it lives in memory: when the process ends,
the slots that clients still hold for it are worthless.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.errors import ProtocolError
from otpipe.protocol.private_messages import SlotSpan

MAX_BATCHES = 4096
"""Batches that one rank remembers; beyond that it forgets the one that was not used the longest."""

MAX_INCOMPLETE = 256
"""Batches of which some maps are not exchanged yet: cheap to begin, so they have a limit of their
own and never push out those that were prepared whole."""

MAX_AGE_S = 7 * 86400.0
"""A batch that nobody has used for so long is forgotten."""


@dataclass
class _Batch:
    num_slots: int
    last_used_s: float
    next_slot: int = 0
    keys: dict[int, bytes] = field(default_factory=dict, repr=False)


class MaskLedger:
    """The batches of all clients on one rank. Thread-safe.

    Args:
        out_features: m by index, of the maps that this rank owns.
        bits: ring of the masks.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        out_features: Mapping[int, int],
        bits: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out_features = dict(out_features)
        self._bits = bits
        self._clock = clock
        self._lock = threading.Lock()
        self._batches: OrderedDict[bytes, _Batch] = OrderedDict()

    def __len__(self) -> int:
        return len(self._batches)

    def new_exchange(self, batch_id: bytes, map_index: int, num_slots: int) -> Exchange:
        """Fresh masks for one exchange of one map; they count when it is finished.

        Raises:
            ProtocolError: the batch has another size, or its slots are in use already.
        """
        with self._lock:
            batch = self._batches.get(batch_id)
            if batch is not None:
                _check_unused(batch, num_slots)
        key = fresh_mask_key()
        stream = MaskStream(key, map_index, self._out_features[map_index], self._bits)
        return Exchange(batch_id, map_index, num_slots, key, stream)

    def finish(self, exchange: Exchange) -> None:
        """Remember the masks of an exchange whose answers have left; an earlier try's are dropped.

        Raises:
            ProtocolError: as :meth:`new_exchange`.
        """
        now_s = self._clock()
        with self._lock:
            batch = self._batches.setdefault(exchange.batch_id, _Batch(exchange.num_slots, now_s))
            _check_unused(batch, exchange.num_slots)
            batch.keys[exchange.map_index] = exchange.key
            self._touch(exchange.batch_id, batch, now_s)
            self._limit_incomplete()
            self._make_room(now_s)

    def draw(self, spans: Sequence[SlotSpan]) -> PassMasks:
        """The masks of a pass over these slots, which are answered from now on.

        Raises:
            ProtocolError: a batch is unknown or incomplete, or a slot was answered before.
        """
        parts = []
        now_s = self._clock()
        with self._lock:
            for span in spans:
                batch = self._batches.get(span.batch)
                if batch is None or not self._complete(batch):
                    raise ProtocolError(
                        "this server does not hold the masks of these slots: it was restarted, or "
                        "forgot them after a long time; prepare new slots"
                    )
                stop = span.first_slot + span.num_slots
                if span.first_slot < batch.next_slot or stop > batch.num_slots:
                    raise ProtocolError(
                        f"slots {span.first_slot} to {stop - 1} were asked for where "
                        f"{batch.next_slot} to {batch.num_slots - 1} are left: a slot is answered "
                        "once; prepare new slots"
                    )
                batch.next_slot = stop
                self._touch(span.batch, batch, now_s)
                parts.append((dict(batch.keys), span.first_slot, span.num_slots))
                if stop == batch.num_slots:
                    del self._batches[span.batch]
        return PassMasks(parts, self._out_features, self._bits)

    def _touch(self, batch_id: bytes, batch: _Batch, now_s: float) -> None:
        batch.last_used_s = now_s
        self._batches.move_to_end(batch_id)

    def _make_room(self, now_s: float) -> None:
        """Forget what is too old, and what is too much."""
        while self._batches:
            oldest_id, oldest = next(iter(self._batches.items()))
            if len(self._batches) <= MAX_BATCHES and now_s - oldest.last_used_s < MAX_AGE_S:
                return
            del self._batches[oldest_id]

    def _limit_incomplete(self) -> None:
        """Forget the incomplete batches that nobody has gone on with for the longest."""
        incomplete = [i for i, batch in self._batches.items() if not self._complete(batch)]
        for batch_id in incomplete[: max(0, len(incomplete) - MAX_INCOMPLETE)]:
            del self._batches[batch_id]

    def _complete(self, batch: _Batch) -> bool:
        return batch.keys.keys() == self._out_features.keys()


@dataclass(frozen=True)
class Exchange:
    """The masks of one exchange under way. ``stream`` hides its answers."""

    batch_id: bytes
    map_index: int
    num_slots: int
    key: bytes = field(repr=False)
    stream: MaskStream = field(repr=False)


class PassMasks:
    """See :class:`otpipe.model.private_maps.Masks`; row i of the pass is its i-th slot."""

    def __init__(
        self,
        parts: Sequence[tuple[Mapping[int, bytes], int, int]],
        out_features: Mapping[int, int],
        bits: int,
    ) -> None:
        """``parts``: mask keys by map, first slot and number of slots of each run of rows."""
        self._parts = tuple(parts)
        self._out_features = out_features
        self._bits = bits
        num_rows = sum(count for _, _, count in parts)
        self._taken = {index: bytearray(num_rows) for index in out_features}

    def take(self, index: int, first_row: int, count: int) -> Tensor:
        """Masks s (count, m) of consecutive rows: int64 on the CPU, in [0, 2^bits).

        Raises:
            ProtocolError: a row of this map was taken before, or there is no such row.
        """
        taken, stop = self._taken[index], first_row + count
        if first_row < 0 or stop > len(taken) or any(taken[first_row:stop]):
            raise ProtocolError(
                f"rows {first_row} to {stop - 1} of map {index} are not left in a pass of "
                f"{len(taken)}: a slot is answered once"
            )
        taken[first_row:stop] = b"\x01" * count
        pieces, begin = [], 0
        for keys, first_slot, num_slots in self._parts:
            lo, hi = max(first_row, begin), min(stop, begin + num_slots)
            if lo < hi:
                stream = MaskStream(keys[index], index, self._out_features[index], self._bits)
                pieces.append(stream.rows(first_slot + lo - begin, hi - lo))
            begin += num_slots
        return torch.from_numpy(np.concatenate(pieces))


def _check_unused(batch: _Batch, num_slots: int) -> None:
    if batch.num_slots != num_slots or batch.next_slot:
        raise ProtocolError(
            f"an exchange of {num_slots} slots came for a batch of {batch.num_slots} of which "
            f"{batch.next_slot} are used; begin a new batch"
        )
