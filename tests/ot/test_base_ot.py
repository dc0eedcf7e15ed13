"""Endemic OT: both keys, one key, and what each side sees of the other."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest
from ot_helpers import chi_square_z

from otpipe.errors import ProtocolError
from otpipe.ot import base_ot, curve
from otpipe.ot.base_ot import BaseOtReceiver, send_base_ots

SESSION, BINDING = b"s" * 32, b"b" * 64


def test_the_receiver_has_the_chosen_key_only() -> None:
    choices = [secrets.randbelow(2) for _ in range(24)] + [0, 1]
    receiver = BaseOtReceiver(choices, SESSION)
    both, answer = send_base_ots(receiver.first_message, SESSION, BINDING)
    own = receiver.keys(answer, BINDING)
    for choice, key, pair in zip(choices, own, both, strict=True):
        assert key == pair[choice]
        assert key != pair[1 - choice]
    everything = [key for pair in both for key in pair]
    assert len(set(everything)) == len(everything)


def test_keys_depend_on_session_binding_index_and_randomness() -> None:
    receiver = BaseOtReceiver([0, 0], SESSION)
    _, answer = send_base_ots(receiver.first_message, SESSION, BINDING)
    first = receiver.keys(answer, BINDING)
    assert first[0] != first[1]
    assert receiver.keys(answer, b"c" * 64)[0] != first[0]
    again, _ = send_base_ots(receiver.first_message, SESSION, BINDING)
    assert again[0][0] != first[0]
    other, other_answer = send_base_ots(receiver.first_message, b"t" * 32, BINDING)
    assert other[0][0] != receiver.keys(other_answer, BINDING)[0]
    assert BaseOtReceiver([0, 0], SESSION).first_message != receiver.first_message


def coordinates(choice: int, count: int) -> np.ndarray:
    """First message of ``count`` OTs with one choice: (count, side, 64)."""
    message = BaseOtReceiver([choice] * count, os.urandom(32)).first_message
    return np.frombuffer(message, np.uint8).reshape(count, 2, 64)


def test_points_look_alike_whatever_the_choice() -> None:
    """The free and the bound point of a pair have one law: both sides uniform, for both choices."""
    count = 200
    samples = [coordinates(choice, count) for choice in (0, 1)]
    for sample in samples:
        for side in (0, 1):
            assert abs(chi_square_z(sample[:, side])) < 6
    flat = np.concatenate([sample.reshape(-1, 64) for sample in samples])
    assert len(np.unique(flat, axis=0)) == 4 * count
    # Nor does either side's parity of y, or its order by x, tell the choice.
    for feature in (
        lambda sample: sample[:, 0, 63] & 1,
        lambda sample: sample[:, 1, 63] & 1,
        lambda sample: sample[:, 0, 0] < sample[:, 1, 0],
    ):
        difference = feature(samples[0]).mean() - feature(samples[1]).mean()
        assert abs(difference) < 6 * (0.5 / count) ** 0.5


def test_the_senders_point_is_fresh() -> None:
    first = BaseOtReceiver([0], SESSION).first_message
    answers = [send_base_ots(first, SESSION, BINDING)[1] for _ in range(50)]
    assert len(set(answers)) == 50


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_every_received_point_is_checked(which: int) -> None:
    message = bytearray(BaseOtReceiver([0, 1], SESSION).first_message)
    message[64 * which + 40] ^= 1
    with pytest.raises(
        ProtocolError, match=f"Point {which % 2} of base OT {which // 2} is not a point of P-256"
    ):
        send_base_ots(bytes(message), SESSION, BINDING)
    message[64 * which : 64 * which + 64] = bytes(64)
    with pytest.raises(ProtocolError, match="is the point at infinity"):
        send_base_ots(bytes(message), SESSION, BINDING)


def test_the_answer_is_checked() -> None:
    receiver = BaseOtReceiver([0, 1], SESSION)
    with pytest.raises(ProtocolError, match="The base OT point of the sender is the point at inf"):
        receiver.keys(bytes(64), BINDING)
    with pytest.raises(ProtocolError, match="base OT point of the sender is not a point of P-256"):
        receiver.keys(b"\x01" * 64, BINDING)


def test_a_pair_that_cancels_its_oracle_is_refused() -> None:
    """r_0 = -H(r_1) would make key 0 that of the neutral element, whatever the scalar."""
    free = curve.encode_point(curve.times_base(3))
    cancelling = curve.encode_point(-base_ot._oracle(SESSION, 0, 0, free))
    with pytest.raises(ProtocolError, match="Base OT 0 would have the neutral element as key 0"):
        send_base_ots(cancelling + free, SESSION, BINDING)


def test_choices_are_not_printed() -> None:
    assert repr(BaseOtReceiver([0, 1], SESSION)) == "BaseOtReceiver(2 choices hidden)"
