"""What the two parties get: every functionality, exhaustively where the domain is small."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ot_helpers import Pair, both, make_pair, random_choices, random_values, reduced

from otpipe.kernels import aes_native
from otpipe.ot import (
    OtParams,
    ReceiveChosen,
    ReceiveCorrelated,
    ReceiveOneOfMany,
    SendChosen,
    SendCorrelated,
    SendOneOfMany,
    plan,
    receiver,
)
from otpipe.ot.params import OT_PARAMS


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def check_one_of_many(pair: Pair, messages: torch.Tensor, index: torch.Tensor, bits: int) -> None:
    index_bits = messages.shape[1].bit_length() - 1
    words = messages.shape[2] if messages.ndim == 3 else None
    _, got = both(
        lambda: pair.sender.send_one_of_many(messages, bits),
        lambda: pair.receiver.receive_one_of_many(index, index_bits, bits, words),
    )
    assert torch.equal(got, reduced(messages[torch.arange(len(index)), index.long()], bits))


def check_correlated(
    pair: Pair, correlation: torch.Tensor, choice: torch.Tensor, bits: int
) -> torch.Tensor:
    words = correlation.shape[1] if correlation.ndim == 2 else None
    x, y = both(
        lambda: pair.sender.send_correlated(correlation, bits),
        lambda: pair.receiver.receive_correlated(choice, bits, words),
    )
    chosen = choice.long().view(-1, *(1,) * (correlation.ndim - 1))
    assert x.shape == y.shape == correlation.shape
    assert torch.equal(y, reduced(x + chosen * correlation, bits))
    return x


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_choice_and_correlation_of_small_rings(pair: Pair, bits: int) -> None:
    repeats = 500
    correlation = torch.arange(1 << bits).repeat_interleave(2).repeat(repeats)
    choice = torch.tensor([0, 1]).repeat(repeats << bits)
    x = check_correlated(pair, correlation, choice, bits)
    # x takes every value of the ring for every input: it is not a function of them
    for column in x.view(repeats, -1).T:
        assert set(column.tolist()) == set(range(1 << bits))


def test_every_choice_and_pair_of_messages_of_a_small_ring(pair: Pair) -> None:
    m0 = torch.arange(4).repeat_interleave(8)
    m1 = torch.arange(4).repeat_interleave(2).repeat(4)
    choice = torch.tensor([0, 1]).repeat(16)
    _, got = both(
        lambda: pair.sender.send_chosen(m0, m1, 2),
        lambda: pair.receiver.receive_chosen(choice, 2),
    )
    assert torch.equal(got, torch.where(choice.bool(), m1, m0))


@pytest.mark.parametrize("index_bits", range(1, 9))
def test_every_index_of_one_of_many(pair: Pair, index_bits: int) -> None:
    n = 1 << index_bits
    messages = random_values((n, n), 37)
    check_one_of_many(pair, messages, torch.arange(n), 37)


@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
def test_every_parameter_set(params: OtParams) -> None:
    pair = make_pair(params)
    check_correlated(pair, random_values((100,), 44), random_choices(100), 44)
    check_one_of_many(pair, random_values((30, 16), 4), random_choices(30, 4), 4)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    bits=st.integers(1, 64),
    words=st.one_of(st.none(), st.integers(1, 5)),
    index_bits=st.integers(1, 6),
)
def test_any_shape(n: int, bits: int, words: int | None, index_bits: int) -> None:
    pair = shared_pair()
    tail = () if words is None else (words,)
    check_correlated(pair, random_values((n, *tail)), random_choices(n), bits)
    messages = random_values((n, 1 << index_bits, *tail))
    check_one_of_many(pair, messages, random_choices(n, index_bits), bits)


_shared: list[Pair] = []


def shared_pair() -> Pair:
    """One session for all examples of a property: they follow each other in one stream."""
    if not _shared:
        _shared.append(make_pair())
    return _shared[0]


def test_random_transfers_have_uniform_choices_and_messages(pair: Pair) -> None:
    n = 20_000
    (m0, m1), (choice, chosen) = both(
        lambda: pair.sender.send_random(n, 3), lambda: pair.receiver.receive_random(n, 3)
    )
    assert torch.equal(chosen, torch.where(choice.bool(), m1, m0))
    assert abs(int(choice.sum()) - n / 2) < 6 * n**0.5 / 2
    cells = torch.bincount(choice.long() * 64 + m0 * 8 + m1, minlength=128).double()
    statistic = float(((cells - n / 128) ** 2).sum() / (n / 128))
    assert abs(statistic - 127) < 6 * (2 * 127) ** 0.5


def test_random_transfers_send_nothing_from_a_full_pool(pair: Pair) -> None:
    both(lambda: pair.sender.extend(5000), lambda: pair.receiver.extend(5000))
    sent = pair.server.sent_bytes.total(), pair.client.sent_bytes.total()
    before = pair.sender.available
    both(lambda: pair.sender.send_random(5000, 64), lambda: pair.receiver.receive_random(5000, 64))
    assert (pair.server.sent_bytes.total(), pair.client.sent_bytes.total()) == sent
    assert pair.sender.available == pair.receiver.available == before - 5000


def test_a_mixed_exchange_is_one_round(pair: Pair) -> None:
    both(lambda: pair.sender.extend(8192), lambda: pair.receiver.extend(8192))
    rounds = pair.client.rounds
    messages_before = pair.server.sent_messages.total(), pair.client.sent_messages.total()
    correlation, rows = random_values((101,), 44), random_values((33, 7), 20)
    m0, m1 = random_values((50,), 13), random_values((50,), 13)
    table = random_values((40, 256, 2), 37)
    choices = [random_choices(101), random_choices(33), random_choices(50), random_choices(40, 8)]
    sent, got = both(
        lambda: pair.sender.exchange([
            SendCorrelated(correlation, 44),
            SendCorrelated(rows, 20),
            SendChosen(m0, m1, 13),
            SendOneOfMany(table, 37),
        ]),
        lambda: pair.receiver.exchange([
            ReceiveCorrelated(choices[0].numpy(), 44),
            ReceiveCorrelated(choices[1], 20, 7),
            ReceiveChosen(choices[2].bool(), 13),
            ReceiveOneOfMany(choices[3].long(), 8, 37, 2),
        ]),
    )  # fmt: skip
    assert pair.client.rounds == rounds + 1
    assert (pair.server.sent_messages.total(), pair.client.sent_messages.total()) == (
        messages_before[0] + 1,
        messages_before[1] + 1,
    )
    assert sent[2:] == [None, None]
    assert sent[0] is not None
    assert sent[1] is not None
    assert torch.equal(got[0], reduced(sent[0] + choices[0] * correlation, 44))
    assert torch.equal(got[1], reduced(sent[1] + choices[1][:, None] * rows, 20))
    assert torch.equal(got[2], torch.where(choices[2].bool(), m1, m0))
    assert torch.equal(got[3], table[torch.arange(40), choices[3].long()])


def test_tensors_of_any_strides(pair: Pair) -> None:
    correlation = random_values((7, 90), 40).T
    assert not correlation.is_contiguous()
    check_correlated(pair, correlation, random_choices(180)[::2], 40)
    check_correlated(pair, random_values((90, 3), 40)[:, 1], random_choices(90), 40)
    check_one_of_many(pair, random_values((8, 50), 40).T, random_choices(50, 3), 40)


def test_nothing_at_all(pair: Pair) -> None:
    available = pair.sender.available
    assert both(lambda: pair.sender.exchange([]), lambda: pair.receiver.exchange([])) == ([], [])
    none, row = torch.empty(0, dtype=torch.int64), torch.empty((0, 4), dtype=torch.int64)
    sent, got = both(
        lambda: pair.sender.exchange([SendCorrelated(none, 8), SendOneOfMany(row, 8)]),
        lambda: pair.receiver.exchange([ReceiveCorrelated(none, 8), ReceiveOneOfMany(none, 2, 8)]),
    )
    assert sent[0] is not None
    assert sent[0].shape == got[0].shape == got[1].shape == (0,)
    m, chosen = both(
        lambda: pair.sender.send_random(0, 8), lambda: pair.receiver.receive_random(0, 8)
    )
    assert m[0].shape == m[1].shape == chosen[0].shape == chosen[1].shape == (0,)
    both(lambda: pair.sender.extend(0), lambda: pair.receiver.extend(0))
    assert pair.sender.available == pair.receiver.available == available


def test_an_empty_request_between_others(pair: Pair) -> None:
    none, correlation = torch.empty(0, dtype=torch.int64), random_values((9,), 5)
    choice = random_choices(9)
    sent, got = both(
        lambda: pair.sender.exchange(2 * [SendCorrelated(correlation, 5), SendCorrelated(none, 8)]),
        lambda: pair.receiver.exchange(
            2 * [ReceiveCorrelated(choice, 5), ReceiveCorrelated(none, 8)]
        ),
    )
    for i in (0, 2):
        x = sent[i]
        assert x is not None
        assert torch.equal(got[i], reduced(x + choice * correlation, 5))


def test_large_exchanges_are_cut_into_bounded_messages(
    monkeypatch: pytest.MonkeyPatch, pair: Pair
) -> None:
    monkeypatch.setattr(plan, "MESSAGE_BYTES", 1000)
    monkeypatch.setattr("otpipe.ot.receiver.MESSAGE_BYTES", 1000)
    before = pair.server.sent_messages.copy()
    check_correlated(pair, random_values((9000,), 11), random_choices(9000), 11)
    check_one_of_many(pair, random_values((500, 8, 3), 19), random_choices(500, 3), 19)
    check_one_of_many(pair, random_values((20, 256, 2), 64), random_choices(20, 8), 64)
    assert pair.server.sent_messages["ot.answers"] - before["ot.answers"] > 30


def test_long_extensions_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setattr("otpipe.ot.extension.BLOCK_COTS", 4096)
    before = pair.client.sent_messages["ot.corrections"]
    both(lambda: pair.sender.extend(20_000), lambda: pair.receiver.extend(20_000))
    assert pair.client.sent_messages["ot.corrections"] - before == 5
    check_correlated(pair, random_values((20_000,), 64), random_choices(20_000), 64)


def test_hash_keys_change_in_the_middle_of_a_call() -> None:
    pair = make_pair(OtParams("short epochs", 4, log2_epoch=10))
    check_correlated(pair, random_values((5000,), 64), random_choices(5000), 64)
    check_one_of_many(pair, random_values((1000, 128), 9), random_choices(1000, 7), 9)


@pytest.mark.skipif(not aes_native.NATIVE, reason="both parties are portable here anyway")
def test_a_party_without_aes_instructions_meets_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CpuExtensionReceiver", "CpuHash"):
        original = getattr(receiver, name)
        monkeypatch.setattr(receiver, name, functools.partial(original, native=False))
    pair = make_pair()
    assert not pair.receiver._masks._hash.native  # type: ignore[union-attr]
    assert pair.sender._math._masks._hash.native  # type: ignore[union-attr]
    check_correlated(pair, random_values((100, 9), 64), random_choices(100), 64)
    check_one_of_many(pair, random_values((30, 64), 50), random_choices(30, 6), 50)


def test_sessions_have_different_secrets() -> None:
    first, second = make_pair(), make_pair()
    deltas = [p.sender._math._offsets[1].tolist() for p in (first, second)]  # type: ignore[union-attr]
    assert deltas[0] != deltas[1]
    assert first.sender._math._masks._hash._session != second.sender._math._masks._hash._session  # type: ignore[union-attr]
