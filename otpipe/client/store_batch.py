"""One prepared batch on disk: opening it, marking slots spent, reading pads and corrections."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from otpipe.client import store_files as files
from otpipe.client.store_checksum import first_bad_row, position_weights, row_seeds
from otpipe.client.store_counter import CounterMoved, SpentCounter
from otpipe.client.store_layout import (
    CHECKSUMS_NAME,
    CORRECTIONS_NAME,
    COUNTER_NAME,
    DAMAGED,
    KEY_NAME,
    META_NAME,
    PARTIAL,
    SPENT,
    MapShape,
    ModelLayout,
    RegionTables,
    is_fingerprint,
    parse_batch_dir,
)
from otpipe.client.store_pads import PadStream
from otpipe.errors import StoreError

_CHECKSUM_MAGIC = b"OTPSUM01"
_MAX_PREFETCH_BYTES = 256 << 20


@dataclass(frozen=True)
class BatchInfo:
    """What can be told about a batch without holding the store."""

    path: Path
    fingerprint: str
    state: str  # "ready", "partial", "spent", "damaged", "unusable"
    slots_total: int
    slots_spent: int
    num_bytes: int  # on disk
    created_ns: int  # Unix time
    problem: str = ""  # why it is damaged or unusable

    @property
    def slots_free(self) -> int:
        return self.slots_total - self.slots_spent if self.state == "ready" else 0

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.created_ns / 1e9)


def encode_checksums(batch_id: str, sums: np.ndarray) -> bytes:
    return _CHECKSUM_MAGIC + bytes.fromhex(batch_id) + sums.astype("<u8").tobytes()


class MapRegion:
    """Where one map's corrections and pads of a batch are."""

    __slots__ = ("expected", "offset", "pads", "shape", "weights")

    def __init__(
        self, shape: MapShape, offset: int, pads: PadStream, weights: np.ndarray, sums: np.ndarray
    ) -> None:
        self.shape, self.offset, self.pads = shape, offset, pads
        self.weights = weights
        self.expected = sums  # (T,) uint64, the seeds already subtracted


