"""The in-process channel: order, counters, and no hanging."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from otpipe.errors import ConnectionLost, ProtocolError
from otpipe.ot import local_channels
from otpipe.ot.channel import label_kind


def octets(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def test_order_counters_and_rounds() -> None:
    server, client = local_channels()
    client.send("question@0", octets(1, 2, 3))
    client.send("question@3", octets(4))
    assert server.receive("question@0", 3).tolist() == [1, 2, 3]
    assert server.receive("question@3", 1).tolist() == [4]
    server.send("answer", octets(5, 6))
    assert client.receive("answer", 2).tolist() == [5, 6]
    client.send("question@9", octets())
    assert server.receive("question@9", 0).size == 0
    assert client.sent_bytes == {"question": 4}
    assert client.sent_messages == {"question": 3}
    assert server.sent_bytes == {"answer": 2}
    assert (server.rounds, client.rounds) == (2, 1)


def test_payloads_are_copies() -> None:
    server, client = local_channels()
    payload = octets(1, 2)
    client.send("x", payload)
    payload[:] = 9
    got = server.receive("x", 2)
    assert got.tolist() == [1, 2]
    got[:] = 7  # the receiver owns it


def test_label_and_length_must_be_those_that_are_due() -> None:
    server, client = local_channels()
    client.send("a@1", octets(1))
    with pytest.raises(
        ProtocolError, match="sent 'a@1' where 'a@2' is due: the two parties are out"
    ):
        server.receive("a@2", 1)
    client.send("b", octets(1))
    with pytest.raises(ProtocolError, match="sent 1 bytes as 'b' where 2 are due"):
        server.receive("b", 2)
    with pytest.raises(TypeError, match=r"A payload is uint8 \(bytes,\), not int64"):
        client.send("c", np.zeros(1, np.int64))


def test_silence_raises() -> None:
    server, _ = local_channels(0.05)
    started = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"The server waited 0.05 s for 'a' in vain; look at"):
        server.receive("a", 1)
    assert time.monotonic() - started < 5


def test_closing_wakes_a_waiting_peer_and_keeps_what_was_sent() -> None:
    server, client = local_channels(30)
    client.send("last", octets(1))
    errors = []

    def wait() -> None:
        server.receive("last", 1)
        try:
            server.receive("more", 1)
        except ConnectionLost as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert errors == ["The client closed the channel; open a new connection."]
    with pytest.raises(ConnectionLost, match="The client closed the channel"):
        server.send("x", octets(1))


def test_label_kinds() -> None:
    assert [label_kind(label) for label in ("a.b@12.3", "a", "a@")] == ["a.b", "a", "a"]
