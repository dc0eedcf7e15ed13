"""Fused CPU passes, compiled by numba, and the two ways in which they use several cores.

- ``on_team`` runs a kernel with numba's own parallel loops. It is for kernels that run between
  matrix products: numba's OpenMP layer then shares torch's threads, which after a product spin for
  milliseconds on the cores that any other thread would need.
- ``parallel_for`` splits a range over a thread pool. It is for work that mixes kernels with other
  calls that release the GIL, such as AES and FFT.

Kernels hold no state and release the GIL.

Each kernel has a plain-torch twin (the path CUDA tensors take) that it is tested against bit for
bit; the twins live beside the public functions in ``ring_gemm.py``, ``packing.py`` and
``otpipe.crypto``.

Shape suffixes: T rows, n inputs, m outputs, D digit planes.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

if sys.byteorder != "little":  # pragma: no cover - all supported hosts are little-endian
    raise ImportError("otpipe views integers as little-endian bytes; use a little-endian host.")

Array = NDArray[Any]
log = logging.getLogger("otpipe.kernels")
_told_uncached = False


def _compiler(**options: Any) -> Callable[[Any], Any]:
    """A decorator that compiles at the first call, and keeps the result on disk where it can."""
    cached = nb.njit(nogil=True, boundscheck=False, cache=True, **options)
    uncached = nb.njit(nogil=True, boundscheck=False, **options)

    def decorate(function: Any) -> Any:
        global _told_uncached
        try:
            return cached(function)
        except RuntimeError:  # numba found no directory to write to
            if not _told_uncached:
                _told_uncached = True
                log.warning(
                    "no directory can be written for compiled kernels, so each start compiles "
                    "them again; set NUMBA_CACHE_DIR to a directory of yours"
                )
            return uncached(function)

    return decorate


#: decorators of the compiled kernels, here and in the packages above
kernel = _compiler()
team_kernel = _compiler(parallel=True)
#: into each caller, with the constants it passes
inlined_kernel = _compiler(inline="always")
#: sums of floats may be taken in any order, so that they fill vectors
float_kernel = _compiler(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

_team_lock = threading.Lock()
_numba_config: Any = nb.config

_in_worker = threading.local()
_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child inherits the pool object but not its threads."""
    global _pool, _pool_size, _pool_lock, _team_lock
    _pool, _pool_size = None, 0
    _pool_lock, _team_lock = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)


