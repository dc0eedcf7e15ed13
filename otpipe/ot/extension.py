"""Correlated OT extension: SoftSpokenOT (Roy, CRYPTO 2022), semi-honest, over subfields of F_2^128.

Tree i of the receiver has the seeds r_x, x in F_{2^d} (d = k, or what is left of 128 in the last
tree); the sender knows all but that of x = Delta_i. Each seed is expanded to a stream of bits, one
for each COT. With these (small-field VOLE, figure 7):

    receiver:  u_i = sum_x r_x,  v_i = sum_x x r_x       sender:  w_i = sum_x (Delta_i - x) r_x

so that w_i = v_i + Delta_i u_i, and the sender needs no unknown seed, as its weight is zero.
Addition is xor; an element x is a row of d bits, so v_i and w_i are d rows of bits, u_i is one.
The receiver makes all u_i equal (a repetition code): u = u_0 are the random choices, it sends
c_i = u_i + u_0 for the other trees, and the sender adds Delta_i c_i to w_i. Each c_i is masked by a
stream that the sender does not have. Now the rows of all trees, stacked to 128, transposed, are

    sender: q_j    receiver: t_j, u_j    with    q_j = t_j + u_j Delta,

one COT for each column j. k = 1 is IKNP. Streams are AES-128 in counter mode under the seed.

Shape suffixes: B COTs of one block, W = B / 64 words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from otpipe.ot.params import COT_ROUNDING, OtParams

U64 = NDArray[np.uint64]

BLOCK_COTS = 1 << 18
"""COTs of one message: bounds memory and message size."""

COTS_PER_AES_BLOCK = 128


@dataclass(frozen=True)
class TreeLayout:
    """Where the leaves and rows of each tree are.

    Attributes:
        depths: levels, and rows, of each tree.
        leaf_starts: int64 (trees + 1,), first leaf of each tree.
        row_starts: int64 (trees + 1,), first of the 128 rows of each tree; row_starts[i] + j holds
            bit j of the field elements, and is bit row_starts[i] + j of Delta.
    """

    depths: tuple[int, ...]
    leaf_starts: NDArray[np.int64]
    row_starts: NDArray[np.int64]

    @classmethod
    def of(cls, params: OtParams) -> TreeLayout:
        """The layout of a parameter set."""
        depths = params.tree_depths
        sizes = np.array([1 << depth for depth in depths])
        return cls(depths, _starts(sizes), _starts(np.array(depths)))

    @property
    def num_trees(self) -> int:
        """Trees, and u_i."""
        return len(self.depths)

    @property
    def tree_of_row(self) -> NDArray[np.int64]:
        """int64 (128,): the tree of each row."""
        return np.repeat(np.arange(self.num_trees), self.depths)

    def elements(self) -> U64:
        """x of each leaf, uint64 (leaves,)."""
        return np.concatenate([np.arange(1 << d, dtype=np.uint64) for d in self.depths])

    def delta_indices(self, delta: bytes) -> list[int]:
        """Delta_i of each tree: the leaf that the holder of ``delta`` (16 bytes) lacks."""
        value = int.from_bytes(delta, "little")
        return [
            (value >> int(start)) & ((1 << depth) - 1)
            for start, depth in zip(self.row_starts, self.depths, strict=False)
        ]

    def row_map(self, with_sum: bool) -> NDArray[np.int64]:
        """(trees, max depth + 1): row of each bit of a weight, -1 where there is none.

        ``with_sum``: bit d of a weight goes to row 128 + tree, where u_i is collected.
        """
        table = np.full((self.num_trees, max(self.depths) + 1), -1, np.int64)
        for tree, depth in enumerate(self.depths):
            table[tree, :depth] = self.row_starts[tree] + np.arange(depth)
            if with_sum:
                table[tree, depth] = self.row_starts[-1] + tree
        return table

    def receiver_weights(self) -> U64:
        """x, and a one above it, so that the last row sums every leaf."""
        tops = np.repeat([1 << d for d in self.depths], np.diff(self.leaf_starts))
        return self.elements() | tops.astype(np.uint64)

    def sender_weights(self, delta: bytes) -> U64:
        """Delta_i - x of each leaf."""
        own = np.array(self.delta_indices(delta), np.uint64)
        return self.elements() ^ np.repeat(own, np.diff(self.leaf_starts))


def rounded(count: int) -> int:
    """``count`` COTs, rounded up to what is made at a time."""
    return -(-count // COT_ROUNDING) * COT_ROUNDING


def blocks_of(count: int) -> list[int]:
    """Sizes of the messages that make ``count`` COTs (rounded up)."""
    left = rounded(count)
    sizes = []
    while left > 0:
        sizes.append(min(left, BLOCK_COTS))
        left -= sizes[-1]
    return sizes


def correction_bytes(params: OtParams, count: int) -> int:
    """Bytes of the receiver's message for a block of ``count`` COTs, a multiple of 2048."""
    return (params.num_trees - 1) * (count // 8)


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
