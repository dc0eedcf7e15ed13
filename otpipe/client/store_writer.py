"""Preparing a batch: pads out for encryption, corrections in, then one atomic commit."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from otpipe.client import store_files as files
from otpipe.client.store_batch import encode_checksums, erase_directory
from otpipe.client.store_checksum import position_weights, row_seeds, transpose_and_sum
from otpipe.client.store_counter import new_counter
from otpipe.client.store_layout import (
    CHECKSUMS_NAME,
    CORRECTIONS_NAME,
    COUNTER_NAME,
    KEY_NAME,
    META_NAME,
    PARTIAL,
    MapShape,
    ModelLayout,
)
from otpipe.client.store_pads import CoordinateReader
from otpipe.client.store_sync import EarlySync
from otpipe.errors import StoreError

_WINDOW_BYTES = 32 << 20  # of one map's corrections collected before they are written
_SMALL_FILES_BYTES = 1 << 20  # meta, key, counter, directory
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreFull(StoreError):  # noqa: N818 - reads as what it is
    """The disk has no room for the batch."""


class _Window:
    """Columns start .. start + filled of one map's (T, m) corrections, waiting to be written."""

    def __init__(self, shape: MapShape, num_slots: int, start: int) -> None:
        columns = max(1, _WINDOW_BYTES // (num_slots * shape.ring_bytes))
        self.rows = np.empty((num_slots, min(shape.out_features - start, columns)), shape.dtype)
        self.start, self.filled = start, 0

    @property
    def room(self) -> int:
        return self.rows.shape[1] - self.filled


class BatchWriter:
    """A batch in preparation. It is in ``<batch id>.partial`` and worthless until ``commit``.

    Each map in progress holds up to 32 MB of corrections in memory; puts are fast when the
    outputs of a map come in ascending order, and correct in any order. ``pads`` and ``put`` may be
    called from different threads, which go on side by side for different maps. As a context manager
    it aborts unless committed.
    """

    def __init__(
        self,
        model_dir: Path,
        layout: ModelLayout,
        num_slots: int,
        on_done: Callable[[BatchWriter], None],
    ) -> None:
        self.batch_id = secrets.token_hex(16)
        self.num_slots = num_slots
        self.final_path = model_dir / self.batch_id
        self.path = model_dir / (self.batch_id + PARTIAL)
        self._layout, self._on_done = layout, on_done
        self._idle = threading.Condition()  # nobody puts; guards the state
        self._putting = 0
        self._map_locks = [threading.Lock() for _ in layout.shapes]
        self._owner_pid = os.getpid()
        self._state = "open"
        pad_key = secrets.token_bytes(32)
        self._reader: CoordinateReader | None = CoordinateReader(pad_key, layout, num_slots)
        indices = tuple(shape.index for shape in layout.shapes)
        self._sums = row_seeds(self.batch_id, indices, num_slots)
        self._weights = position_weights(layout.max_out_features)
        self._regions = layout.region_offsets(num_slots)
        self._covered = [np.zeros(shape.out_features, bool) for shape in layout.shapes]
        self._windows: dict[int, _Window] = {}
        self._fd = -1
        self._early_sync: EarlySync | None = None
        self._create(pad_key)

    def _create(self, pad_key: bytes) -> None:
        corrections_bytes = self.num_slots * self._layout.bytes_per_slot
        needed = corrections_bytes + self._sums.nbytes + _SMALL_FILES_BYTES
        with self._disk_errors(f"create {self.path}"):
            available = files.free_bytes(self.path.parent)
        if available < needed:
            raise self._full(needed, available)
        try:
            with self._disk_errors(f"create {self.path}"):
                self.path.mkdir(mode=0o700)
                files.write_private(self.path / KEY_NAME, files.encode_key(self.batch_id, pad_key))
                files.write_private(self.path / COUNTER_NAME, new_counter(self.batch_id))
                self._fd = files.create_private(self.path / CORRECTIONS_NAME)
                files.reserve(self._fd, corrections_bytes)
                self._early_sync = EarlySync(self._fd)
        except BaseException:
            self._discard()
            raise

    def pads(self, map_index: int, first_coord: int, count: int) -> np.ndarray:
        """r (T, count), uint32 or uint8, slot-major: input coordinates of one map, for encryption.

        Each coordinate is to be encrypted once; asking twice gives the same values.
        """
        reader = self._reader
        if reader is None:
            raise RuntimeError(f"the batch is {self._state}")
        return reader.read(map_index, first_coord, count)

    def put(self, map_index: int, first_output: int, corrections: np.ndarray) -> None:
        """Store ``corrections`` (rows, T) = outputs first_output .. of W r, for all slots.

        dtype uint32 for 4-byte rings and uint8 for 1-byte rings. Every output of every map is
        put once, in any order; putting output 0 again starts the map over (after a lost
        connection). Raises ValueError for anything else, StoreError when the disk fails.
        """
        position = self._layout.position.get(map_index)
        if position is None:
            raise ValueError(f"the model has no map {map_index}")
        shape = self._layout.shapes[position]
        if corrections.dtype != shape.dtype or corrections.shape[1:] != (self.num_slots,):
            raise ValueError(
                f"corrections of map {map_index} are {corrections.dtype} {corrections.shape}; "
                f"wanted {shape.dtype} (rows, {self.num_slots})"
            )
        stop = first_output + corrections.shape[0]
        if first_output < 0 or stop > shape.out_features:
            raise ValueError(
                f"outputs {first_output}..{stop} of map {map_index}, which has {shape.out_features}"
            )
        source = np.ascontiguousarray(corrections)
        with (
            self._put_under_way(),
            self._map_locks[position],
            self._disk_errors(f"write {self.path / CORRECTIONS_NAME}"),
        ):
            covered = self._covered[position]
            if first_output == 0 and covered[0]:
                self._start_over(position)
            if covered[first_output:stop].any():
                raise ValueError(f"outputs {first_output}..{stop} of map {map_index} put twice")
            done = 0
            while done < source.shape[0]:
                window = self._window_at(position, first_output + done)
                take = min(window.room, source.shape[0] - done)
                column = window.start + window.filled
                weights = self._weights[column : column + take]
                part = source[done : done + take]
                transpose_and_sum(part, window.rows, window.filled, weights, self._sums[position])
                window.filled += take
                done += take
            covered[first_output:stop] = True
            if covered.all():
                self._flush(position)

    @contextmanager
    def _put_under_way(self) -> Iterator[None]:
        with self._idle:
            self._require_open()
            self._putting += 1
        try:
            yield
        finally:
            with self._idle:
                self._putting -= 1
                self._idle.notify_all()

    def _start_over(self, position: int) -> None:
        indices = (self._layout.shapes[position].index,)
        self._sums[position] = row_seeds(self.batch_id, indices, self.num_slots)[0]
        self._covered[position][:] = False
        self._windows.pop(position, None)

    def _window_at(self, position: int, column: int) -> _Window:
        window = self._windows.get(position)
        if window is not None and window.room and column == window.start + window.filled:
            return window
        self._flush(position)
        window = _Window(self._layout.shapes[position], self.num_slots, column)
        self._windows[position] = window
        return window

    def _flush(self, position: int) -> None:
        window = self._windows.pop(position, None)
        if window is None or window.filled == 0:
            return
        shape, region = self._layout.shapes[position], self._regions[position]
        if window.filled == shape.out_features:
            files.pwrite_all(self._fd, window.rows, region)
        else:
            for slot in range(self.num_slots):
                offset = region + slot * shape.correction_bytes + window.start * shape.ring_bytes
                files.pwrite_all(self._fd, window.rows[slot, : window.filled], offset)
        assert self._early_sync is not None, "an open batch has a file"
        self._early_sync.written(window.filled * self.num_slots * shape.ring_bytes)

    def commit(self) -> None:
        """Make the batch usable: everything on the medium, then one rename.

        Raises ValueError when outputs are missing, and StoreError when the disk fails: then abort.
        """
        with self._idle, self._disk_errors(f"commit {self.path}"):
            self._idle.wait_for(lambda: self._putting == 0)
            self._require_open()
            for shape, covered in zip(self._layout.shapes, self._covered, strict=True):
                if not covered.all():
                    raise ValueError(
                        f"commit with {int(covered.sum())} of {shape.out_features} outputs of map "
                        f"{shape.index}"
                    )
            if self._early_sync is not None:
                self._early_sync.finish()
            os.fsync(self._fd)
            sums = encode_checksums(self.batch_id, self._sums)
            files.write_private(self.path / CHECKSUMS_NAME, sums)
            files.write_private(self.path / META_NAME, files.encode_meta(self._meta()))
            files.sync_directory(self.path)
            self.path.rename(self.final_path)
            self._state = "committed"
            self._release()
            files.sync_directory(self.final_path.parent)
        self._on_done(self)

    def _meta(self) -> files.BatchMeta:
        fd = files.open_existing(self.path / COUNTER_NAME)
        try:
            identity = files.file_identity(fd)
        finally:
            os.close(fd)
        return files.BatchMeta(
            self.batch_id, self._layout, self.num_slots, files.now_ns(), identity
        )

    @property
    def committed(self) -> bool:
        return self._state == "committed"

    def abort(self) -> None:
        """Erase the batch. Does nothing after ``commit`` or a first ``abort``."""
        with self._idle:
            if self._state not in ("open", "failed"):
                return
            self._state = "aborted"
            self._idle.wait_for(lambda: self._putting == 0)
            self._discard()
        self._on_done(self)

    def _discard(self) -> None:
        self._release()
        if os.getpid() == self._owner_pid:
            with suppress(OSError):  # the next open of the store erases what is left
                erase_directory(self.path)

    def _release(self) -> None:
        self._reader = None
        self._windows.clear()
        if self._early_sync is not None:
            self._early_sync.wait()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _require_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(f"the batch is {self._state}")
        if os.getpid() != self._owner_pid:
            raise RuntimeError("a batch is prepared by the process that began it")

    def _full(self, needed: int, available: int) -> StoreFull:
        return StoreFull(
            f"a batch of {self.num_slots} slots needs {needed} bytes in {self.path.parent} and "
            f"{available} are available; free some space, use another store directory, or prepare "
            "fewer slots"
        )

    @contextmanager
    def _disk_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._idle:
                if self._state == "open":  # half of a put may be in the sums: only abort is left
                    self._state = "failed"
            if error.errno in _FULL_DISK:
                needed = self.num_slots * self._layout.bytes_per_slot
                raise self._full(needed, files.free_bytes(self.path.parent)) from error
            raise StoreError(f"cannot {action}: {error}; check the disk and try again") from error

    def __enter__(self) -> BatchWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def __repr__(self) -> str:
        return f"BatchWriter({self.num_slots} slots, {self._state})"

    def __reduce__(self) -> str:
        raise TypeError("pads are secret and are never pickled")
