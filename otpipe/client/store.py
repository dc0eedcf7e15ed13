"""The client's pad store: one-time pads prepared ahead of time, each handed out once, ever.

Two messages under one pad reveal the difference of two activations, so everything here serves one
sentence: *a slot is marked spent on the medium before its first mask leaves* ``draw``. A crash
burns slots, it never gives one out twice.

On disk, ``<root>/<fingerprint of the model>/``, directories 0700 and files 0600:
  lock, holder.json       the process that may draw
  <batch id>.partial/     in preparation; erased by the next open
  <batch id>/             meta.json   model, shapes, identity of the counter file
                          key.bin     the 32 bytes from which the pads r are derived
                          counter.bin how many slots are spent, in two records
                          corrections.bin, checksums.bin   c = W r and a sum per row
  <batch id>.spent/       every slot spent; being erased
  <batch id>.damaged/     set aside without its key, never used again; yours to delete

One process draws at a time: it holds ``lock``, and besides a lock on the counter file of every
batch, so that a deleted ``lock`` lets nobody else in. Each draw first rereads the counter; where
somebody changed it all the same, the batch is set aside and hands out nothing any more.

What this does not do:
  - Forward secrecy is per batch. The pad key of a batch exists until its last slot is spent;
    who copies the disk before that can unmask recorded traffic of that batch. Then, or when the
    batch is set aside, the key is overwritten and deleted, but an SSD, a journaling or
    copy-on-write file system, a snapshot or a backup may keep the old bytes. Put the store on an
    encrypted disk, and keep it out of backups.
  - A copied or restored store would spend its pads a second time. Each batch is bound to the
    machine (its machine-id) and to the inode number and inode generation of its counter file,
    and a copy is refused. Not noticed: a counter overwritten in place with old contents while no
    process has the store open, and a file system or virtual machine put back to a snapshot.
    After either, delete the store.
  - That binding is only as good as what the system tells. macOS and many containers have no
    machine-id, and clones of one disk image share theirs; tmpfs, overlayfs and macOS give no
    inode generation. Without the machine-id, a copy on another machine passes if its counter
    file got the same inode number and generation; without the generation, a copy on another
    disk, or a restored backup, passes if it got the same number, which file systems give out
    again soon after a deletion. Where both are missing, as in a container's own layers, one
    inode number is all there is: never copy or restore a store there.
  - The checksums notice bad disks, not somebody with write access to the files, who could read the
    pad key as well.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import platformdirs

from otpipe.client import store_files as files
from otpipe.client.store_batch import (
    Batch,
    BatchInfo,
    erase_directory,
    erase_key,
    inspect_batches,
)
from otpipe.client.store_counter import CounterMoved
from otpipe.client.store_files import SlotDamaged
from otpipe.client.store_layout import (
    DAMAGED,
    PARTIAL,
    SPENT,
    MapShape,
    ModelLayout,
    check_num_slots,
    parse_batch_dir,
)
from otpipe.client.store_lease import PadReuseError, SlotLease, Span
from otpipe.client.store_lock import StoreLock
from otpipe.client.store_writer import BatchWriter, StoreFull
from otpipe.errors import SlotsExhausted, StoreError

__all__ = [
    "BatchInfo",
    "BatchWriter",
    "MapShape",
    "PadReuseError",
    "PadStore",
    "SlotDamaged",
    "SlotLease",
    "StoreFull",
    "default_root",
]


def default_root() -> Path:
    return Path(platformdirs.user_data_dir("otpipe")) / "pads"


class PadStore:
    """The pads of one model. Open it with ``PadStore.open``; draw from one process at a time.

    ``warnings`` lists the batches that were not usable and why. Threads may share a store; a
    forked process may not.
    """

    def __init__(
        self,
        root: Path,
        layout: ModelLayout,
        exclusive: bool,
        on_warning: Callable[[StoreError], None] | None,
    ) -> None:
        self.path = root / layout.fingerprint
        self.warnings: list[StoreError] = []
        self._layout, self._exclusive, self._on_warning = layout, exclusive, on_warning
        self._mutex = threading.RLock()
        self._owner_pid = os.getpid()
        self._closed = False
        self._batches: list[Batch] = []
        self._set_aside_open: list[Batch] = []  # leases may still be in the middle of a read
        self._leases: weakref.WeakSet[SlotLease] = weakref.WeakSet()
        self._writers: set[BatchWriter] = set()
        self._lock: StoreLock | None = None
        try:
            if exclusive:
                files.make_private_directory(root)
                files.make_private_directory(self.path)
                self._lock = StoreLock(self.path)
                self._tighten_modes()
            if self.path.is_dir():
                self._load()
            if self._lock is not None:
                self._lock.sign()
        except OSError as error:
            self._release()
            raise StoreError(
                f"cannot open the pad store {self.path}: {error}; make it readable and writable "
                "for this user, or use another store directory"
            ) from error
        except BaseException:
            self._release()
            raise

    @classmethod
    def open(
        cls,
        root: Path | None,
        fingerprint: str,
        shapes: Sequence[MapShape],
        exclusive: bool = True,
        on_warning: Callable[[StoreError], None] | None = None,
    ) -> PadStore:
        """Open (and create) the store of one model under ``root`` (None: the user's data folder).

        With ``exclusive`` the store is locked until ``close``, and left-overs of crashes are
        removed; without, it can only be looked at. ``on_warning`` is called with every error that
        makes a batch unusable, as it is found. Raises StoreLocked when another process holds the
        store, StoreError when it cannot be used.
        """
        layout = ModelLayout(fingerprint, tuple(shapes))
        return cls(Path(root) if root else default_root(), layout, exclusive, on_warning)

    @staticmethod
    def inspect(root: Path | None = None) -> list[BatchInfo]:
        """All batches of all models, without taking a lock or changing anything."""
        path = Path(root) if root else default_root()
        try:
            return inspect_batches(path) if path.is_dir() else []
        except OSError as error:
            raise StoreError(f"cannot read the pad store {path}: {error}") from error

    # --- opening ---------------------------------------------------------------------------------

    def _tighten_modes(self) -> None:
        mode = self.path.stat().st_mode & 0o777
        if mode & 0o077:
            self.path.chmod(0o700)
            self._warn(
                StoreError(
                    f"{self.path} had mode {mode:04o}, so other users of this machine could read "
                    "the pads; it is 0700 now, but delete the store if you do not trust them"
                )
            )

    def _load(self) -> None:
        left_over = []
        for directory in sorted(self.path.iterdir()):
            parsed = parse_batch_dir(directory.name)
            if parsed is not None and parsed[1] == "":
                self._load_batch(directory, parsed[0])
            elif parsed is not None:
                left_over.append((directory, parsed[1]))
        self._batches.sort(key=lambda batch: (batch.created_ns, batch.batch_id))
        if not self._exclusive:
            return
        for directory, suffix in left_over:  # only now: no batch is in another process's hands
            if suffix in (PARTIAL, SPENT):
                self._erase(directory)
            elif suffix == DAMAGED:
                self._erase_key(directory)
        self._retire()

    def _load_batch(self, directory: Path, batch_id: str) -> None:
        try:
            batch = Batch(directory, batch_id, self._layout, writable=self._exclusive)
        except files.BatchDamaged as error:
            if self._exclusive:
                self._set_aside(directory, error)
            else:
                self._warn(error)
        except StoreError as error:  # intact, but not for us: left where it is
            self._warn(error)
        except BlockingIOError:  # drawn from elsewhere, although the store's lock file was free
            assert self._lock is not None
            raise self._lock.refusal() from None
        except OSError as error:
            self._warn(StoreError(f"cannot read the batch {directory}: {error}; it is not used"))
        else:
            self._batches.append(batch)

    def _set_aside(self, directory: Path, error: StoreError) -> None:
        """Never use a batch again. Without its key it cannot be, even where the renaming fails."""
        self._erase_key(directory)
        target = directory.with_name(directory.name + DAMAGED)
        try:
            directory.rename(target)
            files.sync_directory(self.path)
            self._warn(StoreError(f"{error} (set aside as {target.name})"))
        except OSError:
            self._warn(error)

    def _warn(self, error: StoreError) -> None:
        self.warnings.append(error)
        if self._on_warning is not None:
            self._on_warning(error)

    # --- what is there ---------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        with self._mutex:
            return sum(batch.free for batch in self._batches)

    @property
    def batches(self) -> tuple[BatchInfo, ...]:
        """The usable batches, in the order in which their slots will be drawn."""
        with self._mutex:
            return tuple(batch.info() for batch in self._batches)

    def batch_bytes(self, num_slots: int) -> int:
        """Disk space of a batch of ``num_slots`` slots, without a few small files."""
        return num_slots * (self._layout.bytes_per_slot + 8 * len(self._layout.shapes))

    # --- preparing -------------------------------------------------------------------------------

    def begin_batch(self, num_slots: int) -> BatchWriter:
        """Start a batch of ``num_slots`` (a power of two up to 2048). Raises StoreFull, StoreError.

        Other slots can be drawn while it is prepared, also from other threads.
        """
        check_num_slots(num_slots)
        with self._mutex:
            self._require_owner()
            writer = BatchWriter(self.path, self._layout, num_slots, self._writer_done)
            self._writers.add(writer)
            return writer

    def _writer_done(self, writer: BatchWriter) -> None:
        with self._mutex:
            self._writers.discard(writer)
            if writer.committed and not self._closed:
                self._load_batch(writer.final_path, writer.batch_id)

    # --- drawing ---------------------------------------------------------------------------------

    def draw(self, count: int) -> SlotLease:
        """Hand out the next ``count`` slots, oldest batch first, marked spent on the medium.

        Raises SlotsExhausted when fewer are left (none is spent then), and StoreError when the
        disk does not confirm the mark or somebody else changed it (the slots are then given up,
        in the second case with their batch).
        """
        if count < 1:
            raise ValueError(f"draw of {count} slots")
        with self._mutex:
            self._require_owner()
            self._retire()
            free = self.free_slots
            if count > free:
                raise SlotsExhausted(
                    f"{count} pad slots are needed and {free} are left in {self.path}; prepare "
                    "more slots"
                )
            spans, missing = [], count
            for batch in tuple(self._batches):
                take = min(missing, batch.free)
                if take:
                    spans.append(Span(batch, self._spend(batch, take), take))
                    missing -= take
            lease = SlotLease(self._layout, spans, self._lease_done)
            self._leases.add(lease)
            return lease

    def _spend(self, batch: Batch, count: int) -> int:
        try:
            return batch.spend(count)
        except CounterMoved as error:
            self._batches.remove(batch)
            self._set_aside_open.append(batch)
            self._set_aside(batch.directory, error)
            raise

    def _lease_done(self, lease: SlotLease) -> None:
        with self._mutex:
            self._leases.discard(lease)
            if not self._closed and os.getpid() == self._owner_pid:
                self._retire()

    def _retire(self) -> None:
        """Erase the batches whose slots are all spent and in nobody's hands."""
        held = {span.batch for lease in self._leases for span in lease.spans}
        for batch in [b for b in self._batches if b.free == 0 and b not in held]:
            self._batches.remove(batch)
            target = batch.directory.with_name(batch.directory.name + SPENT)
            try:
                batch.directory.rename(target)
            except OSError as error:
                self._warn(StoreError(f"cannot erase {batch.directory}: {error}; delete it"))
            else:
                self._erase(target)
            finally:
                batch.close()  # the end of its lock

    def _erase_key(self, directory: Path) -> None:
        try:
            erase_key(directory)
        except OSError as error:
            self._warn(StoreError(f"cannot erase the pad key in {directory}: {error}; delete it"))

    def _erase(self, directory: Path) -> None:
        try:
            erase_directory(directory)
        except OSError as error:
            self._warn(StoreError(f"cannot erase {directory}: {error}; delete it"))

    def _require_owner(self) -> None:
        if self._closed:
            raise RuntimeError("the pad store is closed")
        if os.getpid() != self._owner_pid:
            raise StoreError(
                f"the pad store {self.path} was opened by process {self._owner_pid} and is used in "
                f"its fork {os.getpid()}; open it in the process that draws"
            )
        if not self._exclusive:
            raise StoreError(
                f"the pad store {self.path} was opened for looking only; open it with "
                "exclusive=True to draw or prepare slots"
            )

    # --- closing ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Abort preparations, end all leases, and release the lock. May be called twice."""
        with self._mutex:
            if self._closed:
                return
            if os.getpid() != self._owner_pid:  # a fork: the files belong to the parent
                self._closed = True
                return
            for writer in tuple(self._writers):
                writer.abort()
            for lease in tuple(self._leases):
                lease.close()
            if self._exclusive:
                self._retire()
            self._closed = True
            self._release()

    def _release(self) -> None:
        """Close every file and give up the locks."""
        for batch in (*self._batches, *self._set_aside_open):
            batch.close()
        self._batches.clear()
        self._set_aside_open.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> PadStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PadStore({str(self.path)!r})"

    def __reduce__(self) -> str:
        raise TypeError("pads are secret and are never pickled")
