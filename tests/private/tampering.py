"""A proxy that understands frames and does one wrong thing to one of them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgpack

from otpipe.protocol.messages import MessageType
from otpipe.protocol.wire import PREFIX, frame_head


@dataclass(frozen=True)
class Frame:
    """One frame on its way."""

    type: int
    header: dict[str, object]
    payload: bytes

    def octets(self) -> bytes:
        return frame_head(self.type, self.header, len(self.payload)) + self.payload  # type: ignore[arg-type]


Tamper = Callable[[Frame, list[Frame]], list[Frame]]
"""From the frame that is chosen, and those held back, to what is sent instead."""


def lose(frame: Frame, held: list[Frame]) -> list[Frame]:
    return []


def double(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [frame, frame]


def truncate(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [replace(frame, payload=frame.payload[:-1])]


def lengthen(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [replace(frame, payload=frame.payload + b"\0")]


def reorder(frame: Frame, held: list[Frame]) -> list[Frame]:
    held.append(frame)  # goes out behind the next one
    return []


def relabel(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [replace(frame, header={**frame.header, "label": "ot.choices@0.0"})]


def other_phase(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [Frame(MessageType.OLE_BLOCK, {"first": 0, "count": 1}, b"")]


@dataclass
class Plan:
    """What to do: to the ``number``-th frame of a type, of one rank's session, in one direction."""

    rank: int
    upward: bool
    number: int
    tamper: Tamper
    type: int = MessageType.CHANNEL
    done: bool = False


class TamperingProxy:
    """Forwards connections to ``target``; ``plan`` says what happens to one frame."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.plan: Plan | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.target, 5)
                rank: list[int] = []
                for upward, source, sink in ((True, client, server), (False, server, client)):
                    threading.Thread(
                        target=self._pump, args=(source, sink, upward, rank), daemon=True
                    ).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, upward: bool, rank: list[int]
    ) -> None:
        seen, held = 0, list[Frame]()
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = _read_frame(source)
                if frame.type == MessageType.ATTACH:
                    rank.append(int(str(frame.header["rank"])))
                frames, waiting = [frame], held
                plan = self.plan
                if (
                    plan
                    and rank == [plan.rank]
                    and (upward, frame.type)
                    == (
                        plan.upward,
                        plan.type,
                    )
                ):
                    if seen == plan.number and not plan.done:
                        plan.done = True
                        frames, waiting = plan.tamper(frame, held), []
                    seen += 1
                for each in (*frames, *waiting):
                    sink.sendall(each.octets())
                if waiting:
                    held.clear()
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _read_frame(source: socket.socket) -> Frame:
    _, _, message_type, head, payload = PREFIX.unpack(_read(source, PREFIX.size))
    header = msgpack.unpackb(_read(source, head))
    return Frame(message_type, header, _read(source, payload))


def _read(source: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = source.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


@contextmanager
def tampering_proxy(address: str) -> Iterator[TamperingProxy]:
    """A proxy in front of ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    proxy = TamperingProxy((host, int(port)))
    try:
        yield proxy
    finally:
        proxy.close()
