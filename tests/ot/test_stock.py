"""COTs made before a pass: as many as the last one took, the same at both parties."""

from __future__ import annotations

import pytest
import torch
from ot_helpers import Pair, both, make_pair, random_choices, random_values

from otpipe.ot import Stock


@pytest.fixture
def pair() -> Pair:
    return make_pair()


def one_pass(pair: Pair, stocks: tuple[Stock, Stock], num_rows: int) -> int:
    """COTs that were made inside the pass; it takes 5000 a row, in two rounds."""
    both(lambda: stocks[0].fill(num_rows), lambda: stocks[1].fill(num_rows), pair.server)
    made = pair.client.sent_bytes["ot.corrections"]
    n = 2500 * num_rows
    for _ in range(2):
        values, choices = random_values((n,), 20), random_choices(n)
        sent, got = both(
            lambda values=values: pair.sender.send_correlated(values, 20),
            lambda choices=choices: pair.receiver.receive_correlated(choices, 20),
            pair.server,
        )
        assert torch.equal(got, (sent + choices * values) % (1 << 20))
    for stock in stocks:
        stock.note(num_rows)
    assert pair.sender.available == pair.receiver.available
    assert pair.sender.taken == pair.receiver.taken
    return 8 * (pair.client.sent_bytes["ot.corrections"] - made) // 31


def test_nothing_is_made_in_a_pass_like_the_one_before(pair: Pair) -> None:
    stocks = Stock(pair.sender), Stock(pair.receiver)
    assert one_pass(pair, stocks, 3) >= 15_000  # nobody knows yet what a pass takes
    for num_rows in (3, 1, 1, 2):
        assert one_pass(pair, stocks, num_rows) == 0
    assert pair.sender.taken == 10 * 5000


def test_the_stock_is_bounded(pair: Pair) -> None:
    stocks = Stock(pair.sender, 6000), Stock(pair.receiver, 6000)
    one_pass(pair, stocks, 2)
    one_pass(pair, stocks, 2)
    both(lambda: stocks[0].fill(2), lambda: stocks[1].fill(2))
    assert 6000 <= pair.sender.available < 6000 + 2048