def _get_pool(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < size:
            # An older, smaller pool finishes what it has and is then collected.
            _pool = ThreadPoolExecutor(size, thread_name_prefix="otpipe-kernel")
            _pool_size = size
        return _pool


def on_team(compiled: Any, *args: Any) -> None:
    """Run a ``team_kernel`` on as many cores as ``torch.get_num_threads()`` says.

    One at a time: each wants all cores, and numba's fallback threading layer aborts the process
    when two Python threads enter it at once.
    """
    with _team_lock:
        nb.set_num_threads(max(1, min(torch.get_num_threads(), _numba_config.NUMBA_NUM_THREADS)))
        compiled(*args)


def parallel_for(body: Callable[[int, int], None], total: int, grain: int) -> None:
    """Call ``body(lo, hi)`` over disjoint ranges that cover ``[0, total)``.

    ``grain`` is the smallest range worth handing to a thread. As many threads take part as
    ``torch.get_num_threads()`` says, the caller among them; chunks are drawn dynamically. A call
    from inside a worker runs serially. The first exception of a chunk is raised here.
    """
    num_threads = min(torch.get_num_threads(), -(-total // max(grain, 1)))
    if num_threads <= 1 or getattr(_in_worker, "active", False):
        if total > 0:
            body(0, total)
        return
    step = max(grain, -(-total // (4 * num_threads)))
    tickets = count()  # next() is atomic under the GIL

    def drain() -> None:
        _in_worker.active = True
        try:
            while (lo := next(tickets) * step) < total:
                body(lo, min(lo + step, total))
        finally:
            _in_worker.active = False

    pool = _get_pool(num_threads - 1)
    helpers = [pool.submit(drain) for _ in range(num_threads - 1)]
    try:
        drain()
    finally:
        # A body writes into the caller's buffers: never return while one still runs. A helper that
        # has not woken up by now has nothing left to do.
        late = [helper for helper in helpers if not helper.cancel()]
        for helper in late:
            helper.exception()
    for helper in late:
        helper.result()


@contextmanager
def in_this_thread() -> Iterator[None]:
    """Calls of ``parallel_for`` from this thread run in it alone: for one of many equal workers."""
    before = getattr(_in_worker, "active", False)
    _in_worker.active = True
    try:
        yield
    finally:
        _in_worker.active = before


# --- digits ------------------------------------------------------------------------------------

_COLUMNS_PER_TASK = 2048


@team_kernel
def split_digits(x_Tn: Array, bias: int, planes_DTn: Array) -> None:
    """Signed base-256 digits of int32 or int64 values; see ``ring_gemm.digit_planes``."""
    for t in nb.prange(x_Tn.shape[0]):
        for i in range(planes_DTn.shape[0]):
            row = planes_DTn[i, t]
            for j in range(x_Tn.shape[1]):
                digit = ((np.int64(x_Tn[t, j]) + bias) >> np.int64(8 * i)) ^ np.int64(0x80)
                row[j] = np.int8(digit)


@team_kernel
def combine_digit_products(products_DTm: Array, unused_bits: int, out_Tm: Array) -> None:
    """out = sum_i products[i] * 256^i mod 2^(64 - unused_bits), sign-extended."""
    num_planes, num_rows, m = products_DTm.shape
    blocks = (m + _COLUMNS_PER_TASK - 1) // _COLUMNS_PER_TASK
    for task in nb.prange(num_rows * blocks):
        t, lo = task // blocks, task % blocks * _COLUMNS_PER_TASK
        hi = min(m, lo + _COLUMNS_PER_TASK)
        total = np.zeros(hi - lo, np.int64)
        for i in range(num_planes):
            row = products_DTm[i, t, lo:hi]
            for j in range(total.shape[0]):
                total[j] += np.int64(row[j]) << np.int64(8 * i)
        out = out_Tm[t, lo:hi]
        for j in range(total.shape[0]):
            out[j] = (total[j] << unused_bits) >> unused_bits


# --- packed little-endian integers -------------------------------------------------------------


@inlined_kernel
def _pack(values: Array, num_bytes: int, words: Array) -> None:
    width = 8 * num_bytes
    mask = ~np.uint64(0) >> np.uint64(64 - width)
    for group in range(values.shape[0] // 8):
        source = values[8 * group : 8 * group + 8]
        target = words[group * num_bytes : (group + 1) * num_bytes]
        pending = np.uint64(0)
        for i in range(8):
            value = np.uint64(source[i]) & mask
            at, shift = i * width >> 6, i * width & 63
            pending |= value << np.uint64(shift)
            if shift + width >= 64:
                target[at] = pending
                over = shift + width > 64
                pending = value >> np.uint64(64 - shift) if over else np.uint64(0)


@inlined_kernel
def _unpack(words: Array, num_bytes: int, values: Array) -> None:
    width = 8 * num_bytes
    mask = ~np.uint64(0) >> np.uint64(64 - width)
    for group in range(values.shape[0] // 8):
        source = words[group * num_bytes : (group + 1) * num_bytes]
        target = values[8 * group : 8 * group + 8]
        for i in range(8):
            at, shift = i * width >> 6, i * width & 63
            value = source[at] >> np.uint64(shift)
            if shift + width > 64:
                value |= source[at + 1] << np.uint64(64 - shift)
            target[i] = value & mask


# The widths of ciphertexts are literals below, so that every shift is known when it is compiled.


@kernel
def pack_words(values: Array, num_bytes: int, words: Array) -> None:
    """Low ``num_bytes`` bytes of each uint64 value, end to end, into uint64 words.

    ``values.size`` must be a multiple of 8 and ``words.size`` equal ``values.size*num_bytes/8``.
    """
    if num_bytes == 2:
        _pack(values, 2, words)
    elif num_bytes == 4:
        _pack(values, 4, words)
    elif num_bytes == 5:
        _pack(values, 5, words)
    elif num_bytes == 6:
        _pack(values, 6, words)
    elif num_bytes == 7:
        _pack(values, 7, words)
    elif num_bytes == 8:
        _pack(values, 8, words)
    else:
        _pack(values, num_bytes, words)


@kernel
def unpack_words(words: Array, num_bytes: int, values: Array) -> None:
    """Inverse of ``pack_words``; values are zero-extended."""
    if num_bytes == 2:
        _unpack(words, 2, values)
    elif num_bytes == 4:
        _unpack(words, 4, values)
    elif num_bytes == 5:
        _unpack(words, 5, values)
    elif num_bytes == 6:
        _unpack(words, 6, values)
    elif num_bytes == 7:
        _unpack(words, 7, values)
    elif num_bytes == 8:
        _unpack(words, 8, values)
    else:
        _unpack(words, num_bytes, values)
