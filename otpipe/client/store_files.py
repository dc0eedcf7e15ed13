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

DIGEST_BYTES = 16
_KEY_MAGIC = b"OTPKEY01"
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


def make_private_directory(path: Path) -> None:
    """Create a directory for this user only; one that exists keeps its mode."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


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


def lock_file(fd: int) -> None:
    """Hold the file itself, whatever its path, until ``fd`` is closed.

    Raises BlockingIOError when another opening of it, in any process, holds it.
    """
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


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


def short_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


# --- pad key -------------------------------------------------------------------------------------


def encode_key(batch_id: str, pad_key: bytes) -> bytes:
    body = _KEY_MAGIC + bytes.fromhex(batch_id) + pad_key
    return body + short_digest(body)


def read_key(path: Path, batch_id: str) -> bytes:
    fd = open_existing(path)
    try:
        data = os.pread(fd, 1024, 0)
    finally:
        os.close(fd)
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    head = _KEY_MAGIC + bytes.fromhex(batch_id)
    if len(body) != len(head) + 32 or body[: len(head)] != head or short_digest(body) != digest:
        raise BatchDamaged(f"the pad key {path} is damaged; its slots are lost, prepare new ones")
    return body[len(head) :]


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
