"""A TCP proxy between client and server that records every byte, and can cut the line."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgpack
import numpy as np

from otpipe.protocol.wire import PREFIX


@dataclass
class Frame:
    """One recorded frame."""

    type: int
    header: dict[str, object]
    payload: bytes

    @property
    def shape(self) -> tuple[object, ...]:
        """What an observer sees without looking at payload bytes: type, sizes, header fields."""
        fields = tuple((k, v) for k, v in sorted(self.header.items()) if k != "a_key")
        return (self.type, len(self.payload), fields)


@dataclass
class Recording:
    """The bytes of one connection, per direction."""

    to_server: bytearray = field(default_factory=bytearray)
    to_client: bytearray = field(default_factory=bytearray)

    @staticmethod
    def frames(data: bytes | bytearray) -> list[Frame]:
        """Cut a direction into frames; a trailing incomplete one is left out."""
        frames, at = [], 0
        while at + PREFIX.size <= len(data):
            _, _, message_type, head, payload = PREFIX.unpack_from(data, at)
            end = at + PREFIX.size + head + payload
            if end > len(data):
                break
            header = msgpack.unpackb(bytes(data[at + PREFIX.size : at + PREFIX.size + head]))
            frames.append(Frame(message_type, header, bytes(data[end - payload : end])))
            at = end
        return frames


class Proxy:
    """Forwards connections to ``target`` and records them.

    Attributes:
        recordings: one a connection, in the order they were opened.
        cut: called with (connection number, bytes sent to the server so far) before each piece is
            forwarded; True cuts both sides of that connection.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.recordings: list[Recording] = []
        self.cut: Callable[[int, int], bool] = lambda number, sent: False
        self.refuse = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            try:
                server = socket.create_connection(self.target, 5)
            except OSError:
                client.close()
                continue
            recording = Recording()
            number = len(self.recordings)
            self.recordings.append(recording)
            self._open |= {client, server}
            for source, sink, record, upward in (
                (client, server, recording.to_server, True),
                (server, client, recording.to_client, False),
            ):
                threading.Thread(
                    target=self._pump, args=(source, sink, record, number, upward), daemon=True
                ).start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        record: bytearray,
        number: int,
        upward: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                forwarded = self._forwarded(data, record, number, upward)
                sink.sendall(forwarded)
                if len(forwarded) < len(data):
                    break
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _forwarded(self, data: bytes, record: bytearray, number: int, upward: bool) -> bytes:
        """Record ``data``; returns what of it goes on: less than all of it cuts the connection."""
        record += data
        return b"" if upward and self.cut(number, len(record)) else data

    def cut_all(self) -> None:
        """Drop every open connection."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()


@contextmanager
def recording_proxy(address: str) -> Iterator[Proxy]:
    """A proxy in front of ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    proxy = Proxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()


def byte_chi_square(data: bytes | np.ndarray) -> float:
    """Chi-square statistic of the bytes against uniform, 255 degrees of freedom."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


CHI_SQUARE_255_LIMIT = 410.0
"""Exceeded with probability below 1e-8 by uniform bytes (Wilson-Hilferty)."""
