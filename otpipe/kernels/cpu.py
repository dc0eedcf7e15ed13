"""Fused CPU passes, compiled by numba, and the thread pool that runs them.

Every kernel takes a half-open range ``[lo, hi)`` of its outermost loop, holds no state and
releases the GIL; ``parallel_for`` splits the range. numba's own ``parallel=True`` is avoided on
purpose: its fallback threading layer aborts the process when two Python threads enter it at once,
and a server computes and prepares pads at the same time.

Each kernel has a plain-torch twin (the path CUDA tensors take) that it is tested against bit for
bit; the twins live beside the public functions in ``ring_gemm.py``, ``packing.py`` and
``otpipe.crypto``.

Shape suffixes: T rows, n inputs, m outputs, D digit planes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

if sys.byteorder != "little":  # pragma: no cover - all supported hosts are little-endian
    raise ImportError("otpipe views integers as little-endian bytes; use a little-endian host.")

Array = NDArray[Any]
#: decorator of every compiled kernel, here and in ``otpipe.crypto``
kernel: Any = nb.njit(nogil=True, cache=True, boundscheck=False)

_in_worker = threading.local()
_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child inherits the pool object but not its threads."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)


def _get_pool(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < size:
            # An older, smaller pool finishes what it has and is then collected.
            _pool = ThreadPoolExecutor(size, thread_name_prefix="otpipe-kernel")
            _pool_size = size
        return _pool


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
        # A body writes into the caller's buffers: never return while one still runs.
        for helper in helpers:
            helper.exception()
    for helper in helpers:
        helper.result()


# --- matrix times one vector -------------------------------------------------------------------
# Memory bound: each int8 weight is read once. Casts after every operation keep LLVM from
# widening to 64-bit multiplications.


@kernel
def gemv_rows_int32(weight_mn: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """out[i] = sum_j weight[i, j] * x[j] mod 2^32, weight row-major int8, x and out int32."""
    weight, out = weight_mn[lo:hi], out_m[lo:hi]
    for i in range(weight.shape[0]):
        total = np.int32(0)
        for j in range(weight.shape[1]):
            total = np.int32(total + np.int32(np.int32(weight[i, j]) * x_n[j]))
        out[i] = total


@kernel
def gemv_rows_int64(weight_mn: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """out[i] = sum_j weight[i, j] * x[j] mod 2^64, weight row-major int8, x and out int64."""
    weight, out = weight_mn[lo:hi], out_m[lo:hi]
    for i in range(weight.shape[0]):
        total = np.int64(0)
        for j in range(weight.shape[1]):
            total += np.int64(weight[i, j]) * x_n[j]
        out[i] = total


@kernel
def gemv_columns_int32(weight_nm: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """As ``gemv_rows_int32`` for a weight stored transposed: weight_nm[j, i], row-major."""
    out = out_m[lo:hi]
    for i in range(out.shape[0]):
        out[i] = 0
    for j in range(weight_nm.shape[0]):
        row, x = weight_nm[j, lo:hi], x_n[j]
        for i in range(out.shape[0]):
            out[i] = np.int32(out[i] + np.int32(np.int32(row[i]) * x))


@kernel
def gemv_columns_int64(weight_nm: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """As ``gemv_rows_int64`` for a weight stored transposed: weight_nm[j, i], row-major."""
    out = out_m[lo:hi]
    for i in range(out.shape[0]):
        out[i] = 0
    for j in range(weight_nm.shape[0]):
        row, x = weight_nm[j, lo:hi], x_n[j]
        for i in range(out.shape[0]):
            out[i] += np.int64(row[i]) * x


# --- digits ------------------------------------------------------------------------------------


@kernel
def split_digits(x_Tn: Array, bias: int, planes_DTn: Array, lo: int, hi: int) -> None:
    """Signed base-256 digits of int32 or int64 values; see ``ring_gemm.digit_planes``."""
    x, planes = x_Tn[lo:hi], planes_DTn[:, lo:hi]
    for t in range(x.shape[0]):
        for i in range(planes.shape[0]):
            row = planes[i, t]
            for j in range(x.shape[1]):
                row[j] = np.int8(((np.int64(x[t, j]) + bias) >> np.int64(8 * i)) ^ np.int64(0x80))


@kernel
def combine_digit_products(
    products_DTm: Array, unused_bits: int, out_Tm: Array, lo: int, hi: int
) -> None:
    """out = sum_i products[i] * 256^i mod 2^(64 - unused_bits), sign-extended."""
    products, out = products_DTm[:, lo:hi], out_Tm[lo:hi]
    m = products.shape[2]
    total = np.empty(m, np.int64)
    for t in range(products.shape[1]):
        for j in range(m):
            total[j] = 0
        for i in range(products.shape[0]):
            row = products[i, t]
            for j in range(m):
                total[j] += np.int64(row[j]) << np.int64(8 * i)
        for j in range(m):
            out[t, j] = (total[j] << unused_bits) >> unused_bits


# --- packed little-endian integers -------------------------------------------------------------


@kernel
def pack_words(values: Array, num_bytes: int, words: Array) -> None:
    """Low ``num_bytes`` bytes of each uint64 value, end to end, into uint64 words.

    ``values.size`` must be a multiple of 8 and ``words.size`` equal ``values.size*num_bytes/8``.
    """
    width = np.uint64(8 * num_bytes)
    mask = (np.uint64(1) << width) - np.uint64(1) if num_bytes < 8 else ~np.uint64(0)
    pending, fill, at = np.uint64(0), np.uint64(0), 0
    for k in range(values.shape[0]):
        value = np.uint64(values[k]) & mask
        pending |= value << fill
        fill += width
        if fill >= np.uint64(64):
            words[at] = pending
            at += 1
            fill -= np.uint64(64)
            pending = value >> (width - fill) if fill > np.uint64(0) else np.uint64(0)


@kernel
def unpack_words(words: Array, num_bytes: int, values: Array) -> None:
    """Inverse of ``pack_words``; values are zero-extended."""
    width = np.uint64(8 * num_bytes)
    mask = (np.uint64(1) << width) - np.uint64(1) if num_bytes < 8 else ~np.uint64(0)
    for k in range(values.shape[0]):
        start = np.uint64(k) * width
        at, shift = start >> np.uint64(6), start & np.uint64(63)
        value = words[at] >> shift
        if shift + width > np.uint64(64):
            value |= words[at + np.uint64(1)] << (np.uint64(64) - shift)
        values[k] = value & mask
