"""The server's side of one use: a slot is answered once, and an exchange counts when it is done."""

from __future__ import annotations

import numpy as np
import pytest

from otpipe.crypto.private_secrets import MaskStream
from otpipe.errors import ProtocolError
from otpipe.protocol.private_messages import SlotSpan
from otpipe.server import mask_ledger
from otpipe.server.mask_ledger import MaskLedger

BATCH, OTHER = b"a" * 16, b"b" * 16
OUT_FEATURES = {3: 5, 4: 7}
BITS = 44


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def prepared(ledger: MaskLedger, batch: bytes = BATCH, num_slots: int = 16) -> dict[int, bytes]:
    """Exchange all maps of a batch; returns the keys."""
    keys = {}
    for index in OUT_FEATURES:
        exchange = ledger.new_exchange(batch, index, num_slots)
        ledger.finish(exchange)
        keys[index] = exchange.key
    return keys


def new_ledger(clock: Clock | None = None) -> MaskLedger:
    return MaskLedger(OUT_FEATURES, BITS, clock or Clock())


def test_a_pass_gets_the_masks_of_its_slots_across_batches() -> None:
    ledger = new_ledger()
    keys = {batch: prepared(ledger, batch) for batch in (BATCH, OTHER)}
    masks = ledger.draw([SlotSpan(BATCH, 13, 3), SlotSpan(OTHER, 0, 2)])
    for index, m in OUT_FEATURES.items():
        want = np.concatenate(
            [
                MaskStream(keys[batch][index], index, m, BITS).rows(first, count)
                for batch, first, count in ((BATCH, 13, 3), (OTHER, 0, 2))
            ]
        )
        np.testing.assert_array_equal(masks.take(index, 0, 4).numpy(), want[:4])
        np.testing.assert_array_equal(masks.take(index, 4, 1).numpy(), want[4:])
    assert len(ledger) == 1, "a batch whose last slot is answered is forgotten"


def test_a_row_is_taken_once() -> None:
    ledger = new_ledger()
    prepared(ledger)
    masks = ledger.draw([SlotSpan(BATCH, 0, 4)])
    masks.take(3, 0, 2)
    for first, count in ((1, 2), (0, 1), (3, 2), (-1, 1)):
        with pytest.raises(ProtocolError, match="a slot is answered once"):
            masks.take(3, first, count)
    masks.take(3, 2, 2)
    masks.take(4, 0, 4)


@pytest.mark.parametrize("span", [(0, 4), (3, 1), (0, 16), (14, 3), (16, 1)])
def test_slots_below_the_mark_or_beyond_the_batch_are_refused(span: tuple[int, int]) -> None:
    ledger = new_ledger()
    prepared(ledger)
    ledger.draw([SlotSpan(BATCH, 2, 2)])
    with pytest.raises(ProtocolError, match="prepare new slots"):
        ledger.draw([SlotSpan(BATCH, *span)])
    ledger.draw([SlotSpan(BATCH, 4, 1)])


def test_one_pass_cannot_name_a_slot_twice() -> None:
    ledger = new_ledger()
    prepared(ledger)
    with pytest.raises(ProtocolError, match="a slot is answered once"):
        ledger.draw([SlotSpan(BATCH, 0, 2), SlotSpan(BATCH, 1, 1)])


def test_an_incomplete_or_unknown_batch_is_refused() -> None:
    ledger = new_ledger()
    ledger.finish(ledger.new_exchange(BATCH, 3, 16))
    for batch in (BATCH, OTHER):
        with pytest.raises(ProtocolError, match="restarted, or forgot them"):
            ledger.draw([SlotSpan(batch, 0, 1)])


def test_a_repeated_exchange_has_other_masks() -> None:
    ledger = new_ledger()
    first = prepared(ledger)
    second = prepared(ledger)
    assert all(first[index] != second[index] for index in OUT_FEATURES)
    masks = ledger.draw([SlotSpan(BATCH, 0, 1)])
    want = MaskStream(second[3], 3, OUT_FEATURES[3], BITS).rows(0, 1)
    np.testing.assert_array_equal(masks.take(3, 0, 1).numpy(), want)


def test_an_exchange_for_a_batch_in_use_is_refused() -> None:
    ledger = new_ledger()
    prepared(ledger)
    late = ledger.new_exchange(BATCH, 3, 16)
    ledger.draw([SlotSpan(BATCH, 0, 1)])
    with pytest.raises(ProtocolError, match="begin a new batch"):
        ledger.new_exchange(BATCH, 3, 16)
    with pytest.raises(ProtocolError, match="begin a new batch"):
        ledger.finish(late)


def test_another_size_is_refused() -> None:
    ledger = new_ledger()
    prepared(ledger)
    with pytest.raises(ProtocolError, match="32 slots came for a batch of 16"):
        ledger.new_exchange(BATCH, 3, 32)


def test_old_batches_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_ledger, "MAX_BATCHES", 3)
    clock = Clock()
    ledger = new_ledger(clock)
    for number in range(5):
        prepared(ledger, bytes([number]) * 16)
    assert len(ledger) == 3
    clock.now_s = mask_ledger.MAX_AGE_S
    prepared(ledger, OTHER)
    assert len(ledger) == 1


def test_batches_begun_never_push_out_complete_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small exchange is cheap: a client that begins thousands of batches harms itself alone."""
    monkeypatch.setattr(mask_ledger, "MAX_BATCHES", 6)
    monkeypatch.setattr(mask_ledger, "MAX_INCOMPLETE", 3)
    ledger = new_ledger()
    prepared(ledger)
    for number in range(20):
        ledger.finish(ledger.new_exchange(bytes([number]) * 16, 3, 16))
    assert len(ledger) == 1 + 3
    ledger.draw([SlotSpan(BATCH, 0, 1)])
    ledger.finish(ledger.new_exchange(bytes([19]) * 16, 4, 16))
    ledger.draw([SlotSpan(bytes([19]) * 16, 0, 1)])


def test_keys_are_not_printed() -> None:
    ledger = new_ledger()
    exchange = ledger.new_exchange(BATCH, 3, 16)
    assert repr(exchange.key) not in repr(exchange)
