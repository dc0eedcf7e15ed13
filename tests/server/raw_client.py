"""A client that says exactly what a test tells it to, and a check that the server still works."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgpack
import numpy as np
import torch

from otpipe.crypto.noise import choose_upload_bytes
from otpipe.crypto.params import params_for_ring
from otpipe.kernels.ring_gemm import ring_gemm
from otpipe.model.bundle import ModelBundle
from otpipe.protocol.messages import (
    Error,
    Hello,
    Linear,
    Message,
    MessageType,
    OleBegin,
    Welcome,
    send_message,
)
from otpipe.protocol.wire import MAGIC, PREFIX, WIRE_VERSION, FrameConnection

A_KEY = bytes(range(32))


def frame(
    message_type: int,
    header: object,
    payload: bytes = b"",
    *,
    magic: bytes = MAGIC,
    version: int = WIRE_VERSION,
    header_bytes: int | None = None,
    payload_bytes: int | None = None,
) -> bytes:
    """A frame, with lies where asked for."""
    head = header if isinstance(header, bytes) else msgpack.packb(header)
    announced = (
        len(head) if header_bytes is None else header_bytes,
        len(payload) if payload_bytes is None else payload_bytes,
    )
    return PREFIX.pack(magic, version, message_type, *announced) + head + payload


def message_frame(message: Message, payload: bytes = b"", **lies: int) -> bytes:
    return frame(message.TYPE, message.header(), payload, **lies)  # type: ignore[arg-type]


HELLO = message_frame(Hello("test"))


class RawClient:
    """A TCP connection without manners."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.frames = FrameConnection(self.sock, stall_timeout_s=timeout_s)

    def send(self, *pieces: bytes) -> None:
        """Send; a server that has hung up already is no error here."""
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.sock.sendall(piece)

    def answer(self) -> tuple[int, dict[str, object]]:
        """The next frame, its payload thrown away."""
        message_type, header, announced = self.frames.receive_head()
        self.frames.receive_payload(announced, announced)
        return message_type, header

    def refusal(self) -> str:
        """The sentence of the ERROR that comes next or after other answers; then the end."""
        while True:
            message_type, header = self.answer()
            if message_type == MessageType.ERROR:
                text = Error.parse(header).text
                assert self.is_closed_by_server()
                return text

    def is_closed_by_server(self) -> bool:
        """Whether the server hangs up, without a word, before the timeout."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.sock.close()


@contextmanager
def raw_client(port: int, *pieces: bytes, greet: bool = True) -> Iterator[RawClient]:
    """Connect, greet unless told otherwise, and send ``pieces``."""
    client = RawClient(port)
    try:
        if greet:
            client.send(HELLO)
            message_type, header = client.answer()
            assert message_type == MessageType.WELCOME
            Welcome.parse(header)
        client.send(*pieces)
        yield client
    finally:
        client.close()


@dataclass(frozen=True)
class OleOffer:
    """An honest OLE_BEGIN for a map, and the sizes of what follows."""

    begin: OleBegin
    in_features: int
    coordinate_bytes: int


def honest_ole(bundle: ModelBundle, map_index: int, num_slots: int = 2048) -> OleOffer:
    linear_map = bundle.spec.maps[map_index]
    params = params_for_ring(linear_map.ring_bits)
    upload_bytes = choose_upload_bytes(
        params,
        bundle.maps[map_index].max_row_l2,
        linear_map.in_features,
        params.ring_degree // num_slots,
    )
    return OleOffer(
        OleBegin(map_index, num_slots, upload_bytes, A_KEY),
        linear_map.in_features,
        params.ring_degree * upload_bytes,
    )


def linear_bytes(bundle: ModelBundle, map_index: int, rows: int, seed: int = 0) -> bytes:
    """Uniform rows for a LINEAR."""
    linear_map = bundle.spec.maps[map_index]
    generator = np.random.default_rng(seed)
    return generator.bytes(rows * linear_map.in_features * linear_map.ring_bytes)


def expected_linear(weight: torch.Tensor, payload: bytes, ring_bits: int) -> np.ndarray:
    """W x mod 2^k, bytes as the server sends them."""
    storage = np.int8 if ring_bits == 8 else np.int32
    x_Tn = np.frombuffer(payload, storage).reshape(-1, weight.shape[1])
    y_Tm = ring_gemm(torch.from_numpy(x_Tn.astype(np.int32)), weight, ring_bits)
    return y_Tm.numpy().astype(storage).reshape(-1).view(np.uint8)


def ask_linear(
    connection: FrameConnection, map_index: int, rows: int, payload: bytes
) -> np.ndarray:
    """One masked linear map; uint8 (bytes,)."""
    send_message(connection, Linear(map_index, rows), payload)
    message_type, header, announced = connection.receive_head()
    assert (message_type, header) == (
        MessageType.RESULT,
        {"map_index": map_index, "rows": rows},
    ), header
    return connection.receive_payload(announced, announced)


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether ``condition`` comes true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def garbage(num_bytes: int) -> bytes:
    return os.urandom(num_bytes)


def drip(client: RawClient, data: Sequence[int] | bytes, pause_s: float) -> None:
    """Send byte by byte."""
    for value in data:
        client.send(bytes([value]))
        time.sleep(pause_s)
