"""What the tests of this folder know about the server they share, and what it must always do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
from raw_client import (
    OleOffer,
    ask_linear,
    eventually,
    expected_linear,
    garbage,
    linear_bytes,
    message_frame,
    raw_client,
)
from servers import LocalServer

from otpipe.protocol.messages import (
    GetBundle,
    MessageType,
    OleBlock,
)
from otpipe.server.lanes import MAX_OLE_SESSIONS_PER_RANK

MAX_CLIENTS = MAX_OLE_SESSIONS_PER_RANK + 2
STALL_S = 0.6
IDLE_S = 1.5
QKV = 1  # map index; layer 0, so rank 0
DOWN = 4  # n > m


def assert_nothing_is_left(server: LocalServer) -> None:
    assert eventually(lambda: not server.gateway._sockets), "a connection is still open"
    for stage in server.stages:
        assert not stage._evaluators
        assert not stage._answers
    for lane in server.gateway._service._lanes:
        assert lane.ole_turns.free == MAX_OLE_SESSIONS_PER_RANK
        assert not lane.ole_turns.waiting
        assert not lane._pending


def assert_serves(server: LocalServer) -> None:
    """A good client gets the right answer from every rank, and its bundle."""
    with raw_client(server.gateway.port, message_frame(GetBundle())) as client:
        message_type, _ = client.answer()
        assert message_type == MessageType.BUNDLE
        for map_index in (0, QKV, len(server.bundle.spec.maps) - 1):
            payload = linear_bytes(server.bundle, map_index, 3)
            got = ask_linear(client.frames, map_index, 3, payload)
            np.testing.assert_array_equal(got, expected(server, map_index, payload))


def expected(server: LocalServer, map_index: int, payload: bytes) -> np.ndarray:
    stage = next(stage for stage in server.stages if map_index in stage._maps)
    ring_bits = server.bundle.spec.maps[map_index].ring_bits
    return expected_linear(stage._maps[map_index].weight, payload, ring_bits)


def rss_bytes() -> int:
    return psutil.Process().memory_info().rss


def refused(server: LocalServer, *pieces: bytes, greet: bool = True) -> str:
    with raw_client(server.gateway.port, *pieces, greet=greet) as client:
        return client.refusal()


def upload(offer: OleOffer, last: int | None = None) -> Iterator[bytes]:
    """A BEGIN and blocks of uniform bytes for all coordinates, or those before ``last``."""
    yield message_frame(offer.begin)
    end = offer.in_features if last is None else last
    for first in range(0, end, 10):
        count = min(10, end - first)
        yield message_frame(OleBlock(first, count), garbage(count * offer.coordinate_bytes))
