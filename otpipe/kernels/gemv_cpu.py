"""Matrix times one vector on the CPU, modulo 2^k: bound by reading each int8 weight once.

Where the processor multiplies bytes and accumulates in 32 bits (AVX-512 VNNI), a product mod 2^32
is four such products, one for each byte of x:

    W x  =  sum_i 256^i (W u_i)  mod 2^32,     u_i = byte i of x, unsigned,

which is exact because the accumulators wrap mod 2^32 as well. Elsewhere 32-bit multiplications do
the same. Kernels release the GIL; ``lo`` and ``hi`` bound the rows that a call is to do.

Shape suffixes: n inputs, m outputs, B the four bytes of an element.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from otpipe.kernels.cpu import Array, kernel, parallel_for

_THREAD_BYTES = 16 << 20
"""Weights worth a thread of their own: one core reads about as fast as the memory delivers, and
waking another costs as much as reading a megabyte or two."""

_VECTOR_BYTES = 64
_ROWS_AT_ONCE = 8
_PREFETCH_BYTES = 512
"""How far ahead of the loads. The hardware's prefetcher follows a few streams well if they are far
apart, and badly if they run side by side through the same pages."""


def gemv(weight_mn: Array, x_n: Array, out_m: Array) -> None:
    """out = W x mod 2^32 or 2^64, by the type of ``x_n``.

    Args:
        weight_mn: int8 (m, n), row-major or column-major.
        x_n: int32 or int64 (n,), contiguous. out_m: of the same type, (m,), overwritten.
    """
    m, n = weight_mn.shape
    grain = max(1, _THREAD_BYTES // max(1, n))
    if not weight_mn.flags.c_contiguous:
        _by_columns(weight_mn.T, x_n, out_m)
    elif x_n.dtype == np.int64:
        parallel_for(lambda lo, hi: rows_int64(weight_mn, x_n, out_m, lo, hi), m, grain)
    elif has_byte_products():
        bytes_Bn = np.ascontiguousarray(x_n.view(np.uint8).reshape(n, 4).T)
        parallel_for(
            lambda lo, hi: rows_byte_products(weight_mn, x_n, bytes_Bn, out_m, lo, hi), m, grain
        )
    else:
        parallel_for(lambda lo, hi: rows_int32(weight_mn, x_n, out_m, lo, hi), m, grain)


def gemv_bytes(weight_mn: Array, x_n: Array, out_m: Array) -> None:
    """out = W x mod 2^8, for int8 x (n,) and out (m,); W as in :func:`gemv`."""
    if weight_mn.flags.c_contiguous:
        m, n = weight_mn.shape
        parallel_for(
            lambda lo, hi: rows_int8(weight_mn, x_n, out_m, lo, hi),
            m,
            max(1, _THREAD_BYTES // max(1, n)),
        )
    else:
        _by_columns(weight_mn.T, x_n, out_m)


def _by_columns(weight_nm: Array, x_n: Array, out_m: Array) -> None:
    """A transposed weight: each thread adds consecutive rows of it into sums of its own."""
    n, m = weight_nm.shape
    # Products mod 2^8 are summed in 16 bits: the narrowest multiplication that processors have.
    sums_dtype = np.int16 if x_n.dtype == np.int8 else x_n.dtype
    sums: list[Array] = []

    def add(lo: int, hi: int) -> None:
        part_m = np.zeros(m, sums_dtype)
        columns[sums_dtype](weight_nm, x_n, part_m, lo, hi)
        sums.append(part_m)

    columns: dict[Any, Any] = {
        np.int16: columns_int16,
        np.dtype(np.int32): columns_int32,
        np.dtype(np.int64): columns_int64,
    }
    parallel_for(add, n, max(1, _THREAD_BYTES // max(1, m)))
    out_m[:] = sums[0] if len(sums) == 1 else np.add.reduce(sums)


@functools.cache
def has_byte_products() -> bool:
    """Whether this processor has AVX-512 VNNI."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni", False) and features.get("avx512bw", False))


# --- portable kernels --------------------------------------------------------------------------
# Casts after every operation keep LLVM from widening to 64-bit multiplications.


