"""Compiled passes of OT extension, for both parties on a CPU.

Blocks of 128 bits are rows (2,) of uint64, the low half first. Bit i of a row of bits is bit
i % 64 of word i // 64. The callers are in ``extension_cpu``; each pass has a plain twin in
``torch_ops`` that it is tested against.

Shape suffixes: W words of 64 columns.
"""

from __future__ import annotations

import numpy as np

from otpipe.kernels.aes_native import GROUP, encrypt_group
from otpipe.kernels.cpu import Array, kernel

WORDS_PER_GROUP = 2 * GROUP
_LANES = 8  # words that one vector instruction transposes side by side


@kernel
def expand_trees(
    round_keys: Array, weights: Array, leaf_starts: Array, row_map: Array, counter: int, rows: Array
) -> None:
    """Weighted sums of the leaves' streams, tree by tree. Needs AES instructions.

    round_keys: (leaves, 11, 2). weights: uint64 (leaves,): bit j says whether the leaf's stream is
    added to row ``row_map[tree, j]`` of ``rows`` (., W); -1 ends a tree's rows. W must be a
    multiple of WORDS_PER_GROUP. ``counter``: first AES block of each stream. No branch and no
    address depends on a weight.
    """
    blocks = np.zeros((GROUP, 2), np.uint64)
    stream = np.empty((GROUP, 2), np.uint64)
    flat = stream.reshape(-1)
    max_rows = row_map.shape[1]
    sums = np.empty((max_rows, WORDS_PER_GROUP), np.uint64)
    for group in range(rows.shape[1] // WORDS_PER_GROUP):
        first = group * WORDS_PER_GROUP
        for i in range(GROUP):
            blocks[i, 0] = np.uint64(counter + group * GROUP + i)
        for tree in range(leaf_starts.shape[0] - 1):
            num_rows = 0
            while num_rows < max_rows and row_map[tree, num_rows] >= 0:
                sums[num_rows] = np.uint64(0)
                num_rows += 1
            for leaf in range(leaf_starts[tree], leaf_starts[tree + 1]):
                encrypt_group(blocks, round_keys[leaf], stream)
                for j in range(num_rows):
                    mask = np.uint64(0) - ((weights[leaf] >> np.uint64(j)) & np.uint64(1))
                    total = sums[j]
                    for i in range(WORDS_PER_GROUP):
                        total[i] ^= flat[i] & mask
            for j in range(num_rows):
                rows[row_map[tree, j], first : first + WORDS_PER_GROUP] = sums[j]


@kernel
def add_masked(rows: Array, tree_of_row: Array, masks: Array, corrections: Array) -> None:
    """rows[i] ^= masks[i] & corrections[tree_of_row[i] - 1], but for the rows of the first tree."""
    for i in range(rows.shape[0]):
        if tree_of_row[i] > 0:
            row, correction = rows[i], corrections[tree_of_row[i] - 1]
            mask = masks[i]
            for k in range(row.shape[0]):
                row[k] ^= mask & correction[k]


@kernel
def spread_bits(row: Array, out: Array) -> None:
    """Bit i of a row of words to out[i], uint8: (W,) -> (64 W,). numpy's unpackbits has a table."""
    one = np.uint64(1)
    for at in range(row.shape[0]):
        word, target = row[at], out[64 * at : 64 * at + 64]
        for i in range(64):
            target[i] = np.uint8((word >> np.uint64(i)) & one)


@kernel
def transpose_bits(rows: Array, out: Array) -> None:
    """Bit i of row r becomes bit r of out[i]: rows (128, W) -> out (64 W, 2). W: multiple of 8.

    Butterflies on 64 x 64 bits (Warren, Hacker's Delight, section 7-3), eight side by side.
    """
    tile = np.empty((64, _LANES), np.uint64)
    for half in range(2):
        for first in range(0, rows.shape[1], _LANES):
            for r in range(64):
                for lane in range(_LANES):
                    tile[r, lane] = rows[64 * half + r, first + lane]
            width, mask = 32, np.uint64(0x00000000FFFFFFFF)
            while width > 0:
                shift = np.uint64(width)
                for start in range(0, 64, 2 * width):
                    for r in range(start, start + width):
                        low, high = tile[r], tile[r + width]
                        for lane in range(_LANES):
                            change = ((low[lane] >> shift) ^ high[lane]) & mask
                            high[lane] ^= change
                            low[lane] ^= change << shift
                width >>= 1
                mask ^= mask << np.uint64(width)
            for lane in range(_LANES):
                target = out[64 * (first + lane) : 64 * (first + lane) + 64]
                for r in range(64):
                    target[r, half] = tile[r, lane]
