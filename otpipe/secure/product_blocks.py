"""In which blocks the attention products of a text are prepared, and what all of them may tell.

Both parties compute the same: the client chooses the next block, the server checks it.

A block has a power of two of positions: ciphertexts hold powers of two of columns, so that other
numbers cost about as much as the next one. One large block is cheaper than several small ones,
since each encrypts all earlier keys and values again; but masks that a text does not use are lost,
and both parties hold them. So a block is as long as the text is expected to go on, where that is
known, and as long as the text so far where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from otpipe.crypto.private_matmul_noise import squared_distance
from otpipe.crypto.private_noise import MAX_LOG2_DISTANCE
from otpipe.errors import ParameterError
from otpipe.secure.rlwe_products import AttentionSizes

MIN_BLOCK, MAX_BLOCK = 16, 256
"""Positions. Fewer than 16 cost the same; more delay the first token for little."""

MAX_BLOCK_BYTES = 4 << 30
"""Of one block in each party, all layers of the model."""


@dataclass(frozen=True)
class ProductBlocks:
    """Blocks of one model.

    Attributes:
        sizes: of every layer.
        num_layers: of the whole model, on all ranks.
        max_positions: of the longest text.
    """

    sizes: AttentionSizes
    num_layers: int
    max_positions: int

    def next_block(self, prepared: int, expected: int) -> int:
        """Positions of the block after ``prepared`` ones of a text that is to have ``expected``.

        expected: more than ``prepared``, and at most ``max_positions``, where the block ends.
        """
        rest = expected - prepared
        count = min(MAX_BLOCK, max(MIN_BLOCK, 1 << (rest - 1).bit_length()))
        while count > MIN_BLOCK and self.block_bytes(prepared, prepared + count) > MAX_BLOCK_BYTES:
            count //= 2
        return min(count, self.max_positions - prepared)

    def block_bytes(self, first: int, stop: int) -> int:
        """Memory of positions first .. stop - 1 in a party that has all layers."""
        return self.num_layers * self.sizes.block_bytes(first, stop)

    def squared_distance(self, first: int, stop: int) -> float:
        """What preparing positions first .. stop - 1 in all layers adds to a ``DistanceBudget``."""
        return _squared_distance(self.sizes, self.num_layers, first, stop)

    def text_distance(self, prepared: int, expected: int) -> float:
        """The same for the largest blocks from ``prepared`` on, of a text of ``expected``."""
        return sum(self.squared_distance(*block) for block in self._blocks(prepared, expected))

    @cached_property
    def max_text(self) -> int:
        """Positions of the longest text that one session may prepare, in the largest blocks."""
        budget, reached = DistanceBudget(self), 0
        for first, stop in self._blocks(0, self.max_positions):
            if not budget.allows(self.squared_distance(first, stop)):
                break
            budget.spend(first, stop)
            reached = stop
        return reached

    def _blocks(self, prepared: int, expected: int) -> Iterator[tuple[int, int]]:
        while prepared < expected:
            stop = prepared + self.next_block(prepared, expected)
            yield prepared, stop
            prepared = stop


class DistanceBudget:
    """What all preparations of one session together may tell: statistical distance 2^-40.

    Squares of distances add up, over the blocks of a text and over texts, as over the exchanges of
    one preparation (``private_matmul_noise``). All layers count, whichever rank has them, since one
    client has the answers of all ranks. Each party counts for itself.
    """

    def __init__(self, blocks: ProductBlocks) -> None:
        self._blocks = blocks
        self._spent = 0.0

    def allows(self, squared: float) -> bool:
        """Whether so much more is within the bound."""
        return self._spent + squared <= 2.0 ** (2 * MAX_LOG2_DISTANCE)

    def spend(self, first: int, stop: int) -> None:
        """Count the preparation of positions first .. stop - 1, before it begins.

        Raises:
            ParameterError: it would tell too much.
        """
        squared = self._blocks.squared_distance(first, stop)
        if not self.allows(squared):
            total = math.log2(self._spent + squared) / 2
            raise ParameterError(
                f"Attention products of positions {first} to {stop - 1} would bring what this "
                f"session tells about masks to a statistical distance of 2^{total:.1f}, above "
                f"2^{MAX_LOG2_DISTANCE:.0f}; begin a new text in a new session."
            )
        self._spent += squared


@cache
def _squared_distance(sizes: AttentionSizes, num_layers: int, first: int, stop: int) -> float:
    heads = num_layers * sizes.heads.num_kv_heads
    return heads * sum(squared_distance(plan) for plan in sizes.plans(first, stop))
