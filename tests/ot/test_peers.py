"""Peers that are broken, hostile or out of step: each message they get wrong stops the session."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ot_helpers import Pair, both, make_pair, random_choices, random_values

from otpipe.errors import ConnectionLost, ProtocolError
from otpipe.ot import (
    LocalChannel,
    OtReceiver,
    OtSender,
    ReceiveCorrelated,
    SendCorrelated,
    local_channels,
)
from otpipe.ot.handshake import HELLO_BYTES
from otpipe.ot.params import OT_PARAMS


def ends(timeout_s: float = 20) -> tuple[LocalChannel, LocalChannel]:
    return local_channels(timeout_s)


def test_parties_with_different_parameters() -> None:
    server, client = ends()
    sender = OtSender(server, params=OT_PARAMS["softspoken4"])
    receiver = OtReceiver(client, params=OT_PARAMS["softspoken8"])
    with pytest.raises(
        ProtocolError,
        match=r"The sender uses SoftSpokenOT with k = 4, this side k = 8; use the same",
    ):
        both(sender.setup, receiver.setup, server)


class Meddler(LocalChannel):
    """A channel end that changes what it sends."""

    def __init__(self, end: LocalChannel, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
        self.__dict__.update(end.__dict__)
        self.change = change

    def send(self, label: str, payload: np.ndarray) -> None:
        super().send(label, self.change(label, payload.copy()))


def set_up_with(change: Callable[[str, np.ndarray], np.ndarray], from_server: bool) -> None:
    server, client = ends()
    if from_server:
        server = Meddler(server, change)
    else:
        client = Meddler(client, change)
    both(OtSender(server).setup, OtReceiver(client).setup, server)


def overwritten(at: int, octets: bytes) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(label: str, payload: np.ndarray) -> np.ndarray:
        payload[at : at + len(octets)] = np.frombuffer(octets, np.uint8)
        return payload

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwritten(HELLO_BYTES, b"\x01" * 64), "Point 0 of base OT 0 is not a point of P-256"),
        (
            overwritten(HELLO_BYTES + 64 * 255, bytes(64)),
            "Point 1 of base OT 127 is the point at inf",
        ),
        (
            overwritten(2, b"\x07"),
            "The sender does not speak version 1 of the OT setup; use the same",
        ),
        (overwritten(3, b"\x02"), "The sender uses SoftSpokenOT with k = 2, this side k = 4"),
        (
            lambda _, payload: payload[:-1],
            "sent 16419 bytes as 'ot.setup.sender@0' where 16420 are",
        ),
        (lambda _, payload: payload[:0], "sent 0 bytes as 'ot.setup.sender@0' where 16420 are due"),
    ],
)
def test_a_sender_whose_setup_is_malformed(
    change: Callable[[str, np.ndarray], np.ndarray], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        set_up_with(change, from_server=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            overwritten(HELLO_BYTES, bytes(64)),
            "base OT point of the sender is the point at infinity",
        ),
        (
            overwritten(HELLO_BYTES, b"\xff" * 64),
            "base OT point of the sender is not a point of P-256",
        ),
        (overwritten(0, b"HTTP"), "The receiver does not speak version 1 of the OT setup"),
        (overwritten(3, b"\x01"), "The receiver uses SoftSpokenOT with k = 1, this side k = 4"),
        (
            lambda _, payload: payload[:100],
            "sent 100 bytes as 'ot.setup.receiver@0' where 4196 are",
        ),
    ],
)
def test_a_receiver_whose_setup_is_malformed(
    change: Callable[[str, np.ndarray], np.ndarray], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        set_up_with(change, from_server=False)


def shortened(kind: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda label, payload: payload[:-1] if label.startswith(kind) else payload


def meddled_pair(change: Callable[[str, np.ndarray], np.ndarray]) -> Pair:
    server, client = (Meddler(end, change) for end in ends())
    sender, receiver = OtSender(server), OtReceiver(client)
    both(sender.setup, receiver.setup)
    return Pair(sender, receiver, server, client)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ot.corrections", "sent 7935 bytes as 'ot.corrections@0' where 7936 are due; open a new"),
        ("ot.choices", "sent 4 bytes as 'ot.choices@0.0' where 5 are due; open a new connection"),
        (
            "ot.answers",
            "sent 219 bytes as 'ot.answers@0.0' where 220 are due; open a new connection",
        ),
    ],
)
def test_short_messages(kind: str, message: str) -> None:
    pair = meddled_pair(shortened(kind))
    with pytest.raises(ProtocolError, match=message):
        both(
            lambda: pair.sender.send_correlated(random_values((40,), 44), 44),
            lambda: pair.receiver.receive_correlated(random_choices(40), 44),
            pair.server,
        )


def test_parties_that_make_different_calls() -> None:
    """A count that differs is found at the next message, though random OT itself sends none."""
    pair = make_pair()
    both(lambda: pair.sender.extend(2048), lambda: pair.receiver.extend(2048))
    both(lambda: pair.sender.send_random(10, 8), lambda: pair.receiver.receive_random(9, 8))
    with pytest.raises(
        ProtocolError,
        match=r"sent 'ot.choices@9.0' where 'ot.choices@10.0' is due: the two parties are out",
    ):
        both(
            lambda: pair.sender.send_correlated(random_values((8,), 8), 8),
            lambda: pair.receiver.receive_correlated(random_choices(8), 8),
            pair.server,
        )


def test_requests_that_do_not_meet() -> None:
    pair = make_pair()
    with pytest.raises(ProtocolError, match=r"sent 40 bytes as 'ot.answers@0.0' where 35 are due"):
        both(
            lambda: pair.sender.exchange([SendCorrelated(random_values((40,), 8), 8)]),
            lambda: pair.receiver.exchange([ReceiveCorrelated(random_choices(40), 7)]),
            pair.server,
        )


def test_a_peer_that_is_gone() -> None:
    pair = make_pair()
    pair.server.close()
    with pytest.raises(
        ConnectionLost, match="The server closed the channel; open a new connection"
    ):
        pair.receiver.extend(1)
    with pytest.raises(ConnectionLost, match="The server closed the channel"):
        pair.sender.extend(1)
