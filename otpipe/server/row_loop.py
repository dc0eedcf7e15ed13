"""The compiled loop of :mod:`otpipe.server.row_server`: frames, products, other ranks' answers."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    new_mutex,
    receive_all,
    receive_some,
    send_all,
    system_functions,
)
from otpipe.protocol.messages import Linear, MessageType, Result
from otpipe.protocol.wire import MIN_BYTES_PER_S, PREFIX, frame_head

#: why the loop ended
OTHER, IDLE, CUT_SHORT, UNSENT, DEVICE_FAILED, RANK_LOST = range(6)

IN_BYTES, OUT_BYTES, MOST_ROWS, DESCRIPTOR = range(4)
"""Columns of the table of maps: of one row; of one request, to another rank; that rank's
connection, or -1 where the map's product is made here."""

FRAMES, BYTES_IN, BYTES_OUT = range(3)
"""What is counted."""

ANSWER_MS = 60_000
"""How long another rank may take for a few rows. One that is gone shows at once."""

_PREFIX_BYTES = PREFIX.size
_RESULT_TYPE = int(MessageType.RESULT)
_TYPE_AT, _HEADER_BYTES_AT, _PAYLOAD_BYTES_AT = 6, 8, 12
_INDEX_KEY = b"\x82\xa9map_index"
_ROWS_KEY = b"\xa4rows"
LONGEST_HEAD = PREFIX.size + len(_INDEX_KEY) + 3 + len(_ROWS_KEY) + 1


def _pattern() -> np.ndarray:
    """uint8: the fixed parts of a head: magic, version and type; first key; second key."""
    start = frame_head(MessageType.LINEAR, Linear(0, 1).header(), 0)[:_HEADER_BYTES_AT]
    return np.frombuffer(start + _INDEX_KEY + _ROWS_KEY, np.uint8).copy()


PATTERN = _pattern()
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
def _ask_rank(
    functions: Array, fd: int, frame: Array, head_bytes: int, answer: Array, looks: int
) -> bool:
    """Fill ``answer`` with another rank's to the whole ``frame``; False if that is no answer.

    ``answer`` begins with the head that is due.
    """
    status, at = INTERRUPTED, 0
    while status == INTERRUPTED:
        status, at = send_all(functions, fd, frame, at, frame.shape[0], ANSWER_MS)
    if status != DONE:
        return False
    due = answer[:head_bytes].copy()
    status, at = INTERRUPTED, 0
    while status == INTERRUPTED:
        status, at = receive_some(functions, fd, answer, 0, answer.shape[0], ANSWER_MS, looks)
    while status in (DONE, INTERRUPTED) and at < answer.shape[0]:
        status, at = receive_all(
            functions, fd, answer, at, answer.shape[0], ANSWER_MS, ANSWER_MS // 1000
        )
    return at == answer.shape[0] and bool((answer[:head_bytes] == due).all())


@kernel
def serve_rows(
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
    """Serve frames until one is not for this loop.

    maps: int64 (M, 4), columns ``IN_BYTES`` to ``DESCRIPTOR``. sizes, launches: of a line.

    Returns:
        Why it ended, and how far ``frame`` is filled (after ``OTHER``), what the driver said
        (``DEVICE_FAILED``), or the map whose rank gave no answer (``RANK_LOST``).
    """
    while True:
        status, filled = receive_some(functions, fd, frame, 0, FIRST_READ_BYTES, idle_ms, looks)
        if status == INTERRUPTED:
            continue
        if status != DONE:
            return (IDLE if status == TIMED_OUT else OTHER), filled
        index, rows, head_bytes = _map_asked_for(frame, filled, pattern)
        while index == -2 and status in (DONE, INTERRUPTED):
            status, filled = receive_some(functions, fd, frame, filled, LONGEST_HEAD, stall_ms, 0)
            index, rows, head_bytes = _map_asked_for(frame, filled, pattern)
        if index < 0 or index >= maps.shape[0]:
            return OTHER, filled
        in_bytes, out_bytes = rows * maps[index, IN_BYTES], rows * maps[index, OUT_BYTES]
        rank_fd = maps[index, DESCRIPTOR]
        handle: Any = np.int64(0)
        for i in range(sizes.shape[0]):
            if sizes[i] >= rows:
                handle = launches[index, i]
                break
        for_this_loop = handle != 0 if rank_fd < 0 else rows <= maps[index, MOST_ROWS]
        frame_bytes, answer_bytes = head_bytes + in_bytes, head_bytes + out_bytes
        if not for_this_loop or filled > frame_bytes or _word(frame, _PAYLOAD_BYTES_AT) != in_bytes:
            return OTHER, filled
        limit_s = stall_ms // 1000 + frame_bytes // MIN_BYTES_PER_S
        status = INTERRUPTED
        while status == INTERRUPTED:
            status, filled = receive_all(
                functions, fd, frame, filled, frame_bytes, stall_ms, limit_s
            )
        if status != DONE:
            return CUT_SHORT, filled
        answer[:head_bytes] = frame[:head_bytes]
        answer[_TYPE_AT] = np.uint8(_RESULT_TYPE)
        _put_word(answer, _PAYLOAD_BYTES_AT, out_bytes)
        if rank_fd >= 0:
            whole = frame[:frame_bytes]
            if not _ask_rank(functions, rank_fd, whole, head_bytes, answer[:answer_bytes], looks):
                return RANK_LOST, index
        else:
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
                answer[head_bytes:answer_bytes],
            )
            if failed != 0:
                return DEVICE_FAILED, failed
        status, sent = INTERRUPTED, 0
        while status == INTERRUPTED:
            status, sent = send_all(functions, fd, answer, sent, answer_bytes, stall_ms)
        if status != DONE:
            return UNSENT, status
        counts[FRAMES] += 1
        counts[BYTES_IN] += frame_bytes
        counts[BYTES_OUT] += sent


def compile_loop() -> None:
    """Compile the loop, which takes seconds on a machine's first start, before a client waits."""
    octets, table = np.zeros(FIRST_READ_BYTES, np.uint8), np.zeros((1, 4), np.int64)
    no_socket, counts = -1, np.zeros(3, np.int64)
    why, _ = serve_rows(
        system_functions(),
        no_socket,
        PATTERN,
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
    assert why == IDLE, "a socket that does not exist is silent"
