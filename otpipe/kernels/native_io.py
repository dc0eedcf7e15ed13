"""System calls from compiled kernels, so that a request is served without Python in between.

numba lets a function emit LLVM code, here a call of a C function at a known address. The kernels
that use it release the GIL for a whole exchange, and many connections run at once.

What goes wrong is not told apart here: a kernel stops and says how far it got, and the caller goes
on with the socket's own methods, which raise what they always raise.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from otpipe.kernels.cpu import Array, kernel

(
    RECV,
    SEND,
    POLL,
    TIME,
    YIELD,
    PREAD,
    MEMCPY,
    LOCK,
    UNLOCK,
    COND_WAIT,
    COND_BROADCAST,
    CLOCK,
) = range(12)
"""Places in the table of :func:`system_functions`."""

#: results of the kernels below
DONE, TIMED_OUT, INTERRUPTED, BROKEN = range(4)

_POLLIN, _POLLOUT = 1, 4
_SPURIOUS_WAKES = 3

_CORES_TO_SPARE = 8
_LOOKS = 400

FIRST_READ_BYTES = 1 << 16
"""Read at most so many bytes before the head of a frame has been looked at."""


@functools.cache
def system_functions() -> np.ndarray:
    """int64 addresses of C functions, in the order of ``RECV`` .. ``CLOCK``."""
    library = ctypes.CDLL(None)
    mutex = ("pthread_mutex_lock", "pthread_mutex_unlock")
    condition = ("pthread_cond_wait", "pthread_cond_broadcast")
    # of a file of any size, also where file offsets are 32 bits wide unless told otherwise
    pread = "pread64" if hasattr(library, "pread64") else "pread"
    files = ("recv", "send", "poll", "time", "sched_yield", pread, "memcpy")
    names = (*files, *mutex, *condition, "clock_gettime")
    return np.array([address_of(getattr(library, name)) for name in names], np.int64)


@functools.cache
def looks_before_sleep() -> int:
    """How often to look for an answer that is expected soon before sleeping until it comes.

    A look takes about half a microsecond, and gives way to whoever wants the core. Waking up takes
    5 us, and ten times that on a virtual machine whose idle cores the host has to start again: as
    long as a whole product. Where cores are few they are better left to the other processes.
    """
    return _LOOKS if len(os.sched_getaffinity(0)) >= _CORES_TO_SPARE else 0


def address_of(function: Any) -> int:
    """Address of a ctypes function."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, "a function that exists has an address"
    return address


def new_mutex() -> np.ndarray:
    """A mutex for kernels, unlocked: all zeros, as PTHREAD_MUTEX_INITIALIZER is on Linux."""
    return np.zeros(64, np.uint8)


def new_condition() -> np.ndarray:
    """A condition variable for kernels: all zeros, as PTHREAD_COND_INITIALIZER is on Linux."""
    return np.zeros(64, np.uint8)


def _call(arity: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        function = ir.FunctionType(word, [word] * arity).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), list(args[1:]))

    return types.int64(*[types.int64] * (arity + 1)), codegen


def _typed_1(_context: Any, function: Any, a: Any) -> Any:
    return _call(1)


def _typed_2(_context: Any, function: Any, a: Any, b: Any) -> Any:
    return _call(2)


