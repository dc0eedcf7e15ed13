"""In which blocks attention products are prepared: sizes, memory, and the bound on all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from two_parties import connect, in_two_threads

from otpipe.crypto.private_matmul_noise import log2_distance
from otpipe.errors import ParameterError
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.product_blocks import (
    MAX_BLOCK,
    MAX_BLOCK_BYTES,
    MIN_BLOCK,
    DistanceBudget,
    ProductBlocks,
)
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts

SMALL = ProductBlocks(AttentionSizes(HeadShapes(4, 2, 4), 40, 51), 3, 1000)
OF_14B = ProductBlocks(AttentionSizes(HeadShapes(40, 8, 128), 40, 51), 48, 8192)


@pytest.mark.parametrize(
    ("prepared", "expected", "count"),
    [
        (0, 1, MIN_BLOCK),
        (0, 16, 16),
        (0, 17, 32),
        (0, 200, 256),
        (0, 257, MAX_BLOCK),
        (256, 266, MIN_BLOCK),
        (16, 48, 32),
        (990, 1000, 10),
        (900, 1000, 100),
    ],
)
def test_a_block_is_as_long_as_the_rest_of_the_text(
    prepared: int, expected: int, count: int
) -> None:
    assert SMALL.next_block(prepared, expected) == count


def test_memory_bounds_the_blocks_of_a_long_text() -> None:
    assert OF_14B.next_block(0, 4096) == MAX_BLOCK
    for prepared in (512, 1024, 2048):
        count = OF_14B.next_block(prepared, 8192)
        assert MIN_BLOCK < count < MAX_BLOCK
        assert OF_14B.block_bytes(prepared, prepared + count) <= MAX_BLOCK_BYTES
        assert OF_14B.block_bytes(prepared, prepared + 2 * count) > MAX_BLOCK_BYTES


def test_the_memory_of_a_block_is_what_it_holds() -> None:
    """In both parties, after each of two blocks."""
    sizes = SMALL.sizes
    parties = connect("ideal")
    made = [
        PreparedProducts("server", parties.server_end, sizes, range(2)),
        PreparedProducts("client", parties.client_end, sizes, range(2)),
    ]
    computed = done = 0
    for count in (3, 2):
        in_two_threads(
            lambda count=count: made[0].prepare(count),  # type: ignore[misc]
            lambda count=count: made[1].prepare(count),  # type: ignore[misc]
            parties.server_end,
        )
        computed += 2 * sizes.block_bytes(done, done + count)
        done += count
        assert [each.held_bytes for each in made] == [computed] * 2


def test_all_preparations_of_a_session_stay_within_one_bound() -> None:
    """Blocks of one text, and texts: squares add up, and the first above 2^-40 is refused."""
    sizes, heads = OF_14B.sizes, 48 * 8
    one = log2_distance((plan, heads) for plan in sizes.plans(0, 256))
    assert one == pytest.approx(math.log2(OF_14B.squared_distance(0, 256)) / 2)
    texts = math.floor(2.0 ** (2 * (-40 - one)))
    budget = DistanceBudget(OF_14B)
    for _ in range(texts):
        assert budget.allows(OF_14B.text_distance(0, 256))
        budget.spend(0, 256)
    assert texts > 20
    assert not budget.allows(OF_14B.text_distance(0, 256))
    with pytest.raises(ParameterError, match=r"2\^-40.0, above 2\^-40; begin a new text in a new"):
        budget.spend(0, 256)
    assert budget.allows(OF_14B.text_distance(0, 16)), "what was refused is not counted"


def test_the_longest_text_is_what_one_session_may_prepare() -> None:
    assert SMALL.max_text == 1000
    longest = OF_14B.max_text
    assert 2048 < longest < OF_14B.max_positions
    assert replace(OF_14B, max_positions=longest).max_text == longest
    assert OF_14B.text_distance(0, longest) <= 2.0**-80
    assert OF_14B.text_distance(0, OF_14B.max_positions) > 2.0**-80
