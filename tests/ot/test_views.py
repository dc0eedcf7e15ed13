"""No message tells the other party's secret, and the checks that say so find planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ot_helpers import Pair, both, looks_uniform, make_pair, no_row_repeats, recorded_pair
from ot_views import TweakRecorder, choice_views, faults_of, message_views, send_zeros

from otpipe.kernels import aes_native
from otpipe.ot import pads, pads_cpu, receiver, sender_cpu
from otpipe.ot.extension import TreeLayout
from otpipe.ot.extension_cpu import CpuExtensionReceiver
from otpipe.ot.pads import TweakLedger
from otpipe.ot.pool import CotPool


def answers_of_zeros() -> np.ndarray:
    pair, server, _ = recorded_pair()
    return send_zeros(pair, server).reshape(-1, 8)


# --- sound sessions ------------------------------------------------------------------------------


def test_the_sender_sees_nothing_of_the_choices() -> None:
    assert faults_of(choice_views()) == set()


def test_the_receiver_sees_nothing_of_other_messages() -> None:
    assert faults_of(message_views()) == set()


def test_pads_never_repeat() -> None:
    answers = answers_of_zeros()
    assert no_row_repeats(answers)
    assert looks_uniform(answers)


def test_pads_of_one_transfer_are_independent() -> None:
    """No sum of two or of four of its pads is constant or repeats: the offsets are not linear."""
    quads = answers_of_zeros().view(np.uint64).reshape(-1, 4)
    for subset in ((0, 1), (1, 2), (0, 3), (0, 1, 2, 3)):
        total = np.bitwise_xor.reduce(quads[:, subset], axis=1)
        assert looks_uniform(total.view(np.uint8).reshape(-1, 8))
        assert no_row_repeats(total.view(np.uint8).reshape(-1, 8))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[TweakRecorder]:
    """Both parties on the portable path, their tweaks recorded."""
    recorder = TweakRecorder()
    monkeypatch.setattr(aes_native, "NATIVE", False)
    monkeypatch.setattr(pads_cpu, "_tmmo_portable", recorder)
    yield recorder


def use_session(pair: Pair, times: int) -> None:
    """Every kind of call, several times."""
    for _ in range(times):
        both(
            lambda: pair.sender.send_correlated(torch.zeros((20, 5), dtype=torch.int64), 40),
            lambda: pair.receiver.receive_correlated(torch.zeros(20, dtype=torch.uint8), 40, 5),
            pair.server,
        )
        both(lambda: pair.sender.send_random(33, 64), lambda: pair.receiver.receive_random(33, 64))
        both(
            lambda: pair.sender.send_one_of_many(torch.zeros((9, 8), dtype=torch.int64), 7),
            lambda: pair.receiver.receive_one_of_many(torch.zeros(9, dtype=torch.uint8), 3, 7),
            pair.server,
        )


def repeats(recorder: TweakRecorder) -> int:
    """Tweaks of ``use_session`` that came too often; the receiver repeats one of each."""
    once = len(set(recorder.seen))
    from_receiver = 3 * (20 * 2 + 33 + 9)
    assert len(recorder.seen) == 3 * (20 * 2 * 2 + 33 * 2 + 9 * 8) + from_receiver
    return len(recorder.seen) - from_receiver - once


def test_tweaks_never_repeat(recorder: TweakRecorder) -> None:
    use_session(make_pair(), 3)
    assert repeats(recorder) == 0


# --- planted faults ------------------------------------------------------------------------------


def test_unmasked_choices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "masked_choices", lambda choices, randoms: choices)
    assert faults_of(choice_views()) == {"ot.choices, b = 1", "ot.choices, b = 8"}


def test_choices_masked_twice_with_the_same_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeating(choices: np.ndarray, randoms: np.ndarray) -> np.ndarray:
        return choices ^ np.resize(randoms[:256], randoms.shape)

    monkeypatch.setattr(receiver, "masked_choices", repeating)
    assert "ot.choices, b = 8" in faults_of(choice_views())


def test_unmasked_corrections_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All trees with one seed list: every u_i is the same, and the corrections are zero."""
    original = CpuExtensionReceiver.__init__

    def same_seeds(
        self: CpuExtensionReceiver,
        layout: TreeLayout,
        seeds: np.ndarray,
        native: bool | None = None,
    ) -> None:
        original(self, layout, np.tile(seeds[:16], (32, 1)), native)

    monkeypatch.setattr(CpuExtensionReceiver, "__init__", same_seeds)
    assert {"ot.corrections, b = 1", "ot.corrections, b = 8"} <= faults_of(choice_views())