class Batch:
    """A committed batch, open for drawing (``writable``) or for looking only.

    A writable batch holds a lock on its counter file: on the inode that its identity is bound to,
    so that no path can be deleted or renamed to get round it.

    Raises BatchDamaged, BatchNotOurs or OSError when it cannot be used, of these BlockingIOError
    when somebody else draws from it.
    """

    def __init__(
        self, directory: Path, batch_id: str, layout: ModelLayout, writable: bool = True
    ) -> None:
        self.directory, self.batch_id, self.layout = directory, batch_id, layout
        self._corrections_fd = -1
        self._counter: SpentCounter | None = None
        self._refusal = ""  # why no pads are handed out any more
        self._regions: dict[int, MapRegion] = {}
        self._tables: RegionTables | None = None
        try:
            self._open(writable)
        except FileNotFoundError as error:
            self.close()
            raise files.BatchDamaged(
                f"{error.filename} is missing; the slots of this batch are lost, prepare new ones"
            ) from None
        except BaseException:
            self.close()
            raise

    def _open(self, writable: bool) -> None:
        path = self.directory / COUNTER_NAME
        try:
            fd = files.open_existing(path, writable)
        except FileNotFoundError:
            self._read_meta()  # a batch that is not ours need not have one
            raise
        try:
            if writable:  # before anything else: a batch that somebody uses is not judged
                files.lock_file(fd)
            meta = self._read_meta()
            files.check_identity(meta, fd, self.directory)
            self.num_slots, self.created_ns = meta.num_slots, meta.created_ns
            self._counter = SpentCounter(fd, path, self.batch_id, self.num_slots)
        except BaseException:
            os.close(fd)
            raise
        if self.free == 0:
            return  # only to be erased; its other files do not matter any more
        if writable:
            self._counter.repair()
        pad_key = files.read_key(self.directory / KEY_NAME, self.batch_id)
        self._open_corrections(pad_key)

    def _read_meta(self) -> files.BatchMeta:
        meta = files.read_meta(self.directory)
        if not files.meta_is_plausible(meta, self.batch_id):
            raise files.BatchDamaged(
                f"{self.directory / META_NAME} describes another batch; the slots of this batch "
                "are lost, prepare new ones"
            )
        if meta.layout != self.layout:
            raise files.BatchNotOurs(
                f"{self.directory} was prepared for the model {meta.layout.fingerprint} and its "
                f"{len(meta.layout.shapes)} maps, not for {self.layout.fingerprint} and "
                f"{len(self.layout.shapes)}; it is left alone, prepare new slots for this model"
            )
        return meta

    def _open_corrections(self, pad_key: bytes) -> None:
        layout, num_slots = self.layout, self.num_slots
        path = self.directory / CORRECTIONS_NAME
        self._corrections_fd = files.open_existing(path)
        size, wanted = os.fstat(self._corrections_fd).st_size, num_slots * layout.bytes_per_slot
        if size != wanted:
            raise files.BatchDamaged(
                f"{path} has {size} bytes instead of {wanted}; the slots of this batch are lost, "
                "prepare new ones"
            )
        sums = self._read_checksums()
        seeds = row_seeds(self.batch_id, tuple(s.index for s in layout.shapes), num_slots)
        expected = sums - seeds
        weights = position_weights(layout.max_out_features)
        offsets = layout.region_offsets(num_slots)
        self._regions = {
            shape.index: MapRegion(
                shape, offset, PadStream(pad_key, shape), weights[: shape.out_features], row
            )
            for shape, offset, row in zip(layout.shapes, offsets, expected, strict=True)
        }

    def _read_checksums(self) -> np.ndarray:
        path = self.directory / CHECKSUMS_NAME
        data = path.read_bytes()
        head = _CHECKSUM_MAGIC + bytes.fromhex(self.batch_id)
        shape = (len(self.layout.shapes), self.num_slots)
        if data[: len(head)] != head or len(data) != len(head) + 8 * shape[0] * shape[1]:
            raise files.BatchDamaged(
                f"{path} is damaged; the slots of this batch are lost, prepare new ones"
            )
        return np.frombuffer(data, "<u8", offset=len(head)).reshape(shape)

    @property
    def free(self) -> int:
        return self.num_slots - self.spent

    @property
    def spent(self) -> int:
        assert self._counter is not None
        return self._counter.spent

    def spend(self, count: int) -> int:
        """Mark the next ``count`` slots spent, durably; returns the first.

        Raises StoreError when the disk does not confirm it, and CounterMoved when somebody else
        changed the counter: then this batch hands out nothing any more, not even pads of slots
        drawn before, since nobody knows who else has them.
        """
        assert self._counter is not None
        assert count <= self.free
        first = self._counter.spent
        try:
            self._counter.advance(first + count)
        except CounterMoved as error:
            self._refusal = str(error)
            raise
        except OSError as error:
            raise StoreError(
                f"cannot record spent slots in {self.directory / COUNTER_NAME} ({error}); the "
                f"{count} slots are given up unused, check the disk and try again"
            ) from error
        self._prefetch(first, count)
        return first

    def _prefetch(self, first: int, count: int) -> None:
        """Ask the kernel for the corrections of these slots before they are wanted."""
        if count * self.layout.bytes_per_slot > _MAX_PREFETCH_BYTES:
            return
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for region in self._regions.values():
            row_bytes = region.shape.correction_bytes
            start = region.offset + first * row_bytes
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(self._corrections_fd, start, count * row_bytes, advice)

    @property
    def regions(self) -> list[MapRegion]:
        """Where each map's corrections and pads are, in the order of the layout."""
        return list(self._regions.values())

    def tables(self) -> RegionTables | None:
        """:attr:`regions` as tables; None where maps are not numbered by their places, or the pads
        of any map but the first have gaps. With AES instructions only."""
        shapes = enumerate(self.layout.shapes)
        if self._tables is None and all(s.index == i and not (i and s.pad_gap) for i, s in shapes):
            streams = [region.pads.stream for region in self.regions]
            self._tables = RegionTables(
                np.array([region.offset for region in self.regions], np.int64),
                np.array([stream.prefix for stream in streams], np.int64),
                np.stack([stream.round_keys for stream in streams]),
                np.stack([region.expected for region in self.regions]),
                position_weights(self.layout.max_out_features),
            )
        return self._tables

    @property
    def corrections_fd(self) -> int:
        """Descriptor of the file of corrections; -1 after the end."""
        return self._corrections_fd

    def require_sole_use(self) -> None:
        """Raise CounterMoved where somebody else has drawn from this batch."""
        if self._refusal:
            raise CounterMoved(self._refusal)

    def pads(
        self, map_index: int, first_slot: int, count: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """r (count, n) of consecutive slots, in ``out`` if given. Raises CounterMoved."""
        self.require_sole_use()
        return self._regions[map_index].pads.rows(first_slot, count, out)

    def corrections(
        self, map_index: int, first_slot: int, count: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """c = W r (count, m) of consecutive slots, each row checked; in ``out`` if given.

        Read with ``preadv`` into memory of our own: on a failing disk a memory map would end the
        process with SIGBUS, and the copy costs less than the page faults. Raises SlotDamaged.
        """
        region = self._regions[map_index]
        shape = region.shape
        rows = np.empty((count, shape.out_features), shape.dtype) if out is None else out
        try:
            offset = region.offset + first_slot * shape.correction_bytes
            files.pread_into(self._corrections_fd, rows, offset)
        except OSError as error:
            raise self._slot_damaged(map_index, first_slot, 0, str(error)) from error
        expected = region.expected[first_slot : first_slot + count]
        bad = first_bad_row(rows, region.weights, expected)
        if bad >= 0:
            raise self._slot_damaged(map_index, first_slot, int(bad), "checksum differs")
        return rows

    def _slot_damaged(
        self, map_index: int, first_slot: int, row: int, what: str
    ) -> files.SlotDamaged:
        error = files.SlotDamaged(
            f"the correction of slot {first_slot + row}, map {map_index} in "
            f"{self.directory / CORRECTIONS_NAME} is damaged ({what}); the other slots stay "
            "usable: draw another one, and check the disk and prepare new slots if this repeats"
        )
        error.row = row
        return error

    def info(self) -> BatchInfo:
        return BatchInfo(
            path=self.directory,
            fingerprint=self.layout.fingerprint,
            state="ready" if self.free else "spent",
            slots_total=self.num_slots,
            slots_spent=self.spent,
            num_bytes=directory_bytes(self.directory),
            created_ns=self.created_ns,
        )

    def close(self) -> None:
        """Forget the keys and close the files."""
        self._regions, self._tables = {}, None
        if self._counter is not None:
            self._counter.close()
        if self._corrections_fd >= 0:
            os.close(self._corrections_fd)
            self._corrections_fd = -1

    def __repr__(self) -> str:
        return f"Batch({self.batch_id})"


def erase_key(directory: Path) -> None:
    """Overwrite and delete the pad key. Repeatable after a crash at any point. Raises OSError."""
    key = directory / KEY_NAME
    if key.exists():
        files.overwrite(key)
        key.unlink()
        files.sync_directory(directory)


def erase_directory(directory: Path) -> None:
    """Erase the pad key, then the rest. Repeatable after a crash at any point. Raises OSError."""
    erase_key(directory)
    shutil.rmtree(directory)
    files.sync_directory(directory.parent)


def directory_bytes(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # erased meanwhile
            continue
    return total


def inspect_batches(root: Path) -> list[BatchInfo]:
    """All batches of all models under ``root``, without a lock and without changing anything."""
    infos = []
    models = sorted(p for p in root.iterdir() if is_fingerprint(p.name) and p.is_dir())
    for directory in (batch for model in models for batch in sorted(model.iterdir())):
        parsed = parse_batch_dir(directory.name)
        if parsed is None:
            continue
        try:
            infos.append(_inspect_batch(directory, *parsed))
        except FileNotFoundError:  # erased or committed meanwhile
            continue
        except OSError as error:
            raise StoreError(f"cannot read the pad store {directory}: {error}") from error
    return sorted(infos, key=lambda info: (info.fingerprint, info.created_ns))


def _inspect_batch(directory: Path, batch_id: str, suffix: str) -> BatchInfo:
    status = directory.stat()
    state = {PARTIAL: "partial", SPENT: "spent", DAMAGED: "damaged"}.get(suffix, "ready")
    total, spent, created_ns, problem = 0, 0, status.st_mtime_ns, ""
    if state == "ready":
        try:
            meta = files.read_meta(directory)
            total, created_ns = meta.num_slots, meta.created_ns
            path = directory / COUNTER_NAME
            fd = files.open_existing(path)
            try:
                files.check_identity(meta, fd, directory)
                spent = SpentCounter(fd, path, batch_id, total).spent
            finally:
                os.close(fd)
            state = "ready" if spent < total else "spent"
        except FileNotFoundError as error:
            if not directory.exists():
                raise
            state, spent, problem = "damaged", total, f"{error.filename} is missing"
        except files.BatchDamaged as error:
            state, spent, problem = "damaged", total, str(error)
        except files.BatchNotOurs as error:
            state, spent, problem = "unusable", total, str(error)
    return BatchInfo(
        path=directory,
        fingerprint=directory.parent.name,
        state=state,
        slots_total=total,
        slots_spent=spent,
        num_bytes=directory_bytes(directory),
        created_ns=created_ns,
        problem=problem,
    )
