"""Clients that send what they may not send; after each, the next one is served well."""

from __future__ import annotations

import re

import numpy as np
import pytest
from raw_client import (
    HELLO,
    ask_linear,
    frame,
    garbage,
    honest_ole,
    linear_bytes,
    message_frame,
    raw_client,
)
from served import (
    DOWN,
    QKV,
    expected,
    refused,
    rss_bytes,
    upload,
)
from servers import LocalServer

from otpipe.protocol.messages import (
    GetBundle,
    Hello,
    Linear,
    MessageType,
    OleAnswer,
    OleBegin,
    OleBlock,
    Ping,
    max_linear_rows,
)
from otpipe.protocol.wire import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, WIRE_VERSION

# -- bytes that are no frame  ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "b'GET '.*does not speak the otpipe"),
        (bytes(1000), "does not speak the otpipe protocol"),
        (frame(1, {"client": "x"}, magic=b"OTPX"), "b'OTPX', not b'OTPW'"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "both or neither use TLS"),
        (
            frame(1, {"client": "x"}, version=WIRE_VERSION + 1),
            f"wire version {WIRE_VERSION + 1}, this side version {WIRE_VERSION}; install the same",
        ),
        (
            frame(1, b"", header_bytes=MAX_HEADER_BYTES + 1),
            f"header of {MAX_HEADER_BYTES + 1} bytes was announced; the limit is",
        ),
        (frame(1, b"", header_bytes=2**32 - 1), "header of 4294967295 bytes"),
        (frame(1, {}, payload_bytes=2**32 - 1), "payload of 4294967295 bytes"),
        (frame(1, b"\xc1"), "not valid msgpack"),
        (frame(1, b"\x91" * 4000), "not valid msgpack"),  # arrays, 4000 deep
        (frame(1, b"\xdd\xff\xff\xff\xff"), "not valid msgpack"),  # array of 4 G entries
        (frame(1, b"\xdf\xff\xff\xff\xff\xa1x"), "not valid msgpack"),  # map of 4 G entries
        (frame(1, b"\xc6\xff\xff\xff\xff"), "not valid msgpack"),  # 4 GB of bytes
        (frame(1, [1, 2]), "not valid msgpack"),
        (frame(1, b"\xa1x"), "not a map with string keys"),
        (frame(1, {1: 2}), "not (valid msgpack|a map with string keys)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_frame(server: LocalServer, data: bytes, sentence: str) -> None:
    before = rss_bytes()
    text = refused(server, data, greet=False)
    assert re.search(sentence, text), text
    assert rss_bytes() - before < 20e6


def test_random_bytes(server: LocalServer) -> None:
    for length in (16, 17, 1000, 100_000):
        refused(server, garbage(length), greet=False)


# -- frames that the state of the conversation does not allow  -------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (message_frame(Ping()), "first message has type 6; a client begins with HELLO"),
        (message_frame(Linear(0, 1), b"x"), "a client begins with HELLO"),
        (frame(MessageType.WELCOME, {}), "a client begins with HELLO"),
        (frame(MessageType.HELLO, {}), r"HELLO has fields \[\]; expected \['client'\]"),
        (frame(MessageType.HELLO, {"client": "x", "more": 1}), "HELLO has fields"),
        (frame(MessageType.HELLO, {"client": 7}), "HELLO.client is a int; expected str"),
        (frame(MessageType.HELLO, {"client": "x" * 2000}), "HELLO.client is longer than 1024"),
        (message_frame(Hello("x"), b"tail"), "payload of 4 bytes was announced where 0 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_greeting(server: LocalServer, data: bytes, sentence: str) -> None:
    text = refused(server, data, greet=False)
    assert re.search(sentence, text), text


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (frame(0, {}), "message type 0 is not a request"),
        (frame(7, {}), "message type 7 is not a request"),
        (frame(65535, {}), "message type 65535 is not a request"),
        (frame(MessageType.RESULT, {"map_index": 0, "rows": 1}), "130 is not a request"),
        (frame(MessageType.ERROR, {"text": "you too"}), "255 is not a request"),
        (message_frame(Ping(), b"x"), "payload of 1 bytes was announced where 0"),
        (message_frame(GetBundle(), payload_bytes=MAX_PAYLOAD_BYTES), "where 0 bytes are due"),
        (message_frame(OleBlock(0, 1), b"x"), "OLE_BLOCK arrived before OLE_BEGIN"),
        (message_frame(Linear(10, 1)), "map 10 was asked for; this model has 0 to 9"),
        (message_frame(Linear(2**62, 1)), "was asked for; this model has"),
        (frame(3, {"map_index": -1, "rows": 1}), "map_index is -1; it may not be negative"),
        (frame(3, {"map_index": True, "rows": 1}), "map_index is a bool; expected int"),
        (frame(3, {"map_index": 1.0, "rows": 1}), "map_index is a float; expected int"),
        (frame(3, {"map_index": None, "rows": 1}), "expected int"),
        (message_frame(Linear(QKV, 0)), "0 rows were sent through .*qkv.*; 1 to 512 are allowed"),
        (message_frame(Linear(QKV, 513), payload_bytes=513 * 48 * 4), "513 rows"),
        (message_frame(Linear(QKV, 2**40), payload_bytes=MAX_PAYLOAD_BYTES), "rows were sent"),
        (
            message_frame(Linear(QKV, 2), payload_bytes=MAX_PAYLOAD_BYTES),
            f"a payload of {MAX_PAYLOAD_BYTES} bytes was announced where 384 bytes are due",
        ),
        (message_frame(Linear(QKV, 2), bytes(383)), "383 bytes was announced where 384 bytes"),
        (message_frame(Linear(QKV, 2), bytes(385)), "385 bytes was announced where 384 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frame_out_of_place(server: LocalServer, data: bytes, sentence: str) -> None:
    before = rss_bytes()
    text = refused(server, data)
    assert re.search(sentence, text), text
    assert rss_bytes() - before < 20e6


def test_every_row_up_to_the_limit_is_served(server: LocalServer) -> None:
    linear_map = server.bundle.spec.maps[QKV]
    most = max_linear_rows(linear_map.in_features, linear_map.out_features, linear_map.ring_bytes)
    payload = linear_bytes(server.bundle, QKV, most)
    with raw_client(server.gateway.port) as client:
        got = ask_linear(client.frames, QKV, most, payload)
    np.testing.assert_array_equal(got, expected(server, QKV, payload))


def test_a_second_greeting_does_no_harm(server: LocalServer) -> None:
    with raw_client(server.gateway.port, HELLO) as client:
        assert client.answer()[0] == MessageType.WELCOME


# -- preprocessing out of order  -------------------------------------------------------------------


def begin(server: LocalServer, **changes: object) -> bytes:
    offer = honest_ole(server.bundle, QKV)
    return frame(MessageType.OLE_BEGIN, {**offer.begin.header(), **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_slots": 0}, "a batch of 0 slots was asked for; a power of two up to 2048"),
        ({"num_slots": 3}, "a batch of 3 slots"),
        ({"num_slots": 4096}, "a batch of 4096 slots"),
        ({"num_slots": 2**62}, "a power of two up to 2048"),
        ({"upload_bytes": 0}, "0 bytes a coefficient were announced for .*noise budget calls for"),
        ({"upload_bytes": 8}, "8 bytes a coefficient"),
        ({"upload_bytes": 2**62}, "bytes a coefficient"),
        ({"a_key": b""}, "a_key has 0 bytes; 32 are due"),
        ({"a_key": bytes(33)}, "a_key has 33 bytes; 32 are due"),
        ({"a_key": bytes(2000)}, "a_key is longer than 1024"),
        ({"a_key": "text"}, "a_key is a str; expected bytes"),
        ({"map_index": 10}, "map 10 was asked for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ole_begin_out_of_range(
    server: LocalServer, changes: dict[str, object], sentence: str
) -> None:
    text = refused(server, begin(server, **changes))
    assert re.search(sentence, text), text


@pytest.mark.parametrize("between", ["nothing", "one block"])
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (message_frame(Ping()), "message type 6 arrived inside a preprocessing exchange"),
        (HELLO, "message type 1 arrived inside"),
        (message_frame(Linear(QKV, 1), bytes(192)), "message type 3 arrived inside"),
        (message_frame(OleBegin(1, 2048, 6, bytes(32))), "message type 4 arrived inside"),
        (message_frame(OleBlock(7, 1), bytes(12288)), "coordinates 7 to 8 arrived; due are"),
        (message_frame(OleBlock(1, 1), b""), "coordinates 1 to 2 arrived|payload of 0 bytes"),
        (message_frame(OleBlock(2**40, 2**40), b""), "arrived; due are"),
        (frame(5, {"first": 0, "count": 0}), "arrived; due are"),
        (frame(5, {"first": 0, "count": 49}), "arrived; due are"),
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak the otpipe protocol"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inside_an_exchange(server: LocalServer, data: bytes, sentence: str, between: str) -> None:
    offer = honest_ole(server.bundle, QKV)
    assert offer.coordinate_bytes == 12288
    block = message_frame(OleBlock(0, 1), bytes(offer.coordinate_bytes))
    before = [block] if between == "one block" else []
    text = refused(server, message_frame(offer.begin), *before, data)
    assert re.search(sentence, text), text


def test_a_block_of_the_wrong_length(server: LocalServer) -> None:
    offer = honest_ole(server.bundle, QKV)
    for delta in (-1, 1):
        block = message_frame(OleBlock(0, 1), bytes(offer.coordinate_bytes + delta))
        text = refused(server, message_frame(offer.begin), block)
        assert f"{offer.coordinate_bytes} bytes are due" in text


@pytest.mark.parametrize("map_index", [0, QKV, DOWN])
def test_an_exchange_leaves_no_memory_and_the_connection_in_use(
    server: LocalServer, map_index: int
) -> None:
    linear_map = server.bundle.spec.maps[map_index]
    offer = honest_ole(server.bundle, map_index)
    with raw_client(server.gateway.port, *upload(offer)) as client:
        message_type, header = client.answer()
        assert (message_type, header) == (MessageType.OLE_READY, {"map_index": map_index})
        groups = 0
        while groups < linear_map.out_features:
            message_type, header = client.answer()
            assert message_type == MessageType.OLE_ANSWER
            assert OleAnswer.parse(header).first_group == groups
            groups += int(header["groups"])  # type: ignore[call-overload]
        payload = linear_bytes(server.bundle, QKV, 1)
        got = ask_linear(client.frames, QKV, 1, payload)
        np.testing.assert_array_equal(got, expected(server, QKV, payload))
        assert all(not stage._evaluators for stage in server.stages)
