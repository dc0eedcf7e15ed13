"""Shared by the tests of the pad store: a small model and ways to prepare and read batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from otpipe.client.store import BatchWriter, MapShape, PadStore, SlotLease

FINGERPRINT = "ab" * 32
SHAPES = (
    MapShape(0, 37, 21, 1),  # pads of 37 bytes: the stride is padded
    MapShape(1, 24, 50, 4),
    MapShape(5, 7, 3, 4),
)
BY_INDEX = {shape.index: shape for shape in SHAPES}


def open_store(root: Path, fingerprint: str = FINGERPRINT, **options: bool) -> PadStore:
    return PadStore.open(root, fingerprint, SHAPES, **options)


def weight(shape: MapShape) -> np.ndarray:
    """The server's W (m, n), any fixed integers."""
    rows, columns = np.indices((shape.out_features, shape.in_features))
    return (rows * 31 + columns * 17 + shape.index) % 255 - 127


def linear(shape: MapShape, r_Tn: np.ndarray) -> np.ndarray:
    """W r mod 2^k, (T, m)."""
    product = r_Tn.astype(np.int64) @ weight(shape).T
    return (product % 2 ** (8 * shape.ring_bytes)).astype(shape.dtype)


def fill(writer: BatchWriter, shapes: tuple[MapShape, ...] = SHAPES, step: int = 8) -> None:
    """Do what a preparation does, in blocks of ``step`` coordinates and outputs."""
    for shape in shapes:
        blocks = [
            writer.pads(shape.index, first, min(step, shape.in_features - first))
            for first in range(0, shape.in_features, step)
        ]
        c_mT = np.ascontiguousarray(linear(shape, np.concatenate(blocks, axis=1)).T)
        for first in range(0, shape.out_features, step):
            writer.put(shape.index, first, c_mT[first : first + step])


def prepare(store: PadStore, num_slots: int) -> Path:
    """Add a batch; returns its directory."""
    with store.begin_batch(num_slots) as writer:
        fill(writer)
        writer.commit()
        return writer.final_path


def check_lease(lease: SlotLease) -> None:
    """Every correction belongs to its mask."""
    for shape in SHAPES:
        r_Tn = lease.masks(shape.index)
        assert r_Tn.shape == (lease.count, shape.in_features)
        assert r_Tn.dtype == shape.dtype
        np.testing.assert_array_equal(lease.corrections(shape.index), linear(shape, r_Tn))
