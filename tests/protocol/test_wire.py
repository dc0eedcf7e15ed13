"""Frames: what is well formed passes unchanged, everything else is refused by name."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.errors import ConnectionLost, ProtocolError, VersionMismatch
from otpipe.protocol import messages
from otpipe.protocol.messages import Linear, MessageType, Welcome
from otpipe.protocol.wire import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    WIRE_VERSION,
    FrameConnection,
    IdlePeer,
    StalledPeer,
)

Pair = tuple[FrameConnection, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A receiving connection with short timeouts, and the raw socket of its peer."""
    a, b = socket.socketpair()
    connection = FrameConnection(a, stall_timeout_s=0.5)
    yield connection, b
    connection.close()
    b.close()


def frame(
    header: bytes, payload: bytes = b"", magic: bytes = MAGIC, version: int = WIRE_VERSION
) -> bytes:
    return PREFIX.pack(magic, version, 3, len(header), len(payload)) + header + payload


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.binary(max_size=200_000)), max_size=4))
def test_frames_arrive_unchanged_and_in_order(items: list[tuple[int, bytes]]) -> None:
    a, b = socket.socketpair()
    sender, receiver = FrameConnection(a), FrameConnection(b)

    def send() -> None:
        for number, payload in items:
            sender.send(7, {"number": number}, payload)

    thread = threading.Thread(target=send)
    thread.start()
    for number, payload in items:
        message_type, header, announced = receiver.receive_head()
        assert (message_type, header, announced) == (7, {"number": number}, len(payload))
        assert receiver.receive_payload(announced, len(payload)).tobytes() == payload
    thread.join()
    assert sender.traffic.bytes_sent == receiver.traffic.bytes_received
    sender.close()
    receiver.close()


def test_large_payload_of_an_array_goes_through() -> None:
    a, b = socket.socketpair()
    sender, receiver = FrameConnection(a), FrameConnection(b)
    payload = np.arange(3 << 20, dtype=np.uint32)
    thread = threading.Thread(target=sender.send, args=(1, {}, payload))
    thread.start()
    _, _, announced = receiver.receive_head()
    got = receiver.receive_payload(announced, payload.nbytes).view(np.uint32)
    thread.join()
    np.testing.assert_array_equal(got, payload)


@pytest.mark.parametrize(
    ("raw", "error", "match"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ProtocolError, "does not speak the otpipe protocol"),
        (frame(b"\x80", magic=b"OTPX"), ProtocolError, "b'OTPX'"),
        (frame(b"\x80", version=WIRE_VERSION + 1), VersionMismatch, "wire version 2"),
        (
            PREFIX.pack(MAGIC, WIRE_VERSION, 3, MAX_HEADER_BYTES + 1, 0),
            ProtocolError,
            f"header of {MAX_HEADER_BYTES + 1} bytes",
        ),
        (
            PREFIX.pack(MAGIC, WIRE_VERSION, 3, 1, MAX_PAYLOAD_BYTES + 1),
            ProtocolError,
            f"payload of {MAX_PAYLOAD_BYTES + 1} bytes",
        ),
        (frame(b"\xc1"), ProtocolError, "not valid msgpack"),
        (frame(b"\x93\x01\x02\x03"), ProtocolError, "max_array_len"),
        (frame(b"\x01"), ProtocolError, "not a map with string keys"),
        (frame(msgpack.packb({1: 2})), ProtocolError, "msgpack|string keys"),
        (frame(b"\x81\xa1x"), ProtocolError, "not valid msgpack"),
        (frame(b"\x81\xa1x" + b"\x91" * 1000 + b"\x90"), ProtocolError, "not valid msgpack"),
        (frame(msgpack.packb({str(n): n for n in range(17)})), ProtocolError, "max_map_len"),
        (frame(b"\xdf\xff\xff\xff\xff"), ProtocolError, "not valid msgpack"),
    ],
)
def test_malformed_frames_are_refused(
    pair: Pair, raw: bytes, error: type[Exception], match: str
) -> None:
    connection, peer = pair
    peer.sendall(raw)
    with pytest.raises(error, match=match):
        connection.receive_head()


