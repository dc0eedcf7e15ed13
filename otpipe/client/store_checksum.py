"""A 64-bit checksum of every stored correction row, fast enough to check each one that is used.

The sum of a row x (m,) is ``seed + sum_j w_j x_j mod 2^64`` with odd 32-bit weights w_j that depend
on the position j, and a seed that depends on batch, map and slot. It is additive, so a row that
arrives in pieces and out of order is summed as it comes. Any change of one element changes the
sum (w_j odd, so a unit mod 2^64), exchanged elements and rows of another slot, map or batch do too
except with probability about 2^-32 or less, and a run of zeros does not match a table of zeros
(the seed). It is made against bad disks and truncated copies, not against somebody who
can write to the store: that person can read the pad key next to it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from otpipe.kernels.cpu import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = x * _GOLDEN + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4)
def position_weights(count: int) -> np.ndarray:
    """w (count,) uint32, odd; ``position_weights(a)`` is a prefix of ``position_weights(b)``."""
    mixed = _splitmix64(np.arange(count, dtype=np.uint64))
    weights = (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    weights.setflags(write=False)
    return weights


def row_seeds(batch_id: str, map_indices: tuple[int, ...], num_slots: int) -> np.ndarray:
    """Seeds (len(map_indices), T) uint64."""
    tag = _splitmix64(np.array([int(batch_id[:16], 16)], dtype=np.uint64))
    maps = np.array(map_indices, dtype=np.uint64)[:, None] << np.uint64(32)
    return _splitmix64((maps | np.arange(num_slots, dtype=np.uint64)[None, :]) ^ tag)


@kernel
def first_bad_row(rows: np.ndarray, weights: np.ndarray, expected: np.ndarray) -> int:
    """Index of the first row of ``rows`` (R, m) whose sum is not ``expected`` (R,), or -1."""
    for i in range(rows.shape[0]):
        total = np.uint64(0)
        row = rows[i]
        for j in range(row.size):
            total += np.uint64(row[j]) * np.uint64(weights[j])
        if total != expected[i]:
            return i
    return -1


@kernel
def transpose_and_sum(
    source: np.ndarray, target: np.ndarray, column: int, weights: np.ndarray, sums: np.ndarray
) -> None:
    """``target[:, column:column+R] = source.T`` for source (R, T), and add it to ``sums`` (T,).

    ``weights`` (R,) are those of the R rows. Sums run along the rows of ``source``, which the
    compiler vectorises; the copy goes in strips of 8 slots because the rows of ``source`` lie a
    power of two apart and compete for the same few lines of the first-level cache.
    """
    num_rows, num_slots = source.shape
    for row_start in range(0, num_rows, 64):
        row_stop = min(row_start + 64, num_rows)
        for row in range(row_start, row_stop):
            weight = np.uint64(weights[row])
            for slot in range(num_slots):
                sums[slot] += np.uint64(source[row, slot]) * weight
        for slot_start in range(0, num_slots, 8):
            slot_stop = min(slot_start + 8, num_slots)
            for row in range(row_start, row_stop):
                for slot in range(slot_start, slot_stop):
                    target[slot, column + row] = source[row, slot]