@kernel
def rows_int32(weight_mn: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """out[i] = sum_j weight[i, j] * x[j] mod 2^32, weight row-major int8, x and out int32."""
    for i in range(lo, hi):
        row, total = weight_mn[i], np.int32(0)
        for j in range(x_n.shape[0]):
            total = np.int32(total + np.int32(np.int32(row[j]) * x_n[j]))
        out_m[i] = total


@kernel
def rows_int64(weight_mn: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """As ``rows_int32`` mod 2^64, for int64 x and out."""
    for i in range(lo, hi):
        row, total = weight_mn[i], np.int64(0)
        for j in range(x_n.shape[0]):
            total += np.int64(row[j]) * x_n[j]
        out_m[i] = total


@kernel
def rows_int8(weight_mn: Array, x_n: Array, out_m: Array, lo: int, hi: int) -> None:
    """As ``rows_int32`` mod 2^8, for int8 x and out."""
    for i in range(lo, hi):
        row, total = weight_mn[i], np.int16(0)
        for j in range(x_n.shape[0]):
            total = np.int16(total + np.int16(np.int16(row[j]) * np.int16(x_n[j])))
        out_m[i] = np.int8(total)


@kernel
def columns_int16(weight_nm: Array, x_n: Array, sums_m: Array, lo: int, hi: int) -> None:
    """sums[i] += weight[j, i] * x[j] over lo <= j < hi, mod 2^16; int8 x, int16 sums."""
    for j in range(lo, hi):
        row, x = weight_nm[j], np.int16(x_n[j])
        for i in range(sums_m.shape[0]):
            sums_m[i] = np.int16(sums_m[i] + np.int16(np.int16(row[i]) * x))


@kernel
def columns_int32(weight_nm: Array, x_n: Array, sums_m: Array, lo: int, hi: int) -> None:
    """As ``columns_int16`` mod 2^32, for int32 x and sums."""
    for j in range(lo, hi):
        row, x = weight_nm[j], x_n[j]
        for i in range(sums_m.shape[0]):
            sums_m[i] = np.int32(sums_m[i] + np.int32(np.int32(row[i]) * x))


@kernel
def columns_int64(weight_nm: Array, x_n: Array, sums_m: Array, lo: int, hi: int) -> None:
    """As ``columns_int16`` mod 2^64, for int64 x and sums."""
    for j in range(lo, hi):
        row, x = weight_nm[j], x_n[j]
        for i in range(sums_m.shape[0]):
            sums_m[i] += np.int64(row[i]) * x


# --- AVX-512 VNNI ------------------------------------------------------------------------------


def _byte_dots(num_rows: int) -> Any:
    """An intrinsic: products of ``num_rows`` weight rows with the four byte planes of x.

    dots(row address, bytes between rows, planes address, bytes between planes, vectors, out
    address, bytes between outputs) reads 64 * vectors bytes of each row and adds the recombined
    sum of each row mod 2^32 to the int32 that is at its output.
    """

    @intrinsic
    def dots(
        typingctx: Any,
        row: Any,
        row_stride: Any,
        planes: Any,
        plane_stride: Any,
        vectors: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        address, count = types.uintp, types.intp
        signature = types.void(address, count, address, count, count, address, count)
        return signature, functools.partial(_emit_byte_dots, num_rows)

    return dots


def _emit_byte_dots(num_rows: int, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    row, row_stride, planes, plane_stride, vectors, out, out_stride = args
    i32, i64 = ir.IntType(32), ir.IntType(64)
    byte_pointer = ir.IntType(8).as_pointer()
    lanes = ir.VectorType(i32, _VECTOR_BYTES // 4)

    def declare(name: str, result: Any, *parameters: Any) -> Any:
        return cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(result, parameters), name
        )

    multiply_add = declare("llvm.x86.avx512.vpdpbusd.512", lanes, lanes, lanes, lanes)
    horizontal_sum = declare("llvm.vector.reduce.add.v16i32", i32, lanes)
    prefetch = declare("llvm.prefetch.p0", ir.VoidType(), byte_pointer, i32, i32, i32)

    def at(base: Any, *offsets: Any) -> Any:
        for offset in offsets:
            base = builder.add(base, offset)
        return base

    def times(value: Any, factor: int) -> Any:
        return builder.mul(value, ir.Constant(i64, factor))

    def load_vector(address: Any) -> Any:
        loaded = builder.load(builder.inttoptr(address, lanes.as_pointer()))
        loaded.align = 1
        return loaded

    zeros = ir.Constant(lanes, [0] * lanes.count)
    sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(4)] for _ in range(num_rows)]
    with cgutils.for_range(builder, vectors) as loop:
        offset = times(loop.index, _VECTOR_BYTES)
        x_B = [load_vector(at(planes, offset, times(plane_stride, b))) for b in range(4)]
        for r in range(num_rows):
            address = at(row, offset, times(row_stride, r))
            ahead = builder.inttoptr(at(address, ir.Constant(i64, _PREFETCH_BYTES)), byte_pointer)
            read, all_levels, data = (ir.Constant(i32, v) for v in (0, 3, 1))
            builder.call(prefetch, [ahead, read, all_levels, data])
            weights = load_vector(address)
            for b in range(4):
                total = builder.load(sums[r][b])
                builder.store(builder.call(multiply_add, [total, x_B[b], weights]), sums[r][b])
    for r in range(num_rows):
        total = builder.load(sums[r][0])
        for b in range(1, 4):
            shift = ir.Constant(lanes, [8 * b] * lanes.count)
            total = builder.add(total, builder.shl(builder.load(sums[r][b]), shift))
        target = builder.inttoptr(at(out, times(out_stride, r)), i32.as_pointer())
        before = builder.load(target)
        before.align = 4
        builder.store(builder.add(before, builder.call(horizontal_sum, [total])), target).align = 4
    return context.get_dummy_value()


_dots_of_many = _byte_dots(_ROWS_AT_ONCE)
_dots_of_one = _byte_dots(1)


@kernel
def rows_byte_products(
    weight_mn: Array, x_n: Array, bytes_Bn: Array, out_m: Array, lo: int, hi: int
) -> None:
    """As ``rows_int32``, given the bytes of x too, uint8 (4, n); only where the CPU has VNNI."""
    n = weight_mn.shape[1]
    vectors = n // _VECTOR_BYTES
    for i in range(lo, hi):
        total = np.int32(0)
        for j in range(_VECTOR_BYTES * vectors, n):
            total = np.int32(total + np.int32(np.int32(weight_mn[i, j]) * x_n[j]))
        out_m[i] = total
    weight, planes, out = weight_mn.ctypes.data, bytes_Bn.ctypes.data, out_m.ctypes.data
    apart = (
        hi - lo
    ) // _ROWS_AT_ONCE  # rows that are multiplied together lie this far from one another
    for i in range(lo, lo + apart):
        _dots_of_many(weight + i * n, apart * n, planes, n, vectors, out + 4 * i, 4 * apart)
    for i in range(lo + _ROWS_AT_ONCE * apart, hi):
        _dots_of_one(weight + i * n, n, planes, n, vectors, out + 4 * i, 4)
