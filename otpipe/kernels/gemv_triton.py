"""Ring elements times an int8 matrix on CUDA, in one launch that reads the weight once.

One row is bound by reading the weight, so int32 multiply-accumulate on the plain cores is fast
enough and needs neither digits nor padding to the tensor cores' shapes. A weight whose columns are
contiguous, as the embedding's are, would have to be copied for the tensor cores; here up to 64 rows
share what the cache holds of it. Arithmetic wraps modulo 2^32, which is the ring. The plain-torch
twin is the digit path of :func:`otpipe.kernels.ring_gemm.ring_gemm`.

Shape suffixes: T rows, n inputs, m outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_BLOCK_M = 4
_ROW_BLOCK_N = 512
_ROW_WARPS = 2
_COLUMN_BLOCK_M = 256
_COLUMN_BLOCK_N = 16
_COLUMN_SPLIT = 512  # inputs summed by one program before it adds to the output
_MAX_COLUMN_MAJOR_ROWS = 64


@triton.jit
def _row_major_kernel(  # type: ignore[no-untyped-def]
    weight, x, out, m, n, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[i] = sum_j weight[i, j] x[j]; the weight's rows are contiguous."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    row_start = weight + i.to(tl.int64)[:, None] * stride
    for first in range(0, n, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = (i < m)[:, None] & (j < n)[None, :]
        w = tl.load(row_start + j[None, :], mask=inside, other=0).to(tl.int32)
        products += w * tl.load(x + j, mask=j < n, other=0)[None, :]
    tl.store(out + i, tl.sum(products, axis=1), mask=i < m)


@triton.jit
def _column_major_kernel(  # type: ignore[no-untyped-def]
    weight, x, out, m, n, stride, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[t, i] += sum over this program's j of weight[i, j] x[t, j]; columns are contiguous.

    Programs of neighbouring numbers do the rows of one part of the weight, so that it is read from
    memory once.
    """
    t = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(2) * SPLIT
    total = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for first in range(start, start + SPLIT, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = (j < n)[:, None] & (i < m)[None, :]
        w = tl.load(weight + j.to(tl.int64)[:, None] * stride + i[None, :], mask=inside, other=0)
        values = tl.load(x + t * n + j, mask=j < n, other=0)
        total += tl.sum(w.to(tl.int32) * values[:, None], axis=0)
    tl.atomic_add(out + t * m + i, total, mask=i < m)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`gemv` takes these, and is the faster way."""
    if not x.is_cuda or x.dtype != torch.int32 or len(x) == 0:
        return False
    if weight.stride(1) == 1:
        return len(x) == 1
    return weight.stride(0) == 1 and len(x) <= _MAX_COLUMN_MAJOR_ROWS


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """W x mod 2^32 for every row of ``x``.

    Args:
        x: int32 (T, n) on CUDA.
        weight: int8 (m, n) on the same device, rows or columns contiguous; see :func:`fits`.

    Returns:
        int32 (T, m).
    """
    rows, n = x.shape
    m = weight.shape[0]
    x = x.contiguous()
    if weight.stride(1) == 1:
        out = torch.empty((1, m), dtype=torch.int32, device=x.device)
        _row_major_kernel[(triton.cdiv(m, _ROW_BLOCK_M),)](
            weight,
            x,
            out,
            m,
            n,
            weight.stride(0),
            _ROW_BLOCK_M,
            _ROW_BLOCK_N,
            num_warps=_ROW_WARPS,
        )
        return out
    out = torch.zeros((rows, m), dtype=torch.int32, device=x.device)
    grid = (rows, triton.cdiv(m, _COLUMN_BLOCK_M), triton.cdiv(n, _COLUMN_SPLIT))
    _column_major_kernel[grid](
        weight, x, out, m, n, weight.stride(1), _COLUMN_SPLIT, _COLUMN_BLOCK_M, _COLUMN_BLOCK_N
    )
    return out
