"""Calls that are out of order or out of range: each stops with its sentence."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ot_helpers import both, make_pair, random_choices

from otpipe.errors import ConnectionLost, OtpipeError, ParameterError, ProtocolError
from otpipe.ot import (
    LocalChannel,
    OtParams,
    OtReceiver,
    OtSender,
    ReceiveCorrelated,
    SendCorrelated,
    extension,
    local_channels,
)

SENDER_CALLS: dict[str, Callable[[OtSender], object]] = {
    "extend": lambda sender: sender.extend(1),
    "send_random": lambda sender: sender.send_random(1, 8),
    "exchange": lambda sender: sender.send_correlated(torch.zeros(1, dtype=torch.int64), 8),
}
RECEIVER_CALLS: dict[str, Callable[[OtReceiver], object]] = {
    "extend": lambda receiver: receiver.extend(1),
    "receive_random": lambda receiver: receiver.receive_random(1, 8),
    "exchange": lambda receiver: receiver.receive_correlated(random_choices(1), 8),
}


def ends(timeout_s: float = 20) -> tuple[LocalChannel, LocalChannel]:
    return local_channels(timeout_s)


@pytest.mark.parametrize("name", SENDER_CALLS)
def test_sender_before_setup(name: str) -> None:
    sender = OtSender(ends()[0])
    with pytest.raises(
        RuntimeError, match=rf"OtSender.{name} was called before setup\(\); call setup\(\) first"
    ):
        SENDER_CALLS[name](sender)


@pytest.mark.parametrize("name", RECEIVER_CALLS)
def test_receiver_before_setup(name: str) -> None:
    receiver = OtReceiver(ends()[1])
    with pytest.raises(
        RuntimeError, match=rf"OtReceiver.{name} was called before setup\(\); call setup\(\) first"
    ):
        RECEIVER_CALLS[name](receiver)


def test_setup_twice() -> None:
    pair = make_pair()
    for party in (pair.sender, pair.receiver):
        with pytest.raises(RuntimeError, match=r"setup was called a second time; once is enough"):
            party.setup()


def test_a_session_is_over_after_an_error() -> None:
    pair = make_pair(timeout_s=0.05)
    with pytest.raises(
        ConnectionLost, match=r"server waited 0.05 s for 'ot.corrections@0' in vain"
    ):
        pair.sender.extend(1)
    for call in (*SENDER_CALLS.values(), OtSender.setup):
        with pytest.raises(
            RuntimeError, match=r"after an error ended this session; open a new connection"
        ):
            call(pair.sender)


def test_two_threads_in_one_session() -> None:
    pair = make_pair(timeout_s=1)
    started, errors = threading.Event(), []

    def waiting() -> None:
        started.set()
        try:
            pair.sender.extend(1)
        except ConnectionLost as error:
            errors.append(error)

    thread = threading.Thread(target=waiting)
    thread.start()
    started.wait()
    while pair.sender._turn._lock.acquire(blocking=False):
        pair.sender._turn._lock.release()
    with pytest.raises(
        RuntimeError, match=r"OtSender.send_random was called while another call of this session"
    ):
        pair.sender.send_random(1, 8)
    thread.join()
    assert len(errors) == 1


def test_a_forked_process_cannot_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    monkeypatch.setattr(os, "getpid", lambda: 0)
    with pytest.raises(
        RuntimeError, match=r"in another process than the one that made the session"
    ):
        pair.receiver.extend(1)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_sessions_are_not_copied(duplicate: Callable[[object], object]) -> None:
    pair = make_pair()
    for party in (pair.sender, pair.receiver):
        with pytest.raises(TypeError, match="holds secrets of one connection and is never pickled"):
            duplicate(party)


def test_reused_tweaks_stop_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that hands out the same COTs again is stopped at the hash, on both sides."""
    pair = make_pair()
    both(lambda: pair.sender.send_random(10, 8), lambda: pair.receiver.receive_random(10, 8))
    message = r"Hash tweak 0 was used before in this session, whose next one is 10; a tweak used"
    for party, name in ((pair.sender, "send_random"), (pair.receiver, "receive_random")):
        pool = party._pool
        pool.num_taken, pool._used_of_first = 0, 0
        with pytest.raises(RuntimeError, match=message):
            getattr(party, name)(10, 8)
        with pytest.raises(RuntimeError, match="after an error ended this session"):
            getattr(party, name)(10, 8)


def test_an_exhausted_session_stops_before_anything_is_sent() -> None:
    pair = make_pair(OtParams("small", 4, log2_epoch=10, log2_max_cots=12))
    both(lambda: pair.sender.extend(4096), lambda: pair.receiver.extend(4096))
    both(lambda: pair.sender.send_random(4096, 8), lambda: pair.receiver.receive_random(4096, 8))
    sent = pair.client.sent_bytes.total()
    message = "This OT session would pass its limit of 4096 transfers; open a new connection"
    with pytest.raises(ParameterError, match=message):
        pair.sender.send_random(1, 8)
    with pytest.raises(ParameterError, match=message):
        pair.receiver.receive_random(1, 8)
    assert pair.client.sent_bytes.total() == sent


