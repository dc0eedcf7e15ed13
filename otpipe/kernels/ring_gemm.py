"""Exact products modulo 2^k of ring elements with int8 weights, on int8 matrix hardware.

A ring element x mod 2^k is written in signed base-256 digits d_i in [-128, 127]; then
W x = sum_i 256^i (W d_i) mod 2^k, and each W d_i is an int8 matrix product with exact int32
accumulation. All digit planes are stacked as rows of one product.

Shape suffixes: T rows, n inputs, m outputs, D digit planes; r, c sides of a product.

Ring elements are two's complement: int32 tensors for k <= 32, int64 above. Inputs may be any
representative; outputs are the signed residue in [-2^(k-1), 2^(k-1)).
"""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType

import torch
from torch import Tensor

from otpipe.kernels import cpu, gemv_cpu

#: longest inner dimension whose int32 sum cannot overflow: n * 128 * 128 < 2^31; a multiple of 64
MAX_EXACT_INNER = (1 << 17) - 64
#: largest int32 product kept at once, in elements. On the CPU it is a reused scratch buffer that
#: stays in the last-level cache; on CUDA it bounds the temporary memory.
_CPU_TILE_ELEMENTS = 1 << 21
_CUDA_TILE_ELEMENTS = 1 << 26
_CUDA_MIN_ROWS = 32  # torch._int_mm on CUDA refuses 16 rows or fewer
_CUDA_ALIGN = 8
_FLOAT_TILE_COLUMNS = 1024

_scratch = threading.local()


