"""Files of the pad store: private modes, durable writes, and formats that notice damage.

Every function goes to the disk through ``os.*`` so that the crash tests can stop it at each call.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpipe.client.store_layout import (
    FORMAT_VERSION,
    MAX_SLOTS,
    META_NAME,
    MapShape,
    ModelLayout,
    shapes_to_lists,
)
from otpipe.errors import StoreError

_DIGEST_BYTES = 16
_KEY_MAGIC = b"OTPKEY01"
_COUNTER_MAGIC = b"OTPCNT01"
_RECORD = struct.Struct("<8s16sQQ")  # magic, batch id, sequence number, slots spent
_RECORD_BYTES = _RECORD.size + _DIGEST_BYTES
_RECORD_OFFSETS = (0, 4096)  # two pages: no single bad sector reaches both
_COUNTER_BYTES = 8192
_FS_IOC_GETVERSION = 0x80087601  # linux/fs.h: the generation of an inode number
_MAX_META_BYTES = 4 << 20


class BatchDamaged(StoreError):  # noqa: N818 - reads as what it is
    """A file of a batch is truncated or altered; the batch is set aside and never used."""


class BatchNotOurs(StoreError):  # noqa: N818
    """A batch is intact but belongs to another model, format version or place; it is left alone."""


class SlotDamaged(StoreError):  # noqa: N818
    """The stored correction of a slot fails its checksum. ``row`` is its row in the lease."""

    row: int = -1


def durable_sync(fd: int) -> None:
    """Return when the data of ``fd`` is on the medium; raises OSError otherwise."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync stops at the drive's cache
    if full_sync is not None:
        fcntl.fcntl(fd, full_sync)
    else:
        os.fdatasync(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_private(path: Path) -> int:
    """Create a new file of mode 0600; returns its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def open_existing(path: Path, writable: bool = False) -> int:
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags)


def pwrite_all(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def pread_into(fd: int, buffer: Any, offset: int) -> None:
    """Fill ``buffer``; raises OSError where the file ends early."""
    size = memoryview(buffer).nbytes
    done = os.preadv(fd, [buffer], offset)
    if done == size:
        return
    view = memoryview(buffer).cast("B")
    while done < size:
        step = os.preadv(fd, [view[done:]], offset + done)
        if step == 0:
            raise OSError(errno.EIO, "the file ends early")
        done += step


def write_private(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600 and return when its bytes are on the medium."""
    fd = create_private(path)
    try:
        pwrite_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def reserve(fd: int, num_bytes: int) -> None:
    """Allocate disk blocks, so that a full disk shows now and not after hours of preparation."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
    else:  # macOS
        os.ftruncate(fd, num_bytes)


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def overwrite(path: Path) -> None:
    """Write random bytes over a file in place (best effort: see the limits in ``store.py``)."""
    fd = open_existing(path, writable=True)
    try:
        pwrite_all(fd, os.urandom(max(os.fstat(fd).st_size, 64)), 0)
        durable_sync(fd)
    finally:
        os.close(fd)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


# --- pad key -------------------------------------------------------------------------------------


def encode_key(batch_id: str, pad_key: bytes) -> bytes:
    body = _KEY_MAGIC + bytes.fromhex(batch_id) + pad_key
    return body + _digest(body)


def read_key(path: Path, batch_id: str) -> bytes:
    fd = open_existing(path)
    try:
        data = os.pread(fd, 1024, 0)
    finally:
        os.close(fd)
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    head = _KEY_MAGIC + bytes.fromhex(batch_id)
    if len(body) != len(head) + 32 or body[: len(head)] != head or _digest(body) != digest:
        raise BatchDamaged(f"the pad key {path} is damaged; its slots are lost, prepare new ones")
    return body[len(head) :]


# --- counter of spent slots ----------------------------------------------------------------------


def _encode_record(batch_id: str, sequence: int, spent: int) -> bytes:
    body = _RECORD.pack(_COUNTER_MAGIC, bytes.fromhex(batch_id), sequence, spent)
    return body + _digest(body)


def _decode_record(data: bytes, batch_id: str, num_slots: int) -> tuple[int, int] | None:
    if len(data) != _RECORD_BYTES:
        return None
    body, digest = data[: _RECORD.size], data[_RECORD.size :]
    magic, owner, sequence, spent = _RECORD.unpack(body)
    if magic != _COUNTER_MAGIC or owner.hex() != batch_id or _digest(body) != digest:
        return None
    return (sequence, spent) if spent <= num_slots else None


def new_counter(batch_id: str) -> bytes:
    data = bytearray(_COUNTER_BYTES)
    for offset in _RECORD_OFFSETS:
        data[offset : offset + _RECORD_BYTES] = _encode_record(batch_id, 0, 0)
    return bytes(data)


class SpentCounter:
    """How many slots of a batch are spent: slots 0 .. spent-1. It only grows.

    Two records hold the same count. ``advance`` writes one, waits until it is on the medium, and
    only then writes the other, which may linger in the cache. The next ``advance`` begins with
    the lingering one, so at any time one record that nobody is writing is on the medium and holds
    the count of the last draw that returned: a torn write can never move the larger readable
    count back. And since both are equal soon after, one that rots later leaves the other correct.
    """

    def __init__(self, fd: int, path: Path, batch_id: str, num_slots: int) -> None:
        self._fd, self._path, self._batch_id = fd, path, batch_id
        records = [
            _decode_record(os.pread(fd, _RECORD_BYTES, offset), batch_id, num_slots)
            for offset in _RECORD_OFFSETS
        ]
        good = [record for record in records if record is not None]
        if not good:
            raise BatchDamaged(
                f"the counter {path} is damaged, so nobody knows which slots are spent; "
                "all of them count as spent, prepare new ones"
            )
        self._sequence = max(sequence for sequence, _ in good)
        self.spent = max(spent for _, spent in good)
        self._stale = [i for i in (0, 1) if records[i] != (self._sequence, self.spent)]

    def repair(self) -> None:
        """Rewrite a record that is unreadable or behind, leaving the good one untouched."""
        for index in self._stale:
            self._write(index, self._sequence)
            durable_sync(self._fd)
        self._stale = []

    def _write(self, index: int, sequence: int) -> None:
        record = _encode_record(self._batch_id, sequence, self.spent)
        pwrite_all(self._fd, record, _RECORD_OFFSETS[index])

    def advance(self, spent: int) -> None:
        """Raise the count and return when it is on the medium.

        Raises OSError. The count in memory is raised even then, so that the slots of a failed
        draw are never offered again by this process; nobody has received them, so it does not
        matter whether a later process sees them as spent.
        """
        if spent < self.spent:
            raise ValueError(f"the counter is at {self.spent} and cannot go back to {spent}")
        self.spent = spent
        # A failed attempt leaves the sequence as it is: the next one writes the same record again,
        # never the one that is known to be on the medium.
        first = (self._sequence + 1) % 2
        self._write(first, self._sequence + 1)
        durable_sync(self._fd)
        self._sequence += 1
        self._write(1 - first, self._sequence)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# --- identity of the counter file ----------------------------------------------------------------


def file_identity(fd: int) -> dict[str, int | str | None]:
    """What a copy of the file does not share: machine, inode number, generation of that number."""
    generation: int | None = None
    if platform.system() == "Linux":
        try:
            raw = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
            generation = int.from_bytes(raw[:4], "little")
        except OSError:  # not every file system numbers its generations
            generation = None
    return {"machine": _machine_tag(), "inode": os.fstat(fd).st_ino, "generation": generation}


def _machine_tag() -> str:
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(name).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            # machine-id(5): applications must not store the identifier itself.
            return hashlib.sha256(b"otpipe pad store" + text.encode()).hexdigest()[:16]
    return ""


# --- meta data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchMeta:
    """What ``meta.json`` says; ``identity`` is that of the counter file."""

    batch_id: str
    layout: ModelLayout
    num_slots: int
    created_ns: int  # Unix time
    identity: dict[str, int | str | None]


def encode_meta(meta: BatchMeta) -> bytes:
    fields = {
        "format": "otpipe pad batch",
        "version": FORMAT_VERSION,
        "batch_id": meta.batch_id,
        "fingerprint": meta.layout.fingerprint,
        "num_slots": meta.num_slots,
        "created_ns": meta.created_ns,
        "identity": meta.identity,
        "shapes": shapes_to_lists(meta.layout.shapes),
    }
    fields["digest"] = _fields_digest(fields)
    return json.dumps(fields).encode()


def _fields_digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()


def read_meta(directory: Path) -> BatchMeta:
    """Read and check ``meta.json``; raises BatchDamaged or BatchNotOurs."""
    path = directory / META_NAME
    damaged = BatchDamaged(f"{path} is damaged; the slots of this batch are lost, prepare new ones")
    fd = open_existing(path)
    try:
        data = os.pread(fd, _MAX_META_BYTES, 0)
    finally:
        os.close(fd)
    try:
        fields = json.loads(data)
        version, digest = fields["version"], fields.pop("digest")
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise BatchNotOurs(
                f"{directory} has store format {version} and this otpipe reads format "
                f"{FORMAT_VERSION}; use the otpipe that wrote it, or delete the directory"
            )
        if digest != _fields_digest(fields):
            raise damaged
        shapes = tuple(MapShape(*shape) for shape in fields["shapes"])
        return BatchMeta(
            batch_id=fields["batch_id"],
            layout=ModelLayout(fields["fingerprint"], shapes),
            num_slots=int(fields["num_slots"]),
            created_ns=int(fields["created_ns"]),
            identity=fields["identity"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None


def check_identity(meta: BatchMeta, counter_fd: int, directory: Path) -> None:
    """Refuse a batch whose counter file is not the one that was created with it.

    Copies share their pads, and each copy would spend them again.
    """
    if meta.identity != file_identity(counter_fd):
        raise BatchNotOurs(
            f"{directory} is a copy or a restored backup of pads prepared elsewhere, and pads "
            "that exist twice may be used twice, which reveals prompts; delete the directory and "
            "prepare new slots"
        )


def meta_is_plausible(meta: BatchMeta, batch_id: str) -> bool:
    return meta.batch_id == batch_id and 1 <= meta.num_slots <= MAX_SLOTS


def now_ns() -> int:
    return time.time_ns()
