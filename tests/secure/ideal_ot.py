"""INSECURE: oblivious transfer by a trusted third party inside the process. For tests only.

Both parties hand their inputs to one object, which hands out the results the functionality defines:
correct, without cryptography, and fast. On the channel go as many zero bytes as the real stack
sends for the same requests, so that traffic and rounds can be compared; what the parties *learn* is
recorded, so that tests can look at it.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otpipe.ot import (
    ReceiveCorrelated,
    ReceiveOneOfMany,
    SendCorrelated,
    SendOneOfMany,
)
from otpipe.ot.channel import Channel
from otpipe.ot.plan import Shape
from otpipe.secure.shares import random_ring, reduced

TIMEOUT_S = 60.0


class InsecureIdealOt:
    """The trusted third party of one pair.

    Attributes:
        client_learned: what each request gave to the client and the bits of its values, in order.
            (What a request gives to the server is uniform by definition.)
        cots: correlated OTs the requests would have taken.
    """

    def __init__(self) -> None:
        self._choices: queue.Queue[list[Any]] = queue.Queue()
        self._results: queue.Queue[list[Tensor]] = queue.Queue()
        self.client_learned: list[tuple[Tensor, int]] = []
        self.cots = 0

    def ends(self, server: Channel, client: Channel) -> tuple[InsecureSender, InsecureReceiver]:
        """The two sessions."""
        return InsecureSender(self, server), InsecureReceiver(self, client)


class InsecureSender:
    """Meets :class:`InsecureReceiver`."""

    def __init__(self, ideal: InsecureIdealOt, channel: Channel) -> None:
        self._ideal, self._channel = ideal, channel

    def exchange(self, requests: Sequence[Any]) -> list[Tensor | None]:
        """Serve the receiver's requests of one round."""
        shapes = [_send_shape(request) for request in requests]
        self._ideal.cots += sum(shape.cots for shape in shapes)
        self._channel.receive("ot.choices@0", sum(shape.choice_bytes for shape in shapes))
        choices = self._ideal._choices.get(timeout=TIMEOUT_S)
        assert len(choices) == len(requests)
        own: list[Tensor | None] = []
        results = []
        for request, choice in zip(requests, choices, strict=True):
            if isinstance(request, SendCorrelated):
                mask = random_ring(request.correlation.shape, request.bits, torch.device("cpu"))
                bit = choice if request.correlation.ndim == 1 else choice[:, None]
                results.append(reduced(mask + bit * request.correlation, request.bits))
                own.append(mask)
            else:
                messages = request.messages
                limit = 1 << request.bits if request.bits < 63 else None
                assert limit is None or (int(messages.min()) >= 0 and int(messages.max()) < limit)
                results.append(messages[torch.arange(len(choice)), choice])
                own.append(None)
        self._ideal._results.put(results)
        size = sum(shape.answer_bytes(shape.count) for shape in shapes)
        self._channel.send("ot.answers@0", np.zeros(size, np.uint8))
        return own


class InsecureReceiver:
    """Meets :class:`InsecureSender`."""

    def __init__(self, ideal: InsecureIdealOt, channel: Channel) -> None:
        self._ideal, self._channel = ideal, channel

    def exchange(self, requests: Sequence[Any]) -> list[Tensor]:
        """The results of one round."""
        shapes = [_receive_shape(request) for request in requests]
        choices = [
            (request.index if isinstance(request, ReceiveOneOfMany) else request.choice).to(
                torch.int64
            )
            for request in requests
        ]
        for choice, shape in zip(choices, shapes, strict=True):
            assert len(choice) == 0 or (
                int(choice.min()) >= 0 and int(choice.max()) < shape.num_messages
            )
        self._ideal._choices.put(choices)
        size = sum(shape.choice_bytes for shape in shapes)
        self._channel.send("ot.choices@0", np.zeros(size, np.uint8))
        answer = sum(shape.answer_bytes(shape.count) for shape in shapes)
        self._channel.receive("ot.answers@0", answer)
        results = self._ideal._results.get(timeout=TIMEOUT_S)
        shaped = []
        for request, result in zip(requests, results, strict=True):
            if request.words is None:
                result = result if result.ndim == 1 else result[:, 0]
            assert result.shape[1:] == (() if request.words is None else (request.words,))
            shaped.append(result)
            self._ideal.client_learned.append((result, request.bits))
        return shaped


def _send_shape(request: Any) -> Shape:
    if isinstance(request, SendCorrelated):
        values = request.correlation
        words = 1 if values.ndim == 1 else values.shape[1]
        return Shape(True, len(values), request.factor_bits, words, request.bits)
    assert isinstance(request, SendOneOfMany)
    count, num_messages, words = request.messages.shape
    return Shape(False, count, num_messages.bit_length() - 1, words, request.bits)


def _receive_shape(request: Any) -> Shape:
    words = 1 if request.words is None else request.words
    if isinstance(request, ReceiveCorrelated):
        return Shape(True, len(request.choice), request.factor_bits, words, request.bits)
    assert isinstance(request, ReceiveOneOfMany)
    return Shape(False, len(request.index), request.index_bits, words, request.bits)
