"""How many slots of a batch are spent: two records that no crash and no torn write moves back."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from otpipe.client.store_files import (
    DIGEST_BYTES,
    BatchDamaged,
    durable_sync,
    pwrite_all,
    short_digest,
)
from otpipe.errors import StoreError

_COUNTER_MAGIC = b"OTPCNT01"
_RECORD = struct.Struct("<8s16sQQ")  # magic, batch id, sequence number, slots spent
_RECORD_BYTES = _RECORD.size + DIGEST_BYTES
_RECORD_OFFSETS = (0, 4096)  # two pages: no single bad sector reaches both
_COUNTER_BYTES = 8192


class CounterMoved(StoreError):  # noqa: N818 - reads as what it is
    """The counter on the medium is not what this process left there: its slots are nobody's."""


def _encode_record(batch_id: str, sequence: int, spent: int) -> bytes:
    body = _RECORD.pack(_COUNTER_MAGIC, bytes.fromhex(batch_id), sequence, spent)
    return body + short_digest(body)


def _decode_record(data: bytes, batch_id: str, num_slots: int) -> tuple[int, int] | None:
    if len(data) != _RECORD_BYTES:
        return None
    body, digest = data[: _RECORD.size], data[_RECORD.size :]
    magic, owner, sequence, spent = _RECORD.unpack(body)
    if magic != _COUNTER_MAGIC or owner.hex() != batch_id or short_digest(body) != digest:
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

    Whoever advances holds ``lock_file(fd)``, and still ``advance`` rereads both records first: a
    lock can fail (a network file system without locks) and contents can be put back in place.
    """

    def __init__(self, fd: int, path: Path, batch_id: str, num_slots: int) -> None:
        self._fd, self._path, self._batch_id, self._num_slots = fd, path, batch_id, num_slots
        found = [self._read(index) for index in (0, 1)]
        #: the bytes of each record as this process knows them; None: its own write failed there
        self._known: list[bytes | None] = [*found]
        records = [_decode_record(data, batch_id, num_slots) for data in found]
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

    def _read(self, index: int) -> bytes:
        return os.pread(self._fd, _RECORD_BYTES, _RECORD_OFFSETS[index])

    def _write(self, index: int, sequence: int) -> None:
        record = _encode_record(self._batch_id, sequence, self.spent)
        self._known[index] = None
        pwrite_all(self._fd, record, _RECORD_OFFSETS[index])
        self._known[index] = record

    def _check_unmoved(self) -> None:
        """Raises CounterMoved when a record is not what this process left there."""
        for index, known in enumerate(self._known):
            data = self._read(index)
            if data == known:
                continue
            found = _decode_record(data, self._batch_id, self._num_slots)
            # After a failed write of our own, anything up to the count in memory may be there.
            if known is None and (found is None or found[1] <= self.spent):
                continue
            count = "something unreadable" if found is None else f"{found[1]} spent slots"
            raise CounterMoved(
                f"the counter {self._path} shows {count} where this process left {self.spent}: "
                "another program changed it, so the pads may be used elsewhere too; this batch "
                "is not used any more, prepare new slots and use a store from one machine only"
            )

    def advance(self, spent: int) -> None:
        """Raise the count and return when it is on the medium.

        Raises CounterMoved when somebody else changed the counter, and OSError. The count in
        memory is raised after an OSError too, so that the slots of a failed draw are never
        offered again by this process; nobody has received them, so it does not matter whether a
        later process sees them as spent.
        """
        if spent < self.spent:
            raise ValueError(f"the counter is at {self.spent} and cannot go back to {spent}")
        try:
            self._check_unmoved()
        finally:
            self.spent = spent
        # A failed attempt leaves the sequence as it is: the next one writes the same record again,
        # never the one that is known to be on the medium.
        first = (self._sequence + 1) % 2
        self._write(first, self._sequence + 1)
        try:
            durable_sync(self._fd)
        except OSError:
            self._known[first] = None  # the cache may have been dropped
            raise
        self._sequence += 1
        self._write(1 - first, self._sequence)

    def close(self) -> None:
        """Close the file, which ends the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
