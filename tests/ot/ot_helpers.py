"""Two parties in two threads, slow references, and statistics, shared by the tests of otpipe.ot."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from Crypto.Cipher import AES
from numpy.typing import NDArray
from torch import Tensor

from otpipe.ot import LocalChannel, OtParams, OtReceiver, OtSender, local_channels
from otpipe.ot.pads import hash_key

S = TypeVar("S")
C = TypeVar("C")


def both(server: Callable[[], S], client: Callable[[], C], *to_close: LocalChannel) -> tuple[S, C]:
    """Run the server's call in a thread and the client's here; the first error of either raises.

    ``to_close``: an end of their line, closed at an error, so that the other party need not wait.
    """
    result: list[S] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(server())
        except BaseException as error:
            failed(error)

    def failed(error: BaseException) -> None:
        errors.append(error)
        for end in to_close:
            end.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        got = client()
    except BaseException as error:
        failed(error)
    thread.join()
    if errors:
        raise errors[0]
    return result[0], got


@dataclass
class Pair:
    """A session of two parties."""

    sender: OtSender
    receiver: OtReceiver
    server: LocalChannel
    client: LocalChannel


def make_pair(
    params: OtParams | None = None, device: str = "cpu", timeout_s: float = 20, setup: bool = True
) -> Pair:
    """A new session, set up; ``timeout_s`` is how long an end waits after that."""
    server, client = local_channels(20)
    options = {} if params is None else {"params": params}
    sender = OtSender(server, device, **options)  # type: ignore[arg-type]
    receiver = OtReceiver(client, **options)  # type: ignore[arg-type]
    if setup:
        both(sender.setup, receiver.setup)
    server._timeout_s = client._timeout_s = timeout_s
    return Pair(sender, receiver, server, client)


class Recording(LocalChannel):
    """A channel end that keeps every payload it sends, by kind of label."""

    def __init__(self, end: LocalChannel) -> None:
        self.__dict__.update(end.__dict__)
        self.payloads: dict[str, list[NDArray[np.uint8]]] = {}

    def send(self, label: str, payload: NDArray[np.uint8]) -> None:
        self.payloads.setdefault(label.partition("@")[0], []).append(payload.copy())
        super().send(label, payload)


def recorded_pair(params: OtParams | None = None) -> tuple[Pair, Recording, Recording]:
    """A session whose messages are kept: (pair, server's end, client's end)."""
    server, client = (Recording(end) for end in local_channels(20))
    options: dict[str, Any] = {} if params is None else {"params": params}
    sender, receiver = OtSender(server, "cpu", **options), OtReceiver(client, **options)
    both(sender.setup, receiver.setup)
    return Pair(sender, receiver, server, client), server, client


def random_words(*shape: int) -> NDArray[np.uint64]:
    return np.frombuffer(bytearray(os.urandom(8 * int(np.prod(shape)))), np.uint64).reshape(shape)


def random_values(shape: tuple[int, ...], bits: int = 64) -> Tensor:
    """int64, uniform in [0, 2^bits), or all of int64."""
    values = torch.from_numpy(random_words(*shape).view(np.int64))
    return values if bits == 64 else values & ((1 << bits) - 1)


def random_choices(n: int, bits: int = 1) -> Tensor:
    return torch.from_numpy(np.frombuffer(os.urandom(n), np.uint8).copy() & ((1 << bits) - 1))


def reduced(values: Tensor, bits: int) -> Tensor:
    """The representative that results have."""
    return values if bits == 64 else values & ((1 << bits) - 1)


# --- references: Python integers, one block at a time ---------------------------------------------


def block_int(block: NDArray[np.uint64]) -> int:
    return int(block[0]) | int(block[1]) << 64


def field_product(a: int, b: int) -> int:
    """In GF(2)[x] / (x^128 + x^7 + x^2 + x + 1), bit j the coefficient of x^j."""
    total = 0
    for j in range(128):
        if b >> j & 1:
            total ^= a << j
    for j in reversed(range(128, 256)):
        if total >> j & 1:
            total ^= ((1 << 128) | 0x87) << (j - 128)
    return total


def reference_hash(session: bytes, number: int, index: int, block: int, x: int, epoch: int) -> int:
    """TMMO of one block, from its definition."""
    cipher = AES.new(hash_key(session, epoch), AES.MODE_ECB)

    def permuted(value: int) -> int:
        return int.from_bytes(cipher.encrypt(value.to_bytes(16, "little")), "little")

    once = permuted(x)
    return permuted(once ^ number ^ (256 * block + index) << 64) ^ once


def packed_integer(values: list[int], bits: int) -> bytes:
    """Values end to end, lowest bit first, by one big integer."""
    total = 0
    for i, value in enumerate(values):
        total |= (value % (1 << bits)) << (bits * i)
    return total.to_bytes(-(-bits * len(values) // 8), "little")


# --- statistics; 6 standard deviations are not chance ---------------------------------------------


def chi_square_z(octets: NDArray[np.uint8]) -> float:
    """How many standard deviations the byte histogram lies from uniform."""
    counts = np.bincount(octets.reshape(-1), minlength=256)
    expected = octets.size / 256
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - 255) / np.sqrt(2 * 255)


def bit_bias_z(octets: NDArray[np.uint8]) -> float:
    """Largest deviation of any bit position of the last axis from one half, in deviations."""
    bits = np.unpackbits(octets.reshape(-1, octets.shape[-1]), axis=1)
    z = (bits.sum(axis=0) - len(bits) / 2) / (np.sqrt(len(bits)) / 2)
    return float(np.abs(z).max())


def neighbour_z(octets: NDArray[np.uint8]) -> float:
    """Correlation of the bits of each row with those of the next row, in deviations."""
    bits = np.unpackbits(octets.reshape(-1, octets.shape[-1]), axis=1).astype(bool)
    same = int((bits[1:] == bits[:-1]).sum())
    total = bits[1:].size
    return abs(same - total / 2) / (np.sqrt(total) / 2)


def looks_uniform(octets: NDArray[np.uint8]) -> bool:
    """Bytes, bit positions, and neighbouring rows (last axis: one row) all look uniform."""
    return abs(chi_square_z(octets)) < 6 and bit_bias_z(octets) < 6 and neighbour_z(octets) < 6


def no_row_repeats(octets: NDArray[np.uint8]) -> bool:
    """Rows of at least 8 bytes: uniform ones never meet."""
    assert octets.shape[-1] >= 8
    rows = octets.reshape(-1, octets.shape[-1])
    return len(np.unique(rows, axis=0)) == len(rows)
