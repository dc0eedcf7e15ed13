"""The gateway's relay and the ranks' private ports: bytes both ways, and one end for both sides."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from private_servers import TOKEN, eventually

from otpipe.errors import RankDied
from otpipe.pipeline.residuals import Mailbox, ShareKey
from otpipe.protocol.wire import FrameConnection
from otpipe.server import relay as relay_module
from otpipe.server.private_port import RankPort, connect_rank
from otpipe.server.relay import relay

Ends = tuple[socket.socket, socket.socket, threading.Thread]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The client's socket and the rank's, with a relay between them."""
    client, gateway = socket.socketpair()
    to_rank, rank = socket.socketpair()

    def run() -> None:
        relay(gateway, to_rank)
        gateway.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for sock in (client, rank):
        sock.settimeout(10)
    yield client, rank, thread
    client.close()
    rank.close()
    thread.join(5)


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the end came after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


def test_large_messages_both_ways_at_once(ends: Ends) -> None:
    client, rank, _ = ends
    up, down = os.urandom(3 << 20), os.urandom(3 << 20)
    senders = [
        threading.Thread(target=sock.sendall, args=(data,), daemon=True)
        for sock, data in ((client, up), (rank, down))
    ]
    got: dict[str, bytes] = {}
    reader = threading.Thread(target=lambda: got.update(up=receive(rank, len(up))), daemon=True)
    for thread in (*senders, reader):
        thread.start()
    got["down"] = receive(client, len(down))
    reader.join(10)
    assert got == {"up": up, "down": down}


def test_a_client_that_leaves_ends_the_rank_s_side_at_once(ends: Ends) -> None:
    client, rank, thread = ends
    client.close()
    assert rank.recv(1) == b""
    thread.join(2)
    assert not thread.is_alive()


def test_the_last_words_of_a_rank_reach_the_client(ends: Ends) -> None:
    client, rank, thread = ends
    words = os.urandom(1 << 20)
    threading.Thread(target=lambda: (rank.sendall(words), rank.close()), daemon=True).start()
    assert receive(client, len(words)) == words
    assert client.recv(1) == b""
    thread.join(2)
    assert not thread.is_alive()


def test_a_client_that_takes_nothing_is_given_up(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, rank, thread = ends
    monkeypatch.setattr(relay_module, "STALL_S", 0.2)
    rank.settimeout(0.1)
    with pytest.raises(OSError):
        while True:
            rank.sendall(bytes(1 << 20))
    thread.join(5)
    assert not thread.is_alive()
    del client


def test_a_private_port_serves_who_knows_the_token() -> None:
    served: list[FrameConnection] = []
    port = RankPort(TOKEN, served.append, 1.0)
    try:
        with connect_rank(port.address, TOKEN) as sock:
            assert eventually(lambda: len(served) == 1)
            assert sock.recv(1) == b""
        for token in (bytes(32), TOKEN[:-1] + b"\0", b"GET / HTTP/1.1\r\n" * 2):
            with connect_rank(port.address, token) as sock:
                sock.settimeout(5)
                assert sock.recv(1) == b""
        with connect_rank(port.address, TOKEN[:10]) as sock:  # falls silent
            sock.settimeout(5)
            assert sock.recv(1) == b""
        assert len(served) == 1
    finally:
        port.close()
    with pytest.raises(RankDied, match="does not answer"):
        connect_rank(port.address, TOKEN)


def test_a_port_outlives_a_lack_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[FrameConnection] = []
    port = RankPort(TOKEN, served.append, 1.0)
    start = threading.Thread.start
    refused: list[str] = []

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "relayed" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    try:
        for _ in range(2):
            with connect_rank(port.address, TOKEN) as sock:
                sock.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
        assert refused
        assert len(served) == 1
        assert eventually(lambda: not port._sockets)
    finally:
        port.close()


def test_a_mailbox_wait_ends_in_time_among_shares_of_others() -> None:
    box, share = Mailbox(), torch.ones(2, 3, dtype=torch.int64)
    mine, other = ShareKey(b"a" * 16, 0, 1), ShareKey(b"b" * 16, 0, 1)
    for key in (mine, other):
        box.open(key.session)
    ended = threading.Event()

    def traffic() -> None:
        while not ended.wait(0.02):
            box.put(other, share)

    threading.Thread(target=traffic, daemon=True).start()
    stop = time.monotonic() + 5
    try:
        assert box.take(mine, lambda: time.monotonic() > stop, 0.5) is None
    finally:
        ended.set()
    assert time.monotonic() < stop, "its own limit ended it, not the client's leaving"


def test_a_mailbox_keeps_the_shares_of_open_sessions_only() -> None:
    box, share = Mailbox(), torch.ones(2, 3, dtype=torch.int64)
    mine, other = ShareKey(b"a" * 16, 0, 1), ShareKey(b"b" * 16, 0, 1)
    assert box.open(mine.session)
    assert not box.open(mine.session)
    for key in (mine, other):
        box.put(key, share)
    assert box.take(mine, lambda: False, 1.0) is share
    assert box.take(mine._replace(stage=2), lambda: False, 0.3) is None
    started_s = time.monotonic()
    assert box.take(mine, lambda: True, 60.0) is None
    assert time.monotonic() - started_s < 5
    box.put(mine, share)
    box.close(mine.session)
    assert not box._open
