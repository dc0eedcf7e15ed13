"""Clients that stall, vanish, never read, or come in crowds."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest
from raw_client import (
    HELLO,
    RawClient,
    drip,
    eventually,
    garbage,
    honest_ole,
    message_frame,
    raw_client,
)
from served import (
    IDLE_S,
    MAX_CLIENTS,
    QKV,
    STALL_S,
    assert_serves,
    upload,
)
from servers import LocalServer

from otpipe.protocol.messages import (
    Linear,
    MessageType,
    OleBlock,
    Ping,
)
from otpipe.server import gateway, session
from otpipe.server.lanes import MAX_OLE_SESSIONS_PER_RANK

# -- clients that stall or vanish  -----------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 20, 40])
def test_stall_inside_a_frame(server: LocalServer, length: int) -> None:
    data = message_frame(Linear(QKV, 2), bytes(384))[:length]
    with raw_client(server.gateway.port, data) as client:
        started_s = time.monotonic()
        assert client.is_closed_by_server()
        assert time.monotonic() - started_s < STALL_S + 1.5


def test_drip_inside_a_frame(server: LocalServer) -> None:
    """A byte now and then keeps a socket alive, but not a frame."""
    with raw_client(server.gateway.port) as client:
        started_s = time.monotonic()
        drip(client, HELLO, STALL_S / 4)
        assert client.is_closed_by_server()
        assert time.monotonic() - started_s < len(HELLO) * STALL_S / 4 + 2
        assert eventually(lambda: not server.gateway._sockets)


def test_says_nothing_at_all(server: LocalServer) -> None:
    """Before the greeting the short timeout holds, so that mute peers cannot fill the server."""
    started_s = time.monotonic()
    with raw_client(server.gateway.port, greet=False) as client:
        assert client.is_closed_by_server()
    assert time.monotonic() - started_s < STALL_S + 1


def test_idle_after_the_greeting(server: LocalServer) -> None:
    """Closed without a word, which a client that comes back would take for its answer."""
    started_s = time.monotonic()
    with raw_client(server.gateway.port) as client:
        assert client.is_closed_by_server()
    assert IDLE_S <= time.monotonic() - started_s < IDLE_S + 1


def test_idle_inside_an_exchange(server: LocalServer) -> None:
    """A client that holds a rank's memory gets the short timeout."""
    started_s = time.monotonic()
    with raw_client(server.gateway.port, *upload(honest_ole(server.bundle, QKV), 20)) as client:
        assert client.answer()[0] == MessageType.OLE_READY
        assert client.is_closed_by_server()
    assert time.monotonic() - started_s < STALL_S + 1