def test_payload_of_another_length_is_refused_before_memory_is_taken(pair: Pair) -> None:
    connection, peer = pair
    peer.sendall(PREFIX.pack(MAGIC, WIRE_VERSION, 3, 1, 200 << 20) + b"\x80")
    _, _, announced = connection.receive_head()

    def never(_: int) -> np.ndarray:
        raise AssertionError("memory was taken")

    with pytest.raises(ProtocolError, match="209715200 bytes was announced where 8 bytes are due"):
        connection.receive_payload(announced, 8, new_buffer=never)


def test_closed_peer_stalled_peer_and_idle_peer_are_told_apart(pair: Pair) -> None:
    connection, peer = pair
    with pytest.raises(IdlePeer, match="sent nothing"):
        connection.receive_head(idle_timeout_s=0.05)
    peer.sendall(frame(b"\x80")[:9])
    started = time.monotonic()
    with pytest.raises(StalledPeer, match="did not finish"):
        connection.receive_head()
    assert time.monotonic() - started < 3
    peer.close()
    with pytest.raises(ConnectionLost, match="closed"):
        FrameConnection.receive_head(connection)


def test_no_descriptor_of_a_socket_that_took_over_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread closes the connection, and the system gives its number away, before dup."""
    near, far = socket.socketpair()
    other, peer_of_other = socket.socketpair()
    genuine = os.dup
    copies: list[int] = []

    def closed_meanwhile(number: int) -> int:
        near.close()
        taken = genuine(other.fileno())
        assert taken == number, "the lowest number that is free"
        copies.extend((taken, genuine(taken)))
        return copies[1]

    with far, other, peer_of_other:
        connection = FrameConnection(near)
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", closed_meanwhile)
            assert connection.descriptor == -1
        with pytest.raises(OSError):
            os.fstat(copies[1])
        os.close(copies[0])


def test_peer_that_takes_no_bytes_is_given_up(pair: Pair) -> None:
    connection, _peer = pair
    with pytest.raises(StalledPeer, match="took no bytes"):
        connection.send(1, {}, bytes(64 << 20))


def test_prefix_is_sixteen_bytes_little_endian() -> None:
    assert PREFIX.size == 16
    assert PREFIX.pack(b"OTPW", 1, 3, 2, 5) == b"OTPW" + struct.pack("<HHII", 1, 3, 2, 5)


def test_every_message_survives_its_own_header() -> None:
    samples = [
        Linear(3, 5),
        messages.Hello("x"),
        messages.OleBegin(1, 64, 6, bytes(32)),
        Welcome("s", "f" * 64, "public", 2, 10, bytes(32)),
        messages.OleAnswer(1, 2, 3),
        messages.Error("sorry"),
    ]
    for message in samples:
        assert type(message).parse(msgpack.unpackb(msgpack.packb(message.header()))) == message


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"map_index": 1}, "has fields"),
        ({"map_index": 1, "rows": 2, "more": 3}, "has fields"),
        ({"map_index": "1", "rows": 2}, "map_index is a str"),
        ({"map_index": True, "rows": 2}, "map_index is a bool"),
        ({"map_index": -1, "rows": 2}, "may not be negative"),
        ({"map_index": 1.0, "rows": 2}, "map_index is a float"),
    ],
)
def test_fields_are_checked(header: dict[str, object], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        Linear.parse(header)


def test_message_numbers_never_change() -> None:
    assert {m.name: m.value for m in MessageType} == {
        "HELLO": 1,
        "GET_BUNDLE": 2,
        "LINEAR": 3,
        "OLE_BEGIN": 4,
        "OLE_BLOCK": 5,
        "PING": 6,
        "ATTACH": 7,
        "JOIN": 8,
        "PASS": 9,
        "PASS_DONE": 10,
        "MASKED_BEGIN": 11,
        "CHANNEL": 12,
        "PREPARE": 13,
        "WELCOME": 128,
        "BUNDLE": 129,
        "RESULT": 130,
        "OLE_ANSWER": 131,
        "PONG": 132,
        "OLE_READY": 133,
        "ATTACHED": 134,
        "JOINED": 135,
        "PASS_READY": 136,
        "PREPARE_READY": 137,
        "ERROR": 255,
    }
