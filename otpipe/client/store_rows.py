"""The pads and corrections of some slots, map after map: what a pass reads, without delay.

Between a request and the answer there is less time than a few dozen Python calls take. So the
corrections of one map and the pads of the next come from one compiled call: read, checked,
expanded, into memory that the next map uses again.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from otpipe.client.store_batch import Batch
from otpipe.client.store_files import SlotDamaged
from otpipe.client.store_layout import MapShape
from otpipe.kernels.aes_native import NATIVE, encrypt_counters_256
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import DONE, read_at, system_functions

_AES_BLOCK = 16


@kernel
def read_map(
    functions: Array,
    fd: int,
    offset: int,
    octets: Array,
    correction_Tm: Array,
    weights_m: Array,
    expected_T: Array,
    round_keys: Array,
    prefix: int,
    first_block: int,
    pads: Array,
) -> bool:
    """Fill the corrections of one map from the file, and uint8 ``pads`` from a keystream.

    ``octets``: the memory of ``correction_Tm``. Returns whether the corrections were there and have
    their checksums (``store_checksum``).
    """
    if pads.shape[0] > 0:
        encrypt_counters_256(round_keys, prefix, first_block, 0, pads.shape[0] // 16, pads)
    if read_at(functions, fd, offset, octets) != DONE:
        return False
    for t in range(correction_Tm.shape[0]):
        row, total = correction_Tm[t], np.uint64(0)
        for j in range(row.shape[0]):
            total += np.uint64(row[j]) * np.uint64(weights_m[j])
        if total != expected_T[t]:
            return False
    return True


class SpanTables(NamedTuple):
    """What :func:`read_map` takes, of all maps of a span of T slots; M maps.

    Attributes:
        fd: descriptor of the file of corrections.
        first_slot: of the span.
        offsets, prefixes, round_keys, weights: as of ``RegionTables``.
        expected: uint64 (M, T).
        corrections, pads: uint8, memory of one map's; a map's pads are there when those of the map
            before it have been read.
        end_map: one after the last map that may be read.
    """

    fd: int
    first_slot: int
    offsets: Array
    prefixes: Array
    round_keys: Array
    weights: Array
    expected: Array
    corrections: Array
    pads: Array
    end_map: int


class RowReader(Protocol):
    """Hands out the pads and corrections of some slots: every map once, in rising order."""

    def first_pads(self) -> np.ndarray:
        """The pads (T, n) of the first map."""

    def advance(self, map_index: int) -> tuple[np.ndarray, np.ndarray]:
        """The corrections (T, m) of a map, and the pads (T, n) of the one after it.

        Maps are asked for in their order, each once. Valid until the next call; the pads are empty
        after the last map.

        Raises:
            SlotDamaged: the disk did not keep a correction.
            CounterMoved: somebody else has drawn from the store; nothing may be used.
        """


class SpanReader:
    """Consecutive slots of one batch, which the caller has claimed for good, in compiled code.

    Args:
        first_slot, count: the slots.
        first_row: number of the first one in the lease, for errors.
        num_maps: how many maps, from the first, will be read.
        check: raises where the slots may not be used any more.
    """

    def __init__(
        self,
        batch: Batch,
        first_slot: int,
        count: int,
        first_row: int,
        num_maps: int,
        check: Callable[[], None],
    ) -> None:
        self._batch, self._first_slot, self._count = batch, first_slot, count
        self._first_row, self._check = first_row, check
        self._regions = batch.regions[:num_maps]
        self._next = 0
        self._begun = False
        self._expected: np.ndarray | None = None
        shapes = [region.shape for region in self._regions]
        self._pads = np.empty(count * max(s.pad_stride for s in shapes), np.uint8)
        self._corrections = np.empty(count * max(s.correction_bytes for s in shapes), np.uint8)

    @staticmethod
    def possible() -> bool:
        """Whether this machine has AES instructions."""
        return NATIVE

    def first_pads(self) -> np.ndarray:
        """See :class:`RowReader`."""
        self._check()
        assert not self._begun, "pads are given out once"
        self._begun = True
        region = self._regions[0]
        return self._batch.pads(region.shape.index, self._first_slot, self._count)

    def tables(self) -> SpanTables | None:
        """For code that reads maps by itself, from the next one on, and then says :meth:`skip_to`.

        None where the batch has no tables. Raises as :meth:`advance`.
        """
        self._check()
        self._batch.require_sole_use()
        assert self._begun, "the first pads are given out by themselves"
        tables, first = self._batch.tables(), self._first_slot
        if tables is None:
            return None
        if self._expected is None:
            self._expected = tables.expected[:, first : first + self._count].copy()
        return SpanTables(
            self._batch.corrections_fd,
            first,
            tables.offsets,
            tables.prefixes,
            tables.round_keys,
            tables.weights,
            self._expected,
            self._corrections,
            self._pads,
            len(self._regions),
        )

    def skip_to(self, map_index: int) -> None:
        """The maps before this one have been read."""
        assert self._next <= map_index <= len(self._regions), "maps are read in rising order"
        self._next = map_index

    def advance(self, map_index: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`RowReader`."""
        self._check()
        self._batch.require_sole_use()
        region = source = self._regions[self._next]
        assert region.shape.index == map_index, "every map is read once, in their order"
        self._next += 1
        shape, slot, count = region.shape, self._first_slot, self._count
        octets = self._corrections[: count * shape.correction_bytes]
        correction_Tm = octets.view(shape.dtype).reshape(count, shape.out_features)
        pads = self._pads[:0]
        if self._next < len(self._regions):
            source = self._regions[self._next]
            pads = self._pads[: count * source.shape.pad_stride]
        stream = source.pads.stream
        good = read_map(
            system_functions(),
            self._batch.corrections_fd,
            region.offset + slot * shape.correction_bytes,
            octets,
            correction_Tm,
            region.weights,
            region.expected[slot : slot + count],
            stream.round_keys,
            stream.prefix,
            slot * source.shape.pad_stride // _AES_BLOCK,
            pads,
        )
        if not good:  # again, by the path that says what is wrong
            correction_Tm = self._again(region.shape)
        if not pads.size:
            return correction_Tm, pads
        used = pads.reshape(count, -1)[:, : source.shape.pad_bytes]
        return correction_Tm, np.ascontiguousarray(used).view(source.shape.dtype)

    def _again(self, shape: MapShape) -> np.ndarray:
        try:
            return self._batch.corrections(shape.index, self._first_slot, self._count)
        except SlotDamaged as error:
            error.row += self._first_row
            raise


class CallReader:
    """Any slots, call by call: without AES instructions, or where slots come from two batches."""

    def __init__(
        self,
        shapes: Sequence[MapShape],
        masks: Callable[[int], np.ndarray],
        corrections: Callable[[int], np.ndarray],
    ) -> None:
        self._shapes, self._masks, self._corrections = shapes, masks, corrections
        self._next = 0

    def first_pads(self) -> np.ndarray:
        """See :class:`RowReader`."""
        return self._masks(self._shapes[0].index)

    def advance(self, map_index: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`RowReader`."""
        assert self._shapes[self._next].index == map_index, "maps are read in their order"
        correction_Tm = self._corrections(map_index)
        self._next += 1
        if self._next == len(self._shapes):
            return correction_Tm, np.empty((0, 0), np.uint8)
        return correction_Tm, self._masks(self._shapes[self._next].index)