def _typed_3(_context: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(3)


def _typed_4(_context: Any, function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return _call(4)


#: call the C function at an address with so many words
call_1: Any = intrinsic(_typed_1)
call_2: Any = intrinsic(_typed_2)
call_3: Any = intrinsic(_typed_3)
call_4: Any = intrinsic(_typed_4)


def _typed_floats(_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


#: pointer to float32 at an address, for ``numba.carray``
floats_at: Any = intrinsic(_typed_floats)


@kernel
def clock_ns(functions: Array) -> int:
    """Monotonic time."""
    parts = np.empty(2, np.int64)  # struct timespec
    call_2(functions[CLOCK], np.int64(1), np.int64(parts.ctypes.data))
    return int(parts[0] * 1_000_000_000 + parts[1])


@kernel
def _ready(functions: Array, fd: int, events: int, timeout_ms: int) -> int:
    """Wait for one socket: DONE, TIMED_OUT or INTERRUPTED (by a signal, as a rule)."""
    entry = np.empty(2, np.int32)
    entry[0], entry[1] = fd, events  # struct pollfd: int fd, short events, short revents
    count = np.int32(
        call_3(functions[POLL], np.int64(entry.ctypes.data), np.int64(1), np.int64(timeout_ms))
    )
    if count > 0:
        return DONE
    return TIMED_OUT if count == 0 else INTERRUPTED


@kernel
def copy_bytes(functions: Array, source: Array, target: Array) -> None:
    """target[:] = source, uint8, which do not overlap. numba's own loop does a byte at a time."""
    call_3(
        functions[MEMCPY],
        np.int64(target.ctypes.data),
        np.int64(source.ctypes.data),
        np.int64(source.shape[0]),
    )


@kernel
def receive_some(
    functions: Array, fd: int, out: Array, filled: int, limit: int, timeout_ms: int, looks: int
) -> tuple[int, int]:
    """Read at least one byte into uint8 ``out[filled:limit]`` from a non-blocking socket.

    ``looks``: how often to look before going to sleep; see :func:`looks_before_sleep`.

    Returns:
        DONE, TIMED_OUT, INTERRUPTED or BROKEN, and how far ``out`` is filled.
    """
    address, room = np.int64(out.ctypes.data) + filled, np.int64(limit - filled)
    wakes = 0
    while wakes < _SPURIOUS_WAKES:
        count = call_4(functions[RECV], np.int64(fd), address, room, np.int64(0))
        if count > 0:
            return DONE, filled + count
        if count == 0:
            break  # the peer has closed
        if looks > 0:
            looks -= 1
            call_1(functions[YIELD], np.int64(0))
            continue
        wakes += 1
        waited = _ready(functions, fd, _POLLIN, timeout_ms)
        if waited != DONE:
            return waited, filled
    return BROKEN, filled


@kernel
def receive_all(
    functions: Array, fd: int, out: Array, filled: int, wanted: int, timeout_ms: int, limit_s: int
) -> tuple[int, int]:
    """As :func:`receive_some` until ``out[:wanted]`` is filled.

    ``timeout_ms`` is for each wait, ``limit_s`` for all of it: whole seconds, one less or more.
    """
    status, started_s = DONE, np.int64(0)
    while filled < wanted and status == DONE:
        status, filled = receive_some(functions, fd, out, filled, wanted, timeout_ms, 0)
        if filled < wanted:
            now_s = call_1(functions[TIME], np.int64(0))
            started_s = now_s if started_s == 0 else started_s
            if now_s - started_s > limit_s:
                return TIMED_OUT, filled
    return status, filled


@kernel
def send_all(
    functions: Array, fd: int, data: Array, sent: int, stop: int, timeout_ms: int
) -> tuple[int, int]:
    """Write uint8 ``data[sent:stop]``; returns a status and how far it got."""
    wakes = 0
    while sent < stop:
        address = np.int64(data.ctypes.data) + sent
        count = call_4(functions[SEND], np.int64(fd), address, np.int64(stop - sent), np.int64(0))
        if count > 0:
            sent, wakes = sent + count, 0
            continue
        wakes += 1
        if wakes > _SPURIOUS_WAKES:
            return BROKEN, sent
        waited = _ready(functions, fd, _POLLOUT, timeout_ms)
        if waited != DONE:
            return waited, sent
    return DONE, sent


@kernel
def read_at(functions: Array, fd: int, offset: int, out: Array) -> int:
    """Fill uint8 ``out`` from a file: DONE, or BROKEN on an error or the end of the file."""
    done = np.int64(0)
    while done < out.shape[0]:
        count = call_4(
            functions[PREAD],
            np.int64(fd),
            np.int64(out.ctypes.data) + done,
            np.int64(out.shape[0]) - done,
            np.int64(offset) + done,
        )
        if count <= 0:
            return BROKEN
        done += count
    return DONE
