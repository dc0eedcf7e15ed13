"""Mutated conversations never end or hang the server."""

from __future__ import annotations

import contextlib
import socket

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_client import (
    HELLO,
    frame,
    honest_ole,
    linear_bytes,
    message_frame,
    raw_client,
)
from served import (
    QKV,
    assert_nothing_is_left,
)
from servers import LocalServer

from otpipe.protocol.messages import (
    Linear,
    MessageType,
    OleBlock,
    Ping,
)


def conversation(server: LocalServer) -> list[bytes]:
    offer = honest_ole(server.bundle, QKV)
    return [
        HELLO,
        message_frame(Linear(QKV, 2), linear_bytes(server.bundle, QKV, 2)),
        message_frame(Ping()),
        message_frame(offer.begin),
        message_frame(OleBlock(0, 2), bytes(2 * offer.coordinate_bytes)),
    ]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_mutated_frames(serving: LocalServer, data: st.DataObject) -> None:
    """Whatever is flipped, cut or doubled in a valid conversation, the server stays."""
    frames = conversation(serving)
    victim = data.draw(st.integers(0, len(frames) - 1))
    broken = bytearray(frames[victim])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(broken), 90) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat"])):
            case "flip":
                broken[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                broken[at] = data.draw(st.integers(0, 255))
            case "cut":
                del broken[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                broken[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                broken[at:at] = broken[:at]
        if not broken:
            break
    frames[victim] = bytes(broken)
    with raw_client(serving.gateway.port, *frames, greet=False) as client:
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        while not client.is_closed_by_server():
            pass
    assert_nothing_is_left(serving)
    with raw_client(serving.gateway.port, message_frame(Ping())) as good:
        assert good.answer()[0] == MessageType.PONG


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    message_type=st.sampled_from([*MessageType, 0, 77]),
    header=st.dictionaries(
        st.sampled_from(
            ["client", "map_index", "rows", "num_slots", "upload_bytes", "a_key", "first", "count"]
        ),
        st.one_of(
            st.integers(-(2**63), 2**64 - 1),
            st.binary(max_size=40),
            st.text(max_size=10),
            st.none(),
            st.floats(),
            st.lists(st.integers(0, 9), max_size=3),
        ),
    ),
    payload=st.binary(max_size=64),
)
def test_random_headers(
    serving: LocalServer, message_type: int, header: dict[str, object], payload: bytes
) -> None:
    data = frame(message_type, msgpack.packb(header), payload)
    with raw_client(serving.gateway.port, data) as client:
        client.sock.shutdown(socket.SHUT_WR)
        while not client.is_closed_by_server():
            pass
    assert_nothing_is_left(serving)
