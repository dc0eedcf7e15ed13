"""Two processes that run secure operations with each other over loopback TCP, for benchmarks."""

from __future__ import annotations

import multiprocessing
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from otpipe.ot import OtReceiver, OtSender
from otpipe.ot.channel import Bytes, label_kind
from otpipe.ot.extension import BLOCK_COTS
from otpipe.ot.local_channel import check_due
from otpipe.secure import Party

HEAD = struct.Struct("<HI")
TIMEOUT_S = 300.0
SILENCE_S = 3600.0
"""Of one party while the other computes: the products of a preparation of a wide map, on a CPU."""


class SocketChannel:
    """One end of a connection; counts bytes and rounds, and the seconds that it waits.

    For benchmarks: nothing here authenticates the peer or hides anything.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE_S)
        self._socket = connection
        self._listening = False
        self.sent_bytes: Counter[str] = Counter()
        self.rounds = 0
        self.waited_s = 0.0

    def send(self, label: str, payload: Bytes) -> None:
        """See ``otpipe.ot.channel.Channel``; returns when the kernel has taken all of it."""
        started_s = time.perf_counter()
        name = label.encode()
        self._socket.sendall(HEAD.pack(len(name), payload.size) + name)
        self._socket.sendall(memoryview(np.ascontiguousarray(payload)))
        self.waited_s += time.perf_counter() - started_s
        self.sent_bytes[label_kind(label)] += payload.size
        self._listening = False

    def receive(self, label: str, num_bytes: int) -> Bytes:
        """See ``otpipe.ot.channel.Channel``."""
        started_s = time.perf_counter()
        length, size = HEAD.unpack(self._exactly(HEAD.size))
        got = bytes(self._exactly(length)).decode()
        check_due(got, size, label, num_bytes)
        payload = np.frombuffer(self._exactly(size), np.uint8)
        self.waited_s += time.perf_counter() - started_s
        if not self._listening:
            self._listening, self.rounds = True, self.rounds + 1
        return payload

    def meet(self) -> None:
        """Wait until the other end is here as well; counts as nothing."""
        self._socket.sendall(b"=")
        self._exactly(1)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            count = self._socket.recv_into(view[at:])
            if count == 0:
                raise ConnectionError("The other process is gone; look at its error above.")
            at += count
        return data


class Peer:
    """One of the two processes.

    Attributes:
        party: set up, over the real OT stack.
        session: its OT session.
        device: of its shares.
    """

    def __init__(self, role: str, connection: socket.socket, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device, self.is_server = device, role == "server"
        self.channel = SocketChannel(connection)
        self.session: Any = (
            OtSender(self.channel, device) if self.is_server else OtReceiver(self.channel)
        )
        self.session.setup()
        self.party = Party(
            "server" if self.is_server else "client", self.session, self.channel, device
        )

    def make_cots(self, count: int) -> None:
        """Make correlated OTs, with the other party, until the pool has ``count`` of them."""
        missing = max(0, count - self.session.available)
        for lo in range(0, missing, BLOCK_COTS):
            self.session.extend(min(BLOCK_COTS, missing - lo))

    def wait_for_device(self) -> None:
        """Wait for what runs on the own device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def synchronize(self) -> None:
        """Wait for the own device, then for the other process."""
        self.wait_for_device()
        self.channel.meet()


def _server(
    port: int, device: str, threads: int, work: Callable[[Peer], Any], to: Connection
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        to.send(work(Peer("server", connection, device, threads)))


@contextmanager
def _listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield listener


def both(work: Callable[[Peer], Any], device: str, threads: int) -> tuple[Any, Any]:
    """Run ``work`` in a server process and in this one as the client; (server's, client's) results.

    Args:
        work: a function of a module, or a partial of one.
        device: of the server; the client computes on the CPU.
        threads: of each.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    with _listening() as listener:
        arguments = (listener.getsockname()[1], device, threads, work, theirs)
        process = context.Process(target=_server, args=arguments, daemon=True)
        process.start()
        connection, _ = listener.accept()
        with connection:
            client = work(Peer("client", connection, "cpu", threads))
            if not mine.poll(SILENCE_S):
                raise ConnectionError("The server process has not answered; look at its error.")
            server = mine.recv()
        process.join()
    return server, client
