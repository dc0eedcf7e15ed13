"""Masked rows out and their answer back, each one compiled call.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from otpipe.client.link import ANSWER_TIMEOUT_S, ServerLink
from otpipe.errors import OtpipeError, ProtocolError
from otpipe.kernels.activations import mask_row, mask_rows, open_row, open_rows
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import (
    BROKEN,
    DONE,
    FIRST_READ_BYTES,
    INTERRUPTED,
    TIMED_OUT,
    looks_before_sleep,
    receive_all,
    receive_some,
    send_all,
    system_functions,
)
from otpipe.model.bundle import PublicMap
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import NO_BIAS, PEAK_LIMIT, output_headroom
from otpipe.protocol.fixed_point import NOT_FINITE as NOT_FINITE_TEXT
from otpipe.protocol.messages import Linear, MessageType, Result, message_head
from otpipe.protocol.wire import MIN_BYTES_PER_S, STALL_TIMEOUT_S, FrameConnection, Header

ANSWER_MS = int(1000 * ANSWER_TIMEOUT_S)
"""For the first bytes of an answer."""

STALL_MS = int(1000 * STALL_TIMEOUT_S)
"""For each further wait, and for each until the socket takes more."""

FOREIGN = BROKEN + 1
"""Something else arrived than the answer that is due; it waits in the answer's memory."""

NOT_FINITE = FOREIGN + 1
"""There was something to be sent that is no number."""


@kernel
def send_masked(
    functions: Array,
    fd: int,
    head: Array,
    frame: Array,
    masked_Tn: Array,
    x_Tn: Array,
    pad_Tn: Array,
    max_row_l2: float,
    headroom: float,
    peak_limit: float,
    unit_T: Array,
    timeout_ms: int,
) -> tuple[int, int]:
    """Round rows, subtract their pads and send them.

    Args:
        functions, fd: of ``native_io``.
        frame: uint8, for the whole request, from ``head`` to ``masked_Tn``: uint32, its end.
        x_Tn: float32. pad_Tn: uint32.
        max_row_l2, headroom, peak_limit: as for ``mask_rows``.
        unit_T: float64, filled with the real value of one unit of every row.
        timeout_ms: for every wait until the socket takes more.

    Returns:
        Status and number of bytes sent as of ``send_all``; NOT_FINITE for a row with a NaN or an
        infinity, of which, as of all others, nothing is sent.
    """
    for t in range(x_Tn.shape[0]):
        unit_T[t] = mask_row(x_Tn[t], pad_Tn[t], max_row_l2, headroom, peak_limit, masked_Tn[t])
        if not np.isfinite(unit_T[t]):
            return NOT_FINITE, 0
    frame[: head.shape[0]] = head
    return send_all(functions, fd, frame, 0, frame.shape[0], timeout_ms)


@kernel
def receive_opened(
    functions: Array,
    fd: int,
    frame: Array,
    filled: int,
    head: Array,
    answer_Tm: Array,
    correction_Tm: Array,
    unit_T: Array,
    scale_m: Array,
    bias_m: Array,
    out_Tm: Array,
    first_timeout_ms: int,
    timeout_ms: int,
    looks: int,
) -> tuple[int, int]:
    """Receive the answer that is due, add the correction, and return to real numbers.

    Args:
        frame: uint8, for the whole answer, whose payload is ``answer_Tm``: uint32.
        filled: how far it is filled.
        head: uint8, what the answer has to begin with.
        correction_Tm, unit_T, scale_m, bias_m, out_Tm: as for ``open_rows``.
        first_timeout_ms: for the first bytes. timeout_ms: for every further wait.
        looks: as of ``receive_some``, for the first bytes.

    Returns:
        Status, and how far ``frame`` is filled. Only after DONE does ``out_Tm`` hold the result.
    """
    if filled == 0:
        limit = min(frame.shape[0], FIRST_READ_BYTES)
        status, filled = receive_some(functions, fd, frame, 0, limit, first_timeout_ms, looks)
        if status != DONE:
            return status, filled
    head_bytes = head.shape[0]
    limit_s = timeout_ms // 1000 + frame.shape[0] // MIN_BYTES_PER_S
    if filled < head_bytes:
        status, filled = receive_all(functions, fd, frame, filled, head_bytes, timeout_ms, limit_s)
        if status != DONE:
            return status, filled
    for i in range(head_bytes):
        if frame[i] != head[i]:
            return FOREIGN, filled
    status, filled = receive_all(functions, fd, frame, filled, frame.shape[0], timeout_ms, limit_s)
    if status == DONE:
        for t in range(out_Tm.shape[0]):
            open_row(answer_Tm[t], correction_Tm[t], unit_T[t], scale_m, bias_m, out_Tm[t])
    return status, filled


