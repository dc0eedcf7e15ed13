"""Masked rows from the socket to the device and back in one compiled loop.

A client sends one or a few masked rows after another and waits for each answer. For such frames
nothing is left to decide in Python: the head is checked against the two fields it may have, the
payload against the length that its map calls for, and the product is the launch of what was
recorded. The loop releases the GIL, so connections do not wait for each other's interpreter.

Whatever else arrives is handed to the session as it is, which answers or refuses it as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from otpipe.errors import ConnectionLost
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import (
    DONE,
    FIRST_READ_BYTES,
    INTERRUPTED,
    LOCK,
    TIMED_OUT,
    UNLOCK,
    call_1,
    call_2,
    copy_bytes,
    looks_before_sleep,
    new_mutex,
    receive_all,
    receive_some,
    send_all,
    system_functions,
)
from otpipe.model.spec import LinearMap
from otpipe.pipeline.graphs import RowLine
from otpipe.protocol.messages import Linear, MessageType, Result
from otpipe.protocol.wire import (
    MIN_BYTES_PER_S,
    PREFIX,
    FrameConnection,
    IdlePeer,
    StalledPeer,
    frame_head,
)

_OTHER, _IDLE, _CUT_SHORT, _UNSENT, _DEVICE_FAILED = range(5)

_IN, _OUT = range(2)  # columns of the table of maps
_FRAMES, _BYTES_IN, _BYTES_OUT = range(3)  # counted

_PREFIX_BYTES = PREFIX.size
_RESULT_TYPE = int(MessageType.RESULT)
_LONGEST_WAIT_MS = 2**31 - 1  # poll takes an int
_TYPE_AT, _HEADER_BYTES_AT, _PAYLOAD_BYTES_AT = 6, 8, 12
_INDEX_KEY = b"\x82\xa9map_index"
_ROWS_KEY = b"\xa4rows"
_LONGEST_HEAD = PREFIX.size + len(_INDEX_KEY) + 3 + len(_ROWS_KEY) + 1


def _pattern() -> np.ndarray:
    """uint8: the fixed parts of a head: magic, version and type; first key; second key."""
    start = frame_head(MessageType.LINEAR, Linear(0, 1).header(), 0)[:_HEADER_BYTES_AT]
    return np.frombuffer(start + _INDEX_KEY + _ROWS_KEY, np.uint8).copy()


_PATTERN = _pattern()
assert frame_head(MessageType.RESULT, Result(0, 1).header(), 0)[PREFIX.size :] == (
    _INDEX_KEY + b"\x00" + _ROWS_KEY + b"\x01"
), "request and answer have the same header"


@kernel
def _map_asked_for(frame: Array, filled: int, pattern: Array) -> tuple[Any, Any, int]:
    """Map, rows and length of the head, if the frame asks for 1 to 127 rows of a map.

    Else (-1, 0, 0), or (-2, 0, 0) for a head of which not all has arrived. Everything is compared
    that the session's own parser would look at.
    """
    key_bytes, tail_bytes = len(_INDEX_KEY), len(_ROWS_KEY)
    if filled < _PREFIX_BYTES:
        return -2, 0, 0
    for i in range(_HEADER_BYTES_AT):
        if frame[i] != pattern[i]:
            return -1, 0, 0
    header_bytes = _word(frame, _HEADER_BYTES_AT)
    number_bytes = header_bytes - key_bytes - tail_bytes - 1
    if number_bytes < 1 or number_bytes > 3:
        return -1, 0, 0
    head_bytes = _PREFIX_BYTES + header_bytes
    if filled < head_bytes:
        return -2, 0, 0
    at = _PREFIX_BYTES
    for i in range(key_bytes):
        if frame[at + i] != pattern[_HEADER_BYTES_AT + i]:
            return -1, 0, 0
    at += key_bytes
    # msgpack: 0 to 127 in one byte, then 0xcc and one byte, 0xcd and two, always the shortest.
    first: Any = np.int64(frame[at])
    index: Any = np.int64(-1)
    if number_bytes == 1 and first < 128:
        index = first
    elif number_bytes == 2 and first == 0xCC and frame[at + 1] >= 128:
        index = np.int64(frame[at + 1])
    elif number_bytes == 3 and first == 0xCD and frame[at + 1] > 0:
        index = np.int64(frame[at + 1]) << 8 | np.int64(frame[at + 2])
    at += number_bytes
    for i in range(tail_bytes):
        if frame[at + i] != pattern[_HEADER_BYTES_AT + key_bytes + i]:
            return -1, 0, 0
    rows: Any = np.int64(frame[head_bytes - 1])
    if rows < 1 or rows > 127:
        return -1, 0, 0
    return index, rows, head_bytes


@kernel
def _word(octets: Array, at: int) -> Any:
    """Little-endian uint32."""
    value: Any = np.int64(0)
    for i in range(4):
        value |= np.int64(octets[at + i]) << np.int64(8 * i)
    return value


@kernel
def _put_word(octets: Array, at: int, value: int) -> None:
    for i in range(4):
        octets[at + i] = np.uint8((value >> (8 * i)) & 0xFF)


@kernel
def _product(
    functions: Array,
    launch: int,
    wait: int,
    handle: int,
    stream: int,
    mutex: Array,
    line_in: Array,
    line_out: Array,
    request: Array,
    answer: Array,
) -> int:
    """answer = W request; returns 0, or what the driver says."""
    held = np.int64(mutex.ctypes.data)
    call_1(functions[LOCK], held)
    copy_bytes(functions, request, line_in)
    failed = np.int32(call_2(launch, handle, stream))
    if failed == 0:
        failed = np.int32(call_1(wait, stream))
    if failed == 0:
        copy_bytes(functions, line_out[: answer.shape[0]], answer)
    call_1(functions[UNLOCK], held)
    return int(failed)


@kernel
def _serve(
    functions: Array,
    fd: int,
    pattern: Array,
    maps: Array,
    sizes: Array,
    launches: Array,
    launch: int,
    wait: int,
    stream: int,
    mutex: Array,
    line_in: Array,
    line_out: Array,
    frame: Array,
    answer: Array,
    idle_ms: int,
    stall_ms: int,
    looks: int,
    counts: Array,
) -> tuple[int, int]:
    """Serve frames until one is not for this loop: why it ended, and how far ``frame`` is filled.

    maps: int64 (M, 2): bytes of a masked row, bytes of its product. sizes, launches: of a line.
    """
    while True:
        status, filled = receive_some(functions, fd, frame, 0, FIRST_READ_BYTES, idle_ms, looks)
        if status == INTERRUPTED:
            continue
        if status != DONE:
            return (_IDLE if status == TIMED_OUT else _OTHER), filled
        index, rows, head_bytes = _map_asked_for(frame, filled, pattern)
        while index == -2 and status in (DONE, INTERRUPTED):
            status, filled = receive_some(functions, fd, frame, filled, _LONGEST_HEAD, stall_ms, 0)
            index, rows, head_bytes = _map_asked_for(frame, filled, pattern)
        if index < 0 or index >= maps.shape[0]:
            return _OTHER, filled
        in_bytes, out_bytes = rows * maps[index, _IN], rows * maps[index, _OUT]
        handle: Any = np.int64(0)
        for i in range(sizes.shape[0]):
            if sizes[i] >= rows:
                handle = launches[index, i]
                break
        frame_bytes = head_bytes + in_bytes
        if handle == 0 or filled > frame_bytes or _word(frame, _PAYLOAD_BYTES_AT) != in_bytes:
            return _OTHER, filled
        limit_s = stall_ms // 1000 + frame_bytes // MIN_BYTES_PER_S
        status = INTERRUPTED
        while status == INTERRUPTED:
            status, filled = receive_all(
                functions, fd, frame, filled, frame_bytes, stall_ms, limit_s
            )
        if status != DONE:
            return _CUT_SHORT, filled
        failed = _product(
            functions,
            launch,
            wait,
            handle,
            stream,
            mutex,
            line_in,
            line_out,
            frame[head_bytes:frame_bytes],
            answer[head_bytes : head_bytes + out_bytes],
        )
        if failed != 0:
            return _DEVICE_FAILED, failed
        answer[:head_bytes] = frame[:head_bytes]
        answer[_TYPE_AT] = np.uint8(_RESULT_TYPE)
        _put_word(answer, _PAYLOAD_BYTES_AT, out_bytes)
        status, sent = INTERRUPTED, 0
        while status == INTERRUPTED:
            status, sent = send_all(functions, fd, answer, sent, head_bytes + out_bytes, stall_ms)
        if status != DONE:
            return _UNSENT, status
        counts[_FRAMES] += 1
        counts[_BYTES_IN] += frame_bytes
        counts[_BYTES_OUT] += sent


class RowServer:
    """Serves masked rows of one connection. For one thread.

    Args:
        connection: of one client.
        linear_maps: the whole model's table, indexed by map.
        line: the device's side. Several connections may share one.
        on_failure: called with the driver's error when a launch fails; must raise.
        stall_timeout_s: silence inside a frame after which a client is dropped.
    """

    def __init__(
        self,
        connection: FrameConnection,
        linear_maps: Sequence[LinearMap],
        line: RowLine,
        on_failure: Callable[[int], None],
        stall_timeout_s: float,
    ) -> None:
        self._connection = connection
        self._line = line
        self._on_failure = on_failure
        self._stall_timeout_s = stall_timeout_s
        self._maps = np.array(
            [(m.in_features * m.ring_bytes, m.out_features * m.ring_bytes) for m in linear_maps],
            np.int64,
        )
        # Memory that is never written to is never taken: a client that decodes needs one row's.
        self._frame = np.empty(max(FIRST_READ_BYTES, line.inputs.size + _LONGEST_HEAD), np.uint8)
        self._answer = np.empty(line.outputs.size + _LONGEST_HEAD, np.uint8)
        self._counts = np.zeros(3, np.int64)

    def run(self, idle_timeout_s: float) -> None:
        """Serve masked rows until the client sends something else, which the connection then has.

        Raises:
            IdlePeer, StalledPeer, ConnectionLost: as the connection's own methods.
            RankDied: the device failed.
        """
        line, connection = self._line, self._connection
        self._counts[:] = 0
        why, detail = _serve(
            system_functions(),
            connection.descriptor,
            _PATTERN,
            self._maps,
            line.rows,
            line.launches,
            line.launch,
            line.wait,
            line.stream,
            line.mutex,
            line.inputs,
            line.outputs,
            self._frame,
            self._answer,
            min(int(1000 * idle_timeout_s), _LONGEST_WAIT_MS),
            min(int(1000 * self._stall_timeout_s), _LONGEST_WAIT_MS),
            looks_before_sleep(),
            self._counts,
        )
        traffic, (frames, bytes_in, bytes_out) = connection.traffic, self._counts.tolist()
        traffic.frames_received += frames
        traffic.frames_sent += frames
        traffic.bytes_received += bytes_in
        traffic.bytes_sent += bytes_out
        if why == _IDLE:
            raise IdlePeer(f"the peer sent nothing for {idle_timeout_s:.0f} s")
        if why == _CUT_SHORT:
            raise StalledPeer("the peer began a frame and did not finish it")
        if why == _UNSENT:
            raise ConnectionLost(
                "the peer took no more bytes" if detail == TIMED_OUT else "the connection broke"
            )
        if why == _DEVICE_FAILED:
            self._on_failure(detail)
        connection.unread(self._frame[:detail])


def compile_loop() -> None:
    """Compile the loop, which takes seconds on a machine's first start, before a client waits."""
    octets, table = np.zeros(FIRST_READ_BYTES, np.uint8), np.zeros((1, 2), np.int64)
    no_socket, counts = -1, np.zeros(3, np.int64)
    why, _ = _serve(
        system_functions(),
        no_socket,
        _PATTERN,
        table,
        counts,
        table,
        0,
        0,
        0,
        new_mutex(),
        octets,
        octets,
        octets,
        octets,
        0,
        0,
        0,
        counts,
    )
    assert why == _IDLE, "a socket that does not exist is silent"