def ring_gemm(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """W x mod 2^bits for every row of ``x``.

    x: (T, n) int32 for bits <= 32, int64 above. weight: (m, n) int8, any strides, same device.
    Returns (T, m) of the dtype of ``x``, sign-extended residues. Exact for every input.
    """
    storage = storage_dtype(bits)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"ring_gemm wants x (T, n) and weight (m, n), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    if x.dtype != storage or weight.dtype != torch.int8:
        raise TypeError(
            f"ring_gemm mod 2^{bits} wants x {storage} and weight torch.int8, got {x.dtype} and "
            f"{weight.dtype}."
        )
    num_rows, m = x.shape[0], weight.shape[0]
    if num_rows == 1 and not x.is_cuda and (weight.is_contiguous() or weight.t().is_contiguous()):
        return _gemv(x, weight, bits)
    fused = _triton_gemv() if x.is_cuda else None
    if fused is not None and fused.fits(x, weight):
        return _sign_extended(fused.gemv(x, weight), bits)
    out = torch.empty((num_rows, m), dtype=storage, device=x.device)
    num_planes = num_digits(bits)
    tile = _CUDA_TILE_ELEMENTS if x.is_cuda else _CPU_TILE_ELEMENTS
    row_step = max(1, min(num_rows, 2048 // num_planes)) if not x.is_cuda else max(1, num_rows)
    for row in range(0, num_rows, row_step):
        planes_DTn = digit_planes(x[row : row + row_step], bits)
        rows = planes_DTn.shape[1]
        stacked = planes_DTn.view(num_planes * rows, -1)
        # A column tile is a row slice of the weight: a view, whatever its strides.
        step = max(_CUDA_ALIGN, tile // (num_planes * rows) // _CUDA_ALIGN * _CUDA_ALIGN)
        if x.is_cuda and weight.stride(1) != 1:  # int8_matmul copies the tile: bound the copy
            step = min(step, max(_CUDA_ALIGN, tile // weight.shape[1] // _CUDA_ALIGN * _CUDA_ALIGN))
        for lo in range(0, m, step):
            columns = weight[lo : lo + step].t()
            buffer = None if x.is_cuda else scratch_int32(stacked.shape[0], columns.shape[1])
            product = int8_matmul(stacked, columns, out=buffer)
            combine_planes(
                product.view(num_planes, rows, -1),
                bits,
                out=out[row : row + rows, lo : lo + step],
            )
    return out


def ring_gemm_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """W x mod 2^8 for rows that are bytes already: :func:`ring_gemm` without widening them.

    x: (T, n) int8. weight: (m, n) int8, any strides, same device. Returns (T, m) int8.
    """
    if x.is_cuda:
        return ring_gemm(x.to(torch.int32), weight, 8).to(torch.int8)
    if len(x) != 1 or 1 not in weight.stride():
        # A byte is its own digit.
        return int8_matmul(x, weight.t()).to(torch.int8)
    out = torch.empty((1, weight.shape[0]), dtype=torch.int8)
    gemv_cpu.gemv_bytes(weight.numpy(), x.contiguous().view(-1).numpy(), out.view(-1).numpy())
    return out


def digit_planes(x: Tensor, bits: int) -> Tensor:
    """Signed base-256 digits, least significant plane first.

    x: (T, n) int32 (bits <= 32) or int64. Returns (D, T, n) int8 with D = ceil(bits / 8) and
    x = sum_i 256^i * planes[i] mod 2^(8 D).
    """
    if x.is_cuda:
        return digit_planes_torch(x, bits)
    num_planes = num_digits(bits)
    source = x.contiguous().numpy()
    planes = torch.empty((num_planes, *x.shape), dtype=torch.int8)
    cpu.on_team(cpu.split_digits, source, _digit_bias(num_planes), planes.numpy())
    return planes


def digit_planes_torch(x: Tensor, bits: int) -> Tensor:
    """``digit_planes`` in plain torch, on any device and for x of any number of dimensions."""
    num_planes = num_digits(bits)
    # Adding 0x80...80 turns each signed digit d into the byte d + 128; xor 0x80 takes 128 off.
    biased = (x + _digit_bias(x.element_size())).contiguous()
    octets = biased.view(torch.uint8).view(*x.shape, x.element_size())[..., :num_planes]
    return octets.movedim(-1, 0).contiguous().bitwise_xor_(0x80).view(torch.int8)


def combine_planes(products: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """sum_i 256^i * products[i] mod 2^bits, sign-extended.

    products: (D, ...) int32 or int64, D = ceil(bits / 8). Returns (...) int32 for bits <= 32,
    int64 above. ``out`` may be a strided view; on the CPU it must then be 2-dimensional.
    """
    if out is None:
        out = torch.empty(products.shape[1:], dtype=storage_dtype(bits), device=products.device)
    if products.is_cuda or products.dim() != 3 or products.dtype != torch.int32:
        return out.copy_(combine_planes_torch(products, bits))
    cpu.on_team(cpu.combine_digit_products, products.numpy(), 64 - bits, out.numpy())
    return out


def combine_planes_torch(products: Tensor, bits: int) -> Tensor:
    """``combine_planes`` in plain torch, on any device."""
    total = products[0].to(storage_dtype(bits), copy=True)
    for i in range(1, products.shape[0]):
        total.add_(products[i].to(total.dtype), alpha=1 << (8 * i))
    return _sign_extended(total, bits)


def int8_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Exact a @ b of int8 matrices: (r, n) @ (n, c).

    Returns (r, c) int32 for n <= MAX_EXACT_INNER. Longer sums could overflow int32 and come back
    as int64. ``out``: contiguous int32 (r, c) scratch that the result may (or may not) use.
    The one place that calls the private ``torch._int_mm``; where that is missing, refuses the
    inputs, or is not exact (int8 units that saturate), float64 does the work, also exactly.
    """
    n = a.shape[1]
    if n > MAX_EXACT_INNER:
        total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int64, device=a.device)
        for lo in range(0, n, MAX_EXACT_INNER):
            hi = min(n, lo + MAX_EXACT_INNER)
            total += int8_matmul(a[:, lo:hi], b[lo:hi], out=out)
        return total
    if min(*a.shape, *b.shape) == 0:
        return torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    if not _int_mm_is_exact(str(a.device)):
        return _float64_matmul(a, b)
    if a.is_cuda:
        return _cuda_int_mm(a, b)
    return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)


def num_digits(bits: int) -> int:
    """Number of base-256 digits of an element mod 2^bits."""
    if not 1 <= bits <= 64:
        raise ValueError(f"A ring has 1 to 64 bits, not {bits}.")
    return -(-bits // 8)


def storage_dtype(bits: int) -> torch.dtype:
    """The dtype that stores an element mod 2^bits."""
    return torch.int32 if num_digits(bits) <= 4 else torch.int64


def scratch_int32(rows: int, columns: int) -> Tensor:
    """A (rows, columns) int32 view of this thread's reused buffer.

    Fresh multi-megabyte outputs cost more in page faults than the product itself. The contents
    are overwritten by the next use in the same thread.
    """
    need = rows * columns
    held = getattr(_scratch, "buffer", None)
    if held is None or held.numel() < need:
        held = _scratch.buffer = torch.empty(need, dtype=torch.int32)
    return held[:need].view(rows, columns)


def _digit_bias(num_bytes: int) -> int:
    """0x80...80 over ``num_bytes`` bytes as a signed integer of that many bytes."""
    return int.from_bytes(b"\x80" * num_bytes, "little", signed=True)


def _gemv(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """One row on the CPU: multiply directly, since the product is bound by reading the weight."""
    out = torch.empty(weight.shape[0], dtype=x.dtype)
    gemv_cpu.gemv(weight.numpy(), x.contiguous().view(-1).numpy(), out.numpy())
    return _sign_extended(out, bits).view(1, -1)


def _sign_extended(values: Tensor, bits: int) -> Tensor:
    """The signed residue mod 2^bits of every element."""
    unused = 8 * values.element_size() - bits
    return (values << unused) >> unused if unused else values


@functools.cache
def _triton_gemv() -> ModuleType | None:
    """The fused CUDA kernel, where Triton is installed."""
    try:
        return importlib.import_module("otpipe.kernels.gemv_triton")
    except ImportError:
        return None


@functools.cache
def _int_mm_is_exact(device: str) -> bool:
    """Whether ``torch._int_mm`` exists on ``device`` and is exact at the extremes.

    int8 units without a widening multiply-accumulate (x86 before VNNI) may saturate at 16 bits.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    a = torch.full((64, 1024), -128, dtype=torch.int8)
    b = torch.full((1024, 64), -128, dtype=torch.int8)
    a[1::2] = 127
    b[:, 2::3] = 127
    b[::5, 1::3] = -1
    want = (a.double() @ b.double()).to(torch.int32)
    try:
        got = torch._int_mm(a.to(device), b.to(device))
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(got.cpu(), want)


def _cuda_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm`` on CUDA, zero-padded to more than 16 rows and sides that 8 divides.

    int8 units take a row-major and b column-major; cuBLAS of CUDA 13 refuses other layouts. Callers
    pass them so where they can; anything else is copied here.
    """
    rows, n = a.shape
    columns = b.shape[1]
    b_cn = b.t()
    more_n, more_columns = -n % _CUDA_ALIGN, -columns % _CUDA_ALIGN
    if more_n or more_columns:
        b_cn = torch.nn.functional.pad(b_cn, (0, more_n, 0, more_columns))
    if more_n or rows < _CUDA_MIN_ROWS:
        a = torch.nn.functional.pad(a, (0, more_n, 0, max(0, _CUDA_MIN_ROWS - rows)))
    a, b_cn = _inner_contiguous(a), _inner_contiguous(b_cn)
    return torch._int_mm(a, b_cn.t())[:rows, :columns]


def _inner_contiguous(matrix: Tensor) -> Tensor:
    """``matrix`` with unit inner stride and rows that start on whole 8-byte units."""
    aligned = matrix.stride(0) % _CUDA_ALIGN == 0 and matrix.data_ptr() % _CUDA_ALIGN == 0
    return matrix if matrix.stride(1) == 1 and aligned else matrix.contiguous()


def _float64_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact: |sum| <= n * 2^14 < 2^31 is far below 2^53. Tiled, since float64 is 8 times larger."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    wide = a.double()
    for lo in range(0, b.shape[1], _FLOAT_TILE_COLUMNS):
        hi = lo + _FLOAT_TILE_COLUMNS
        out[:, lo:hi] = (wide @ b[:, lo:hi].double()).to(torch.int32)
    return out
