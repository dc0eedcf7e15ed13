"""What each party of a session receives, and the properties that hide the other's secret.

Each check takes recorded messages and returns the names of what it found wrong, so that the same
checks run on sound sessions (nothing found) and on sessions with a planted fault (it is found).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from ot_helpers import Pair, Recording, both, looks_uniform, no_row_repeats, recorded_pair
from torch import Tensor

from otpipe.ot import pads_cpu

COUNT = 4096
BITS = 64

Bytes = NDArray[np.uint8]


def secret_vectors(n: int, below: int) -> dict[str, Tensor]:
    """Extreme and random values of a secret: what is sent must look the same under all of them."""
    random = torch.from_numpy(np.frombuffer(os.urandom(8 * n), np.int64).copy())
    return {
        "zeros": torch.zeros(n, dtype=torch.int64),
        "all largest": torch.full((n,), below - 1),
        "alternating": torch.arange(n) % 2 * (below - 1),
        "random": random % below,
    }


@dataclass
class Views:
    """Messages by kind, for each value of the secret they must not tell."""

    to_sender: dict[str, dict[str, Bytes]] = field(default_factory=dict)
    to_receiver: dict[str, dict[str, Bytes]] = field(default_factory=dict)


def last(end: Recording, kind: str) -> Bytes:
    return end.payloads[kind][-1]


def choice_views() -> Views:
    """All that the sender sees, for several choices; the messages do not matter."""
    views = Views()
    for b in (1, 8):
        for name, index in secret_vectors(COUNT, 1 << b).items():
            pair, _, client = recorded_pair()
            both(
                lambda b=b, pair=pair: pair.sender.send_one_of_many(
                    torch.zeros((COUNT, 1 << b), dtype=torch.int64), 1
                ),
                lambda b=b, pair=pair, index=index: pair.receiver.receive_one_of_many(index, b, 1),
            )
            for kind in ("ot.corrections", "ot.choices"):
                views.to_sender.setdefault(f"{kind}, b = {b}", {})[name] = last(client, kind)
            setup = last(client, "ot.setup.receiver")
            # a point has no uniform bytes as its top bytes are below those of p: leave the point
            views.to_sender.setdefault("ot.setup.receiver", {})[f"{name} {b}"] = setup[
                4 + 32 + 64 :
            ]
    return views


def message_views() -> Views:
    """All that the receiver sees, for several messages and correlations; its choices are zero."""
    views = Views()
    zero = torch.zeros(COUNT, dtype=torch.int64)
    top = 1 << 62
    for name, secret in secret_vectors(COUNT, top).items():
        pair, server, _ = recorded_pair()
        both(
            lambda pair=pair, secret=secret: pair.sender.send_correlated(secret, BITS),
            lambda pair=pair: pair.receiver.receive_correlated(zero, BITS),
        )
        views.to_receiver.setdefault("correlated", {})[name] = last(server, "ot.answers")
        # The chosen message 0 is the receiver's; the others are what must stay hidden.
        messages = torch.stack([zero, secret, secret, secret], 1)
        both(
            lambda pair=pair, messages=messages: pair.sender.send_one_of_many(messages, BITS),
            lambda pair=pair: pair.receiver.receive_one_of_many(zero, 2, BITS),
        )
        views.to_receiver.setdefault("one of four", {})[name] = last(server, "ot.answers")
    return views


def faults_of(views: Views) -> set[str]:
    """Kinds of messages that do not look uniform, or repeat, for some secret."""
    found = set()
    for messages in (views.to_sender, views.to_receiver):
        for kind, by_secret in messages.items():
            for payload in by_secret.values():
                width = 32 if kind.startswith("ot.") else 8
                rows = payload[: payload.size // width * width].reshape(-1, width)
                if not looks_uniform(rows) or not no_row_repeats(rows):
                    found.add(kind)
    return found


class TweakRecorder:
    """Every tweak that a party hashes with, by its permutation; stands in for the portable hash."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, int, int, int]] = []
        self._hash = pads_cpu._tmmo_portable

    def __call__(
        self,
        x: NDArray[np.uint64],
        indices: Bytes,
        pads: NDArray[np.uint64],
        key: bytes,
        numbers: NDArray[np.int64],
    ) -> None:
        for block in range(pads.shape[1] // 2):
            self.seen += [
                (key, int(number), int(index), block)
                for number, index in zip(numbers, indices, strict=True)
            ]
        self._hash(x, indices, pads, key, numbers)


def send_zeros(pair: Pair, server: Recording, times: int = 2) -> Bytes:
    """Answers of several calls with zero messages: the receiver's choices are zero too."""
    index = torch.zeros(COUNT, dtype=torch.int64)
    messages = torch.zeros((COUNT, 4), dtype=torch.int64)
    for _ in range(times):
        both(
            lambda: pair.sender.send_one_of_many(messages, BITS),
            lambda: pair.receiver.receive_one_of_many(index, 2, BITS),
            server,
        )
    return np.concatenate(server.payloads["ot.answers"])
