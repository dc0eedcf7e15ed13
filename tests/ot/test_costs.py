"""Bytes computed from parameters are the bytes that a channel counted; so are the tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from ot_helpers import both, make_pair, random_choices, random_values

from otpipe.ot import ReceiveCorrelated, ReceiveOneOfMany, SendCorrelated, SendOneOfMany
from otpipe.ot.costs import (
    Traffic,
    bits_per_transfer,
    exchange_traffic,
    extension_traffic,
    setup_traffic,
)
from otpipe.ot.params import DEFAULT_OT_PARAMS, OT_PARAMS, OtParams
from otpipe.ot.plan import MESSAGE_BYTES, Shape, answer_messages, choice_messages

DOCUMENT = (Path(__file__).parents[2] / "docs" / "ot.md").read_text()


@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
def test_setup_and_extension(params: OtParams) -> None:
    pair = make_pair(params)
    counted = Traffic(pair.client.sent_bytes.total(), pair.server.sent_bytes.total())
    assert counted == setup_traffic(params)
    for count in (1, 5000):
        before = pair.client.sent_bytes.total()
        both(lambda n=count: pair.sender.extend(n), lambda n=count: pair.receiver.extend(n))
        after = pair.client.sent_bytes.total()
        assert extension_traffic(params, count) == Traffic(after - before, 0)
    made = pair.sender.available
    assert made == pair.receiver.available == 2048 + 6144
    assert 8 * pair.client.sent_bytes["ot.corrections"] == made * params.extension_bits
    assert params.extension_bits == math.ceil(128 / params.k) - 1


@pytest.mark.parametrize(
    ("n", "index_bits", "words", "bits"),
    [(1, 1, 1, 1), (77, 1, 5, 13), (33, 4, 1, 3), (9, 8, 2, 44)],
)
def test_exchanges(n: int, index_bits: int, words: int, bits: int) -> None:
    pair = make_pair()
    both(lambda: pair.sender.extend(2048), lambda: pair.receiver.extend(2048))
    shapes = [Shape(True, n, 1, words, bits), Shape(False, n, index_bits, words, bits)]
    before = pair.client.sent_bytes.total(), pair.server.sent_bytes.total()
    both(
        lambda: pair.sender.exchange([
            SendCorrelated(random_values((n, words)), bits),
            SendOneOfMany(random_values((n, 1 << index_bits, words)), bits),
        ]),
        lambda: pair.receiver.exchange([
            ReceiveCorrelated(random_choices(n), bits, words),
            ReceiveOneOfMany(random_choices(n, index_bits), index_bits, bits, words),
        ]),
    )  # fmt: skip
    counted = Traffic(
        pair.client.sent_bytes.total() - before[0], pair.server.sent_bytes.total() - before[1]
    )
    assert counted == exchange_traffic(shapes)
    # no padding of single elements
    assert counted.to_receiver == -(-n * words * bits // 8) + -(
        -n * words * bits * 2**index_bits // 8
    )
    assert counted.to_sender == -(-n // 8) + -(-n * index_bits // 8)


def test_traffic_adds() -> None:
    assert Traffic(1, 2) + Traffic(10, 20) == Traffic(11, 22)


def test_messages_are_bounded_and_cover_everything() -> None:
    shapes = [
        Shape(True, 1_000_003, 1, 3, 44),
        Shape(False, 0, 8, 1, 64),
        Shape(False, 100_001, 8, 2, 37),
        Shape(False, 17, 8, 256, 64),
        Shape(True, 100_001, 46, 3, 46),
        Shape(True, 5, 1, 1, 1),
    ]
    messages = answer_messages(shapes)
    done = [0] * len(shapes)
    for pieces in messages:
        size = sum(shapes[p.request].answer_bytes(p.hi - p.lo) for p in pieces)
        assert 0 < size <= MESSAGE_BYTES
        for piece in pieces:
            assert piece.lo == done[piece.request] < piece.hi
            assert piece.lo % 8 == 0
            done[piece.request] = piece.hi
    assert done == [shape.count for shape in shapes]
    total = sum(shapes[p.request].answer_bytes(p.hi - p.lo) for pieces in messages for p in pieces)
    assert total == exchange_traffic(shapes).to_receiver
    sizes = choice_messages([Shape(True, 40_000_000, 1, 1, 1)])
    assert (sum(sizes), max(sizes)) == (5_000_000, MESSAGE_BYTES)


def table_rows(first_cell: str) -> list[list[str]]:
    """Rows of the document's tables whose first cell is ``first_cell``."""
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() == first_cell]


@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
def test_documented_parameter_sets(params: OtParams) -> None:
    (row,) = table_rows(f"`{params.name}`")
    assert [int(cell) for cell in row[1:]] == [
        params.k,
        params.num_trees,
        params.num_leaves,
        params.extension_bits,
        params.num_leaves // 128,
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("correlated, 44 bits", Shape(True, 1, 1, 1, 44)),
        ("correlated row, 128 words of 44 bits", Shape(True, 1, 1, 128, 44)),
        ("product, 22 bits of a factor, 40 bits", Shape(True, 1, 22, 1, 40)),
        ("chosen, 1 bit", Shape(False, 1, 1, 1, 1)),
        ("one of 16, 2 bits", Shape(False, 1, 4, 1, 2)),
        ("one of 256, 37 bits", Shape(False, 1, 8, 1, 37)),
        ("one of 256, 2 words of 44 bits", Shape(False, 1, 8, 2, 44)),
    ],
)
def test_documented_costs(name: str, shape: Shape) -> None:
    (row,) = table_rows(name)
    up, down = bits_per_transfer(DEFAULT_OT_PARAMS, shape)
    assert [int(cell) for cell in row[1:]] == [shape.index_bits, int(up), int(down)]


def test_documented_setup() -> None:
    traffic = setup_traffic(DEFAULT_OT_PARAMS)
    assert f"{traffic.to_receiver} bytes from the sender and {traffic.to_sender}" in DOCUMENT


def test_documented_limits() -> None:
    params = DEFAULT_OT_PARAMS
    for name, got in (
        ("COTs of a session", params.log2_max_cots),
        ("COTs under one key of the hash", params.log2_epoch),
        ("unknown pads of one block under one key, q", params.log2_pads_per_epoch()),
        ("unknown pads of one block in a session, Q", params.log2_pads_per_epoch() + 24),
        ("advantage against pads, p = 2^64", params.log2_hash_advantage(64)),
        ("advantage against pads, p = 2^80", params.log2_hash_advantage(80)),
        ("the same, pads of 128 blocks, p = 2^64", params.log2_hash_advantage(64, 128)),
        ("advantage against streams, p = 2^64", params.log2_stream_advantage(64)),
        ("advantage against streams, p = 2^80", params.log2_stream_advantage(80)),
    ):
        (row,) = table_rows(name)
        assert row[1] == f"2^{got:.0f}", name
