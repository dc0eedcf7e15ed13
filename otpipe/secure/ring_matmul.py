"""Products of two matrices of ring elements, exact, on float64 units.

``kernels.ring_gemm`` multiplies by int8 weights; here both factors are ring elements, and integer
matrix products of 64 bits do not exist on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIMB_BITS = 20
_MAX_INNER = 1 << 12
"""K * (2^20 - 1)^2 < 2^52: float64 sums of limb products are exact."""


def ring_matmul(x_BIK: Tensor, y_BKJ: Tensor, bits: int) -> Tensor:
    """x y mod 2^bits: int64 (B, I, K) and (B, K, J) in [0, 2^bits) -> (B, I, J), bits <= 62."""
    total = x_BIK.new_zeros((x_BIK.shape[0], x_BIK.shape[1], y_BKJ.shape[2]))
    count = -(-bits // _LIMB_BITS)
    for lo in range(0, x_BIK.shape[2], _MAX_INNER):
        x = _limbs(x_BIK[:, :, lo : lo + _MAX_INNER], count)
        y = _limbs(y_BKJ[:, lo : lo + _MAX_INNER], count)
        for i in range(count):
            for j in range(count - i):  # higher products vanish mod 2^bits
                total += torch.bmm(x[i], y[j]).to(torch.int64) << (_LIMB_BITS * (i + j))
    return total & ((1 << bits) - 1)


def _limbs(values: Tensor, count: int) -> list[Tensor]:
    mask = (1 << _LIMB_BITS) - 1
    return [((values >> (_LIMB_BITS * i)) & mask).double() for i in range(count)]
