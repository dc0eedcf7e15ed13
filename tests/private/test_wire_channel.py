"""The channel over frames: what is not due is refused, and no memory is taken for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError, ServerRefused
from otpipe.protocol.messages import Error, MessageType, Ping, message_head, send_message
from otpipe.protocol.private_messages import ChannelMessage
from otpipe.protocol.wire import FrameConnection, frame_head
from otpipe.protocol.wire_channel import SilentPeer, WireChannel

PAYLOAD = np.arange(40, dtype=np.uint8)
Ends = tuple[FrameConnection, WireChannel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A raw connection, and the client's channel at its other end."""
    left, right = socket.socketpair()
    raw, other = FrameConnection(left), FrameConnection(right)
    yield raw, WireChannel(other, "server", 0.3)
    raw.close()
    other.close()


def message(number: int, label: str, payload: np.ndarray = PAYLOAD) -> bytes:
    header = ChannelMessage(number, label).header()
    return frame_head(MessageType.CHANNEL, header, payload.size) + payload.tobytes()


def test_both_ends_carry_messages_and_count_them() -> None:
    left, right = socket.socketpair()
    server = WireChannel(FrameConnection(left), "client", 1.0)
    client = WireChannel(FrameConnection(right), "server", 1.0)
    for n in range(3):
        client.send(f"up@{n}", PAYLOAD[::2])
        np.testing.assert_array_equal(server.receive(f"up@{n}", 20), PAYLOAD[::2])
        server.send("down@0", PAYLOAD)
        server.send("down@1", PAYLOAD[:0])
        assert client.receive("down@0", 40).flags.owndata
        assert client.receive("down@1", 0).size == 0
    assert client.rounds == server.rounds == 3
    assert client.sent_bytes == server.received_bytes == {"up": 60}
    assert client.received_bytes == server.sent_bytes == {"down": 120}


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([message(1, "due@0")], "sent message 1, 'due@0', where message 0, 'due@0', was due"),
        ([message(0, "other@0")], "out of step"),
        ([message(0, "due@0", PAYLOAD[1:])], "announced 39 bytes as 'due@0' where 40 are due"),
        ([message(0, "due@0", np.zeros(50, np.uint8))], "announced 50 bytes"),
        ([message_head(Ping(), 0)], "message type 6 where 'due@0' was due"),
        ([frame_head(MessageType.CHANNEL, {"number": 0}, 0)], "has fields"),
    ],
)
def test_what_is_not_due_is_refused(ends: Ends, frames: list[bytes], sentence: str) -> None:
    raw, channel = ends
    for frame in frames:
        raw.send_frame(frame)
    with pytest.raises(ProtocolError, match=sentence):
        channel.receive("due@0", 40)


def test_a_doubled_message_is_refused(ends: Ends) -> None:
    raw, channel = ends
    raw.send_frame(message(0, "due@0") + message(0, "due@0"))
    channel.receive("due@0", 40)
    with pytest.raises(ProtocolError, match="where message 1, 'due@1', was due"):
        channel.receive("due@1", 40)


def test_a_label_cannot_steer_a_terminal(ends: Ends) -> None:
    raw, channel = ends
    raw.send_frame(message(0, "\x1b[2Jgone"))
    with pytest.raises(ProtocolError) as caught:
        channel.receive("due@0", 40)
    assert "\x1b" not in str(caught.value)


def test_an_error_of_the_peer_is_told(ends: Ends) -> None:
    raw, channel = ends
    send_message(raw, Error("no slots\nleft"))
    with pytest.raises(ServerRefused, match="the server refused: no slots left"):
        channel.receive("due@0", 40)


def test_waiting_is_limited_where_a_pace_is_set(ends: Ends) -> None:
    """All waiting inside counts together; outside, and before, none does."""
    raw, channel = ends
    raw.send_frame(message(0, "due@0") + message(1, "due@1"))
    with channel.at_a_pace(0.3):
        channel.receive("due@0", 40)
        channel.receive("due@1", 40)
    late = threading.Timer(0.1, lambda: raw.send_frame(message(2, "due@2") + message(3, "due@3")))
    late.start()
    with channel.at_a_pace(0.05), pytest.raises(ProtocolError, match="more slowly than is allowed"):
        channel.receive("due@2", 40)
    channel.receive("due@3", 40)


def silent(raw: FrameConnection) -> None:
    pass


def gone(raw: FrameConnection) -> None:
    raw.close()


@pytest.mark.parametrize(
    ("act", "kind", "sentence"),
    [
        (silent, SilentPeer, "the server sent nothing for 0 s where 'due@0' was due"),
        (gone, ConnectionLost, "closed the connection"),
    ],
)
def test_a_peer_that_says_nothing_does_not_hang_the_other(
    ends: Ends,
    act: Callable[[FrameConnection], None],
    kind: type[OtpipeError],
    sentence: str,
) -> None:
    raw, channel = ends
    act(raw)
    with pytest.raises(kind, match=sentence):
        channel.receive("due@0", 40)
