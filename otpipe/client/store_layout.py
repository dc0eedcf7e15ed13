"""Shape of a pad store on disk: which byte of which file belongs to which map and slot.

Suffix legend: T slots of a batch, n in_features, m out_features, M map.

A *slot* is one token position through all linear maps of the model. For map M, slot s has
  - a pad r of n ring elements, never stored: it is the AES-256-CTR keystream of
    ``derive_key(pad_key, "pad", M)`` at byte offset ``s * pad_stride``;
  - a correction c = W r of m ring elements, stored in ``corrections.bin``: the maps' regions
    follow each other in order, each region is (T, m) row-major, so that the row of one slot is
    one contiguous read and the rows of consecutive slots are too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
MAX_SLOTS = 2048  # one RLWE batch: the ring degree N

META_NAME = "meta.json"
KEY_NAME = "key.bin"
COUNTER_NAME = "counter.bin"
CORRECTIONS_NAME = "corrections.bin"
CHECKSUMS_NAME = "checksums.bin"
FILE_NAMES = (META_NAME, KEY_NAME, COUNTER_NAME, CORRECTIONS_NAME, CHECKSUMS_NAME)

PARTIAL = ".partial"  # being prepared; worthless after a crash
SPENT = ".spent"  # being erased
DAMAGED = ".damaged"  # set aside without its key, kept for the user to look at

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_BATCH_DIR = re.compile(r"([0-9a-f]{32})(\.partial|\.spent|\.damaged)?")
_ELEMENT_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
_PAD_ALIGNMENT = 16  # one AES block, so that every slot starts on a counter value


@dataclass(frozen=True)
class MapShape:
    """One linear map as the store sees it: W (m, n), over words of ``ring_bytes`` bytes."""

    index: int
    in_features: int
    out_features: int
    ring_bytes: int  # 1: Z mod 2^8, 4: Z mod 2^32, 8: Z mod 2^44 in 64-bit words

    def __post_init__(self) -> None:
        if self.ring_bytes not in _ELEMENT_DTYPES:
            raise ValueError(f"ring_bytes of map {self.index} is {self.ring_bytes}; use 1, 4 or 8")
        if not (0 <= self.index < 2**16):
            raise ValueError(f"map index {self.index} is outside 0..65535")
        for name in ("in_features", "out_features"):
            if not (1 <= getattr(self, name) < 2**24):
                raise ValueError(
                    f"{name} of map {self.index} is {getattr(self, name)}; use 1..2^24-1"
                )

    @property
    def dtype(self) -> np.dtype[Any]:
        return _ELEMENT_DTYPES[self.ring_bytes]

    @property
    def pad_bytes(self) -> int:
        return self.in_features * self.ring_bytes

    @property
    def pad_stride(self) -> int:
        """Keystream bytes from the pad of one slot to the pad of the next."""
        return -(-self.pad_bytes // _PAD_ALIGNMENT) * _PAD_ALIGNMENT

    @property
    def pad_gap(self) -> int:
        """Keystream bytes between the pads of two slots, which nobody uses."""
        return self.pad_stride - self.pad_bytes

    @property
    def correction_bytes(self) -> int:
        return self.out_features * self.ring_bytes


@dataclass(frozen=True)
class ModelLayout:
    """The maps of one model in file order, under the fingerprint of the server's weights."""

    fingerprint: str
    shapes: tuple[MapShape, ...]

    def __post_init__(self) -> None:
        # The fingerprint comes from the server and becomes a directory name: nothing but hex.
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ValueError(
                f"fingerprint {self.fingerprint!r:.80} is not 64 lower-case hex digits"
            )
        if not self.shapes:
            raise ValueError("a model without linear maps has no pads")
        if len({shape.index for shape in self.shapes}) != len(self.shapes):
            raise ValueError("two maps have the same index")

    @cached_property
    def position(self) -> dict[int, int]:
        """Map index -> row of the checksum table and place in the file."""
        return {shape.index: row for row, shape in enumerate(self.shapes)}

    @property
    def bytes_per_slot(self) -> int:
        return sum(shape.correction_bytes for shape in self.shapes)

    @property
    def max_out_features(self) -> int:
        return max(shape.out_features for shape in self.shapes)

    def region_offsets(self, num_slots: int) -> tuple[int, ...]:
        """Byte offset of each map's (T, m) region in ``corrections.bin``, in ``shapes`` order."""
        offsets, offset = [], 0
        for shape in self.shapes:
            offsets.append(offset)
            offset += num_slots * shape.correction_bytes
        return tuple(offsets)


class RegionTables(NamedTuple):
    """All regions of a batch for compiled code, in the order of the layout; M of them, T slots.

    Attributes:
        offsets: int64 (M,), of the slot 0 in the file. prefixes: int64 (M,). round_keys: uint64
            (M, 15, 2). expected: uint64 (M, T). weights: of the longest row.
    """

    offsets: np.ndarray
    prefixes: np.ndarray
    round_keys: np.ndarray
    expected: np.ndarray
    weights: np.ndarray


def check_num_slots(num_slots: int) -> None:
    if not (1 <= num_slots <= MAX_SLOTS) or num_slots & (num_slots - 1):
        raise ValueError(f"a batch of {num_slots} slots: use a power of two up to {MAX_SLOTS}")


def parse_batch_dir(name: str) -> tuple[str, str] | None:
    """Split a directory name into (batch id, suffix), or None where it is not one of ours."""
    match = _BATCH_DIR.fullmatch(name)
    return (match[1], match[2] or "") if match else None


def is_fingerprint(name: str) -> bool:
    return _FINGERPRINT.fullmatch(name) is not None


def shapes_to_lists(shapes: Iterable[MapShape]) -> list[list[int]]:
    return [[s.index, s.in_features, s.out_features, s.ring_bytes] for s in shapes]