@dataclass(frozen=True, slots=True, eq=False)
class RowFrames:
    """Request and answer of some rows through one map, in memory that is used again.

    Attributes:
        request, answer: uint8, the whole frames.
        masked, answers: their payloads, (T, n) and (T, m).
        request_head, answer_head: what they begin with.
        max_row_l2, headroom, scale_m, bias_m: of the map.
    """

    linear_map: LinearMap
    request_head: np.ndarray
    request: np.ndarray
    masked: np.ndarray
    answer_head: np.ndarray
    answer: np.ndarray
    answers: np.ndarray
    max_row_l2: float
    headroom: float
    scale_m: np.ndarray
    bias_m: np.ndarray

    @classmethod
    def of(
        cls, public: PublicMap, linear_map: LinearMap, rows: int, request: Memory, answer: Memory
    ) -> RowFrames:
        """Frames in the given memory, which others may share: one exchange at a time."""
        index, ring_bytes = linear_map.index, linear_map.ring_bytes
        in_bytes = rows * linear_map.in_features * ring_bytes
        out_bytes = rows * linear_map.out_features * ring_bytes
        request_head = message_head(Linear(index, rows), in_bytes)
        answer_head = message_head(Result(index, rows), out_bytes)
        words = np.dtype(f"<u{ring_bytes}")
        sent, received = request.take(in_bytes), answer.take(out_bytes)
        return cls(
            linear_map,
            np.frombuffer(request_head, np.uint8),
            sent[HEAD_ROOM - len(request_head) :],
            sent[HEAD_ROOM:].view(words).reshape(rows, -1),
            np.frombuffer(answer_head, np.uint8),
            received[HEAD_ROOM - len(answer_head) :],
            received[HEAD_ROOM:].view(words).reshape(rows, -1),
            public.max_row_l2,
            0.0 if ring_bytes == 1 else output_headroom(public.max_row_l1),
            public.scale.numpy(),
            NO_BIAS if public.bias is None else public.bias.numpy(),
        )


HEAD_ROOM = 128
"""Bytes before a payload, so that it is aligned whatever the length of its head."""


class Memory:
    """A block for frames, as large as the largest so far."""

    def __init__(self, payload_bytes: int) -> None:
        self._octets = np.empty(HEAD_ROOM + payload_bytes, np.uint8)

    def take(self, payload_bytes: int) -> np.ndarray:
        """uint8, ``HEAD_ROOM`` bytes and the payload."""
        if self._octets.size < HEAD_ROOM + payload_bytes:
            self._octets = np.empty(HEAD_ROOM + payload_bytes, np.uint8)
        return self._octets[: HEAD_ROOM + payload_bytes]