def test_reused_transfers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """COTs handed out twice, behind a ledger that does not look: the same pads come again."""
    original = CotPool.take

    def again(self: CotPool, count: int) -> object:  # type: ignore[type-arg]
        taken = original(self, count)
        if not hasattr(self, "first_taken"):
            self.first_taken = taken  # type: ignore[attr-defined]
        return self.first_taken  # type: ignore[attr-defined]

    monkeypatch.setattr(CotPool, "take", again)
    with pytest.raises(RuntimeError, match="Hash tweak 0 was used before"):
        answers_of_zeros()
    monkeypatch.setattr(TweakLedger, "claim", lambda *_: None)
    assert not no_row_repeats(answers_of_zeros())


def test_reused_tweaks_are_found(monkeypatch: pytest.MonkeyPatch, recorder: TweakRecorder) -> None:
    """Fresh COTs under old tweaks: the pads differ, so only the record of tweaks can tell."""
    original = CotPool.take

    def stuck(self: CotPool, count: int) -> object:  # type: ignore[type-arg]
        return 0, original(self, count)[1]

    monkeypatch.setattr(CotPool, "take", stuck)
    with pytest.raises(RuntimeError, match="Hash tweak 0 was used before in this session"):
        use_session(make_pair(), 3)
    recorder.seen.clear()
    monkeypatch.setattr(TweakLedger, "claim", lambda *_: None)
    use_session(make_pair(), 3)
    assert repeats(recorder) > 0


def test_a_constant_tweak_is_found(
    monkeypatch: pytest.MonkeyPatch, recorder: TweakRecorder
) -> None:
    def constant(x: Any, indices: Any, out: Any, key: bytes, numbers: Any) -> None:
        recorder(x, indices, out, key, 0 * numbers)

    monkeypatch.setattr(pads_cpu, "_tmmo_portable", constant)
    use_session(make_pair(), 3)
    assert repeats(recorder) > 0


@pytest.mark.parametrize("delta", ["zero", "same power"])
def test_pads_without_an_offset_are_found(monkeypatch: pytest.MonkeyPatch, delta: str) -> None:
    """No offsets, or one for two indices: some pads of a transfer have one input."""

    def broken(secret: bytes, index_bits: int) -> np.ndarray:
        table = pads.offset_table(bytes(16) if delta == "zero" else secret, index_bits)
        if delta == "same power":
            table = table.copy()
            table[2] = table[1]
        return table

    monkeypatch.setattr(sender_cpu, "offset_table", broken)
    pair, server, _ = recorded_pair()
    quads = send_zeros(pair, server).view(np.uint64).reshape(-1, 4)
    # the tweak still separates the pads, so nothing repeats on the wire ...
    assert no_row_repeats(quads.view(np.uint8).reshape(-1, 8))
    # ... but the receiver can compute another pad than its own
    assert opened_besides_the_choice(pair)


def opened_besides_the_choice(pair: Pair) -> bool:
    """Whether a curious receiver, hashing its own key under other indices, opens other messages."""
    n = 512
    own = pair.receiver
    index = torch.zeros(n, dtype=torch.int64)
    messages = torch.arange(4).repeat(n, 1) + 1000
    recorded: list[np.ndarray] = []
    end = own._channel
    receive = end.receive

    def keep(label: str, num_bytes: int) -> np.ndarray:
        recorded.append(receive(label, num_bytes))
        return recorded[-1]

    end.receive = keep
    taken: list[tuple[int, tuple[np.ndarray, ...]]] = []
    take = own._pool.take

    def remember(count: int) -> object:
        taken.append(take(count))
        return taken[-1]

    own._pool.take = remember
    both(
        lambda: pair.sender.send_one_of_many(messages, 64),
        lambda: own.receive_one_of_many(index, 2, 64),
    )
    first, (keys, bits) = taken[0]
    randoms = bits.reshape(n, 2) @ np.array([1, 2], np.uint8)
    bases = pads_cpu.combine(keys, 2)
    answers = recorded[-1].view(np.uint64).reshape(n, 4)
    hashes = pads_cpu.CpuHash(own._masks._hash._session, TweakLedger(own.params))
    for step in (1, 2, 3):
        tried = (randoms ^ step).astype(np.uint8)
        opened = answers[:, step] ^ hashes.chosen_pads(bases, tried, first, 2, 1)[:, 0]
        if (opened == 1000 + step).sum() > n // 16:  # a planted fault opens a quarter
            return True
    return False


def test_a_curious_receiver_opens_only_its_choice() -> None:
    assert not opened_besides_the_choice(make_pair())