def test_a_call_beyond_the_limit_sends_none_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "BLOCK_COTS", 2048)
    pair = make_pair(OtParams("small", 4, log2_epoch=10, log2_max_cots=12))
    both(lambda: pair.sender.extend(2048), lambda: pair.receiver.extend(2048))
    sent = pair.client.sent_bytes.total()
    for party in (pair.receiver, pair.sender):
        with pytest.raises(ParameterError, match="would pass its limit of 4096 transfers"):
            party.extend(4096)
    assert pair.client.sent_bytes.total() == sent


def test_arguments_of_the_sender() -> None:
    sender = make_pair().sender
    ints = torch.zeros(4, dtype=torch.int64)
    for call, message in (
        (lambda: sender.send_correlated(ints.int(), 8), "correlation is torch.int32 on cpu; this"),
        (
            lambda: sender.send_correlated(ints.to("meta"), 8),
            "on meta; this session wants int64 on",
        ),
        (
            lambda: sender.send_correlated(ints[0], 8),
            "correlation has 0 dimensions; give 1 or, with",
        ),
        (lambda: sender.send_correlated(ints, 0), "Values have 1 to 64 bits, not 0"),
        (lambda: sender.send_correlated(ints, 65), "Values have 1 to 64 bits, not 65"),
        (lambda: sender.send_random(1, 65), "Values have 1 to 64 bits, not 65"),
        (lambda: sender.send_random(-1, 8), "makes at least 0 transfers, not -1"),
        (lambda: sender.extend(-1), "extended by at least 0 COTs, not -1"),
        (lambda: sender.send_chosen(ints, ints[:3], 8), r"m0 has shape \(4,\) and m1 \(3,\); give"),
        (lambda: sender.send_one_of_many(ints, 8), "messages has 1 dimensions; give 2 or, with"),
        (
            lambda: sender.send_one_of_many(ints.view(1, 4)[:, :3], 8),
            "among 2, 4, ... 256 messages",
        ),
        (lambda: sender.send_one_of_many(ints.view(4, 1), 8), "1 to 8 index bits, not 0"),
        (lambda: sender.send_one_of_many(torch.zeros((1, 512), dtype=torch.int64), 8), "not 9"),
        (
            lambda: sender.send_one_of_many(ints.view(2, 2, 1)[..., :0], 8),
            "message of 0 words of 8",
        ),
        (
            lambda: sender.send_correlated(torch.zeros((1, 257), dtype=torch.int64), 64),
            "257 words of 64 bits is not possible; use at least one word and at most 16384 bits",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert sender.available == 0  # none of it reached the session


def test_arguments_of_the_receiver() -> None:
    receiver = make_pair().receiver
    for call, message in (
        (lambda: receiver.receive_correlated(torch.zeros(2), 8), "Choices are torch.float32 on"),
        (lambda: receiver.receive_correlated(np.zeros(2), 8), "Choices are float64; give integers"),
        (lambda: receiver.receive_correlated(torch.zeros(2, dtype=torch.complex64), 8),
         "Choices are torch.complex64 on cpu; give integers"),
        (lambda: receiver.receive_correlated(torch.zeros(2, dtype=torch.uint8, device="meta"), 8),
         "on meta; give integers on the CPU"),
        (lambda: receiver.receive_correlated(torch.tensor([0, 2]), 8),
         r"Choices lie in \[0, 2\); at least one of 2 does not"),
        (lambda: receiver.receive_correlated(torch.tensor([-1]), 8), r"Choices lie in \[0, 2\)"),
        (lambda: receiver.receive_one_of_many(torch.tensor([4]), 2, 8), r"Choices lie in \[0, 4\)"),
        (lambda: receiver.receive_one_of_many(torch.tensor([256]), 8, 8), r"in \[0, 256\)"),
        (lambda: receiver.receive_correlated(torch.zeros((2, 2), dtype=torch.uint8), 8),
         "Choices have one dimension, not 2"),
        (lambda: receiver.receive_one_of_many(torch.tensor([0]), 9, 8), "1 to 8 index bits, not 9"),
        (lambda: receiver.receive_random(1, 0), "Values have 1 to 64 bits, not 0"),
        (lambda: receiver.receive_random(-1, 8), "makes at least 0 transfers, not -1"),
        (lambda: receiver.extend(-1), "extended by at least 0 COTs, not -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert receiver.available == 0


# --- secrets -----------------------------------------------------------------------------------


def test_nothing_secret_is_printed() -> None:
    pair = make_pair()
    both(lambda: pair.sender.extend(1), lambda: pair.receiver.extend(1))
    assert repr(pair.sender) == "OtSender(softspoken4, cpu, 2048 COTs)"
    assert repr(pair.receiver) == "OtReceiver(softspoken4, 2048 COTs)"
    parts = [pair.sender._math, pair.receiver._masks, pair.receiver._extension, pair.sender._pool]
    for part in parts:
        assert "object at 0x" in repr(part)
    request = SendCorrelated(torch.tensor([12345]), 8)
    assert "12345" not in repr(request)
    assert "12345" not in repr(ReceiveCorrelated(torch.tensor([12345]), 8))


def test_errors_about_choices_do_not_tell_them() -> None:
    receiver = make_pair().receiver
    with pytest.raises(ValueError, match="at least one of 3 does not") as caught:
        receiver.receive_correlated(torch.tensor([0, 1, 77]), 8)
    assert "77" not in str(caught.value)


def test_errors_of_users_are_of_the_products_kind() -> None:
    assert issubclass(ProtocolError, OtpipeError)
    assert issubclass(ParameterError, OtpipeError)