class RowExchange:
    """Masked linear maps of rows over a link, in compiled code where the connection allows it."""

    def __init__(self, link: ServerLink) -> None:
        self._link = link

    def linear(
        self,
        frames: RowFrames,
        x_Tn: np.ndarray,
        pad_Tn: np.ndarray,
        meanwhile: Callable[[], np.ndarray],
        out_Tm: np.ndarray,
    ) -> None:
        """out = W x + bias.

        Args:
            meanwhile: called once, when the request has left; returns the corrections, uint32
                (T, m). The pads are not looked at after that.

        Raises:
            OtpipeError: an activation is not finite; nothing was sent.
            ServerRefused, ProtocolError, ConnectionLost: see :meth:`ServerLink.request`.
        """
        unit_T = np.empty(len(x_Tn), np.float64)
        connection = self._link.plain_connection()
        once = _Once(meanwhile)
        if connection is not None:
            if self._directly(connection, frames, x_Tn, pad_Tn, unit_T, once, out_Tm):
                return
        else:
            unit_T[:] = mask_rows(
                x_Tn, pad_Tn, frames.max_row_l2, frames.headroom, PEAK_LIMIT, frames.masked
            )[1]
            if not np.isfinite(unit_T).all():
                raise OtpipeError(NOT_FINITE_TEXT)
        self.send(frames, once, connection)
        open_rows(frames.answers, once.value, unit_T, frames.scale_m, frames.bias_m, out_Tm)

    def send(
        self,
        frames: RowFrames,
        meanwhile: Callable[[], object],
        sent_on: FrameConnection | None = None,
    ) -> None:
        """Send the masked rows that are in place, and receive the answer into its place.

        It is valid until the next exchange. ``sent_on`` as of :meth:`ServerLink.exchange`.
        """
        due = Result(frames.linear_map.index, len(frames.masked))

        def read() -> None:
            meanwhile()

        frames.request[: frames.request_head.size] = frames.request_head

        def answer_bytes(header: Header) -> int:
            result = Result.parse(header)
            if result != due:
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due were "
                    f"map {due.map_index}, {due.rows} rows"
                )
            return frames.answers.nbytes

        self._link.exchange(
            memoryview(frames.request),  # type: ignore[arg-type]
            frames.answer_head.tobytes(),
            memoryview(frames.answer),  # type: ignore[arg-type]
            MessageType.RESULT,
            answer_bytes,
            read,
            sent_on,
        )

    def _directly(
        self,
        connection: FrameConnection,
        frames: RowFrames,
        x_Tn: np.ndarray,
        pad_Tn: np.ndarray,
        unit_T: np.ndarray,
        meanwhile: _Once,
        out_Tm: np.ndarray,
    ) -> bool:
        """Mask, send, receive and open in compiled code; returns whether it did.

        Where the peer did anything but answer, the request is in place for :meth:`send`, and the
        connection holds what came, or is closed because a part of the answer is lost.
        """
        fd, functions = connection.descriptor, system_functions()
        filled = 0
        try:
            status, sent = send_masked(
                functions,
                fd,
                frames.request_head,
                frames.request,
                frames.masked,
                x_Tn,
                pad_Tn,
                frames.max_row_l2,
                frames.headroom,
                PEAK_LIMIT,
                unit_T,
                STALL_MS,
            )
            if status == NOT_FINITE:
                raise OtpipeError(NOT_FINITE_TEXT)
            while status == INTERRUPTED:  # by a signal, whose handler has run by now
                status, sent = send_all(
                    functions, fd, frames.request, sent, frames.request.size, STALL_MS
                )
            if status != DONE:
                connection.close()
                return False
            correction_Tm = meanwhile()
            status = INTERRUPTED
            while status == INTERRUPTED:
                status, filled = receive_opened(
                    functions,
                    fd,
                    frames.answer,
                    filled,
                    frames.answer_head,
                    frames.answers,
                    correction_Tm,
                    unit_T,
                    frames.scale_m,
                    frames.bias_m,
                    out_Tm,
                    ANSWER_MS,
                    STALL_MS,
                    looks_before_sleep(),
                )
        except BaseException:
            self._link.drop()  # an answer may be under way, which no later request may take
            raise
        if status != DONE:
            self._leave(connection, frames, status, filled)
            return False
        traffic = connection.traffic
        traffic.frames_sent += 1
        traffic.frames_received += 1
        traffic.bytes_sent += sent
        traffic.bytes_received += filled
        self._link.round_trips += 1
        return True

    @staticmethod
    def _leave(connection: FrameConnection, frames: RowFrames, status: int, filled: int) -> None:
        """After ``receive_opened`` that did not end well: the connection holds what came, or is
        closed because a part of the answer is lost."""
        if status == FOREIGN:
            connection.unread(frames.answer[:filled])
        elif filled or status == TIMED_OUT:
            connection.close()

    def go_on(
        self,
        connection: FrameConnection,
        frames: RowFrames,
        unit_T: np.ndarray,
        sent: bool,
        status: int,
        filled: int,
        meanwhile: Callable[[], np.ndarray],
        out_Tm: np.ndarray,
    ) -> None:
        """Finish a map whose masked rows are in place, where compiled code has stopped.

        Args:
            connection: over which it was sent, or was to be.
            unit_T: of the masked rows.
            sent: whether the request has left; ``status`` and ``filled`` are then those of
                ``receive_opened``, else ``status`` is that of ``send_masked``.
            meanwhile: returns the corrections, uint32 (T, m).

        Raises as :meth:`linear`.
        """
        if status == NOT_FINITE:
            raise OtpipeError(NOT_FINITE_TEXT)
        if sent:
            self._leave(connection, frames, status, filled)
        else:
            connection.close()
        once = _Once(meanwhile)
        self.send(frames, once, connection)
        open_rows(frames.answers, once.value, unit_T, frames.scale_m, frames.bias_m, out_Tm)


class _Once:
    """A function that is called at most once, and what it returned."""

    def __init__(self, function: Callable[[], np.ndarray]) -> None:
        self._function: Callable[[], np.ndarray] | None = function
        self.value = np.empty((0, 0), np.uint32)

    def __call__(self) -> np.ndarray:
        function, self._function = self._function, None
        if function is not None:
            self.value = function()
        return self.value
