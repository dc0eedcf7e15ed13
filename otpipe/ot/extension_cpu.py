"""OT extension on a CPU: streams of the leaves, their weighted sums, and the transposition.

Both parties use it; see ``extension`` for the formulas. With AES instructions everything is
compiled; without, pycryptodome encrypts the counters and numpy adds.

Shape suffixes: B COTs of a block, W = B / 64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from Crypto.Cipher import AES
from numpy.typing import NDArray

from otpipe.kernels import aes_native
from otpipe.kernels.aes_planes import expand_keys
from otpipe.kernels.cpu import parallel_for
from otpipe.ot import extension_kernels
from otpipe.ot.extension import COTS_PER_AES_BLOCK, U64, TreeLayout
from otpipe.ot.params import COT_ROUNDING

Bytes = NDArray[np.uint8]

# The compiled pass makes whole groups of AES blocks.
assert COT_ROUNDING % (COTS_PER_AES_BLOCK * aes_native.GROUP) == 0

_PIECE_COTS = 1 << 15
"""COTs that one thread makes at a time: their rows stay in its second-level cache."""


class LeafStreams:
    """Sums of the streams of many seeds, each AES-128 in counter mode.

    Block b of a stream is the encryption of b, 128 bits little-endian; bit i of the stream belongs
    to COT i.
    """

    def __init__(
        self, layout: TreeLayout, seeds: Bytes, weights: U64, row_map: NDArray[np.int64],
        native: bool | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            layout: the trees.
            seeds: (leaves, 16).
            weights: uint64 (leaves,): rows that a leaf is added to, by bit.
            row_map: (trees, max rows): row of each bit, -1 where there is none.
            native: compiled AES; None: where the processor has it.
        """
        self._layout, self._weights, self._row_map = layout, weights, row_map
        self._native = aes_native.NATIVE if native is None else native
        if self._native:
            self._round_keys = expand_keys(seeds).view(np.uint64)
        else:
            self._ciphers = [AES.new(seed.tobytes(), AES.MODE_ECB) for seed in seeds]

    def sum_rows(self, first_cot: int, rows: U64) -> None:
        """Fill ``rows`` (., W) with the sums for COTs from ``first_cot`` (a multiple of 2048)."""
        counter = first_cot // COTS_PER_AES_BLOCK
        if self._native:
            extension_kernels.expand_trees(
                self._round_keys, self._weights, self._layout.leaf_starts, self._row_map,
                counter, rows,
            )  # fmt: skip
            return
        blocks = np.zeros((rows.shape[1] // 2, 2), np.uint64)
        blocks[:, 0] = np.arange(counter, counter + len(blocks), dtype=np.uint64)
        plain = blocks.tobytes()
        rows[:] = 0
        trees = np.repeat(np.arange(self._layout.num_trees), np.diff(self._layout.leaf_starts))
        for cipher, weight, tree in zip(self._ciphers, self._weights, trees, strict=True):
            stream = np.frombuffer(cipher.encrypt(plain), np.uint64)
            for bit, row in enumerate(self._row_map[tree]):
                if row >= 0:
                    rows[row] ^= stream * ((weight >> np.uint64(bit)) & np.uint64(1))


class CpuExtensionReceiver:
    """The receiver's arithmetic: t_j, u_j and the corrections."""

    def __init__(self, layout: TreeLayout, seeds: Bytes, native: bool | None = None) -> None:
        self._layout = layout
        self._streams = LeafStreams(
            layout, seeds, layout.receiver_weights(), layout.row_map(with_sum=True), native
        )

    def block(self, first_cot: int, count: int) -> tuple[U64, Bytes, U64]:
        """COTs ``first_cot`` to ``first_cot + count``, both multiples of 2048.

        Returns:
            t (count, 2), choices uint8 (count,), corrections uint64 (trees - 1, count / 64).
        """
        t = np.empty((count, 2), np.uint64)
        choices = np.empty(count, np.uint8)
        corrections = np.empty((self._layout.num_trees - 1, count // 64), np.uint64)

        def body(lo: int, hi: int) -> None:
            rows = np.empty((128 + self._layout.num_trees, (hi - lo) // 64), np.uint64)
            self._streams.sum_rows(first_cot + lo, rows)
            extension_kernels.transpose_bits(rows[:128], t[lo:hi])
            sums = rows[128:]
            extension_kernels.spread_bits(sums[0], choices[lo:hi])
            np.bitwise_xor(sums[1:], sums[0], out=corrections[:, lo // 64 : hi // 64])

        _in_pieces(body, count)
        return t, choices, corrections


class CpuExtensionSender:
    """The sender's arithmetic: q_j from the corrections."""

    def __init__(
        self, layout: TreeLayout, seeds: Bytes, delta: bytes, native: bool | None = None
    ) -> None:
        """``seeds`` (leaves, 16): those at the indices of ``delta`` may hold anything."""
        self._layout = layout
        weights = layout.sender_weights(delta)
        self._streams = LeafStreams(layout, seeds, weights, layout.row_map(with_sum=False), native)
        bits = np.empty(128, np.uint8)
        extension_kernels.spread_bits(np.frombuffer(delta, np.uint64), bits)
        self._masks = np.uint64(0) - bits.astype(np.uint64)

    def block(self, first_cot: int, count: int, corrections: U64) -> U64:
        """q (count, 2); corrections (trees - 1, count / 64) as the receiver sent them."""
        q = np.empty((count, 2), np.uint64)
        trees = self._layout.tree_of_row

        def body(lo: int, hi: int) -> None:
            rows = np.empty((128, (hi - lo) // 64), np.uint64)
            self._streams.sum_rows(first_cot + lo, rows)
            piece = corrections[:, lo // 64 : hi // 64]
            extension_kernels.add_masked(rows, trees, self._masks, piece)
            extension_kernels.transpose_bits(rows, q[lo:hi])

        _in_pieces(body, count)
        return q


def _in_pieces(body: Callable[[int, int], None], count: int) -> None:
    """``body(lo, hi)`` on pieces of at most ``_PIECE_COTS``, on as many cores as torch may use."""

    def part(lo: int, hi: int) -> None:
        for start in range(lo * COT_ROUNDING, hi * COT_ROUNDING, _PIECE_COTS):
            body(start, min(start + _PIECE_COTS, hi * COT_ROUNDING))

    parallel_for(part, count // COT_ROUNDING, _PIECE_COTS // COT_ROUNDING)