def test_slow_exchange(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, each just in time, may not hold a rank's memory for ever."""
    monkeypatch.setattr(session, "MIN_BYTES_PER_S", 1_000_000)
    monkeypatch.setattr(session, "SLACK_S", 0.0)
    offer = honest_ole(server.bundle, QKV)
    block = bytes(offer.coordinate_bytes)
    with raw_client(server.gateway.port, message_frame(offer.begin)) as client:
        for first in range(8):
            client.send(message_frame(OleBlock(first, 1), block))
            time.sleep(STALL_S / 3)
        assert "came more slowly than 1000000 bytes/s" in client.refusal()


@pytest.mark.parametrize("length", [0, 3, 16, 30, 100])
def test_vanish_inside_a_frame(server: LocalServer, length: int) -> None:
    data = message_frame(Linear(QKV, 2), bytes(384))[:length]
    with raw_client(server.gateway.port, data):
        pass


def test_reset_inside_a_frame(server: LocalServer) -> None:
    with raw_client(server.gateway.port, message_frame(Linear(QKV, 2), bytes(300))) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("coordinates", [0, 10, 30, 48])
def test_vanish_inside_an_exchange(server: LocalServer, coordinates: int) -> None:
    with raw_client(server.gateway.port, *upload(honest_ole(server.bundle, QKV), coordinates)):
        pass


def test_vanished_exchanges_do_not_use_up_the_slots(server: LocalServer) -> None:
    offer = honest_ole(server.bundle, QKV)
    for _ in range(2 * MAX_OLE_SESSIONS_PER_RANK + 1):
        with raw_client(server.gateway.port, *upload(offer, 10)):
            pass
    with raw_client(server.gateway.port, *upload(offer)) as client:
        assert client.answer()[0] == MessageType.OLE_READY
        assert client.answer()[0] == MessageType.OLE_ANSWER


@pytest.mark.parametrize("pending", [b"", garbage(5000)])
def test_vanish_while_waiting_for_a_slot(server: LocalServer, pending: bytes) -> None:
    """Who is gone leaves the line at once, whether or not bytes of it are still unread."""
    offer = honest_ole(server.bundle, QKV)
    turns = server.gateway._service._lanes[0].ole_turns
    holders = [RawClient(server.gateway.port) for _ in range(MAX_OLE_SESSIONS_PER_RANK)]
    for holder in holders:
        holder.send(HELLO, *upload(offer, 10))
    assert eventually(lambda: len(server.stages[0]._evaluators) == len(holders))
    with raw_client(server.gateway.port, message_frame(offer.begin), pending):
        assert eventually(lambda: turns.waiting == 1)
    assert eventually(lambda: turns.waiting == 0)
    assert len(server.stages[0]._evaluators) == len(holders)
    for holder in holders:
        holder.close()


def test_a_waiting_exchange_gets_the_slot_of_one_that_stalls(server: LocalServer) -> None:
    offer = honest_ole(server.bundle, QKV)
    holders = [RawClient(server.gateway.port) for _ in range(MAX_OLE_SESSIONS_PER_RANK)]
    for holder in holders:
        holder.send(HELLO, *upload(offer, 10))
    assert eventually(lambda: len(server.stages[0]._evaluators) == len(holders))
    with raw_client(server.gateway.port, *upload(offer)) as client:
        assert client.answer()[0] == MessageType.OLE_READY
        assert client.answer()[0] == MessageType.OLE_ANSWER
    for holder in holders:
        holder.close()


def test_never_reads_answers(server: LocalServer) -> None:
    """Answers fill the socket's buffers, then the client is given up; others go on meanwhile."""
    request = message_frame(Linear(QKV, 512), bytes(512 * 48 * 4))
    with raw_client(server.gateway.port) as client:
        client.sock.settimeout(0.2)
        done = threading.Event()

        def push() -> None:
            for _ in range(400):
                client.send(request)
            done.set()

        threading.Thread(target=push, daemon=True).start()
        for _ in range(5):
            assert_serves(server)
        assert eventually(lambda: not server.gateway._sockets, STALL_S + 4)
        assert done.wait(30)


def test_never_reads_the_answers_of_an_exchange(server: LocalServer) -> None:
    offer = honest_ole(server.bundle, 3)  # gate_up: 160 outputs of 20 KB each
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.gateway.port))
    sock.sendall(HELLO)
    for piece in upload(offer):
        sock.sendall(piece)
    assert eventually(lambda: not server.gateway._sockets, STALL_S + 5)
    sock.close()


# -- too many  -------------------------------------------------------------------------------------


def test_more_clients_than_allowed(server: LocalServer) -> None:
    clients = [RawClient(server.gateway.port) for _ in range(MAX_CLIENTS)]
    for client in clients:
        client.send(HELLO)
        assert client.answer()[0] == MessageType.WELCOME
    with raw_client(server.gateway.port, HELLO, greet=False) as extra:
        text = extra.refusal()
    assert text == (
        f"the server already has its {MAX_CLIENTS} clients; try again later or start it with a "
        "larger --max-clients"
    )
    clients.pop().close()
    assert eventually(lambda: len(server.gateway._sockets) < MAX_CLIENTS)
    with raw_client(server.gateway.port, message_frame(Ping())) as client:
        assert client.answer()[0] == MessageType.PONG
    for client in clients:
        client.close()


def test_a_flood_of_connections(server: LocalServer) -> None:
    threads_before = threading.active_count()
    crowd = [RawClient(server.gateway.port) for _ in range(100)]
    assert threading.active_count() - threads_before <= MAX_CLIENTS + gateway.MAX_REFUSALS_AT_ONCE
    for client in crowd:
        client.close()
