"""Memory of one chunk of rows: the frames of its requests and the arrays of its layers.

Everything is taken once and used again by the next map and the next layer. Fresh memory for each
array would cost page faults, which the threads of a process take in turn.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from otpipe.client.link import ServerLink
from otpipe.errors import ProtocolError
from otpipe.model.spec import LinearMap
from otpipe.protocol.messages import Linear, MessageType, Result, message_head
from otpipe.protocol.wire import Header

_HEAD_ROOM = 128
"""Bytes before a payload, so that it is aligned whatever the length of its head."""


class Workspace:
    """Arrays by name, kept for the next use of the same name."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of that shape; what was last taken under the name is overwritten."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < num_bytes:
            held = self._held[name] = np.empty(num_bytes, np.uint8)
        return held[:num_bytes].view(dtype).reshape(shape)


class ExchangeBuffers:
    """Memory for the exchange of ``num_rows`` rows with any map of one shape.

    Attributes:
        mask_Tn: for the pads.
        masked_Tn: for the masked rows, the payload of the request.
        correction_Tm: for the corrections.
        answer_Tm: the payload of the answer, valid until the next exchange.
    """

    def __init__(self, memory: Workspace, linear_map: LinearMap, num_rows: int) -> None:
        dtype = np.dtype(f"<u{linear_map.ring_bytes}")
        inputs, outputs = (num_rows, linear_map.in_features), (num_rows, linear_map.out_features)
        self._num_rows = num_rows
        self._request_bytes = math.prod(inputs) * dtype.itemsize
        self._answer_bytes = math.prod(outputs) * dtype.itemsize
        request = memory.take("request", (_HEAD_ROOM + self._request_bytes,), np.uint8)
        answer = memory.take("answer", (_HEAD_ROOM + self._answer_bytes,), np.uint8)
        self._request = memoryview(request)  # type: ignore[arg-type]
        self._answer = memoryview(answer)  # type: ignore[arg-type]
        self.mask_Tn = memory.take("pads", inputs, dtype)
        self.masked_Tn = request[_HEAD_ROOM:].view(dtype).reshape(inputs)
        self.correction_Tm = memory.take("corrections", outputs, dtype)
        self.answer_Tm = answer[_HEAD_ROOM:].view(dtype).reshape(outputs)

    def exchange(self, map_index: int, link: ServerLink, meanwhile: Callable[[], None]) -> None:
        """Send ``masked_Tn`` and fill ``answer_Tm``.

        Raises:
            ServerRefused, ProtocolError, ConnectionLost: see :meth:`ServerLink.request`.
        """
        head = message_head(Linear(map_index, self._num_rows), self._request_bytes)
        due = Result(map_index, self._num_rows)
        answer_head = message_head(due, self._answer_bytes)
        start = _HEAD_ROOM - len(head)
        self._request[start:_HEAD_ROOM] = head

        def answer_bytes(header: Header) -> int:
            result = Result.parse(header)
            if result != due:
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due were "
                    f"map {due.map_index}, {due.rows} rows"
                )
            return self._answer_bytes

        link.exchange(
            self._request[start:],
            answer_head,
            self._answer[_HEAD_ROOM - len(answer_head) :],
            MessageType.RESULT,
            answer_bytes,
            meanwhile,
        )
