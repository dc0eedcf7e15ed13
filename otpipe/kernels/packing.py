"""Integers of 1 to 8 bytes, little-endian, without padding: how ciphertexts travel.

CPU and CUDA; the torch functions double as the twins of the compiled CPU kernels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.kernels import cpu

_VALUES_PER_GROUP = 8  # 8 values of any whole number of bytes fill whole 64-bit words
_GRAIN = 1 << 15


def pack_uints(values: Tensor, num_bytes: int) -> Tensor:
    """Pack ``values`` (...,) int64, taken mod 2^(8 num_bytes), into (..., num_bytes) uint8."""
    _check_width(num_bytes)
    if values.dtype != torch.int64:
        raise TypeError(f"pack_uints wants int64 values, got {values.dtype}.")
    if values.is_cuda:
        return pack_uints_torch(values, num_bytes)
    flat = values.contiguous().view(-1)
    count = flat.numel()
    whole = count - count % _VALUES_PER_GROUP
    out = torch.empty((count, num_bytes), dtype=torch.uint8)
    source = flat.numpy().view(np.uint64)
    words = out[:whole].view(-1).numpy().view(np.uint64)

    def body(lo: int, hi: int) -> None:
        cpu.pack_words(source[8 * lo : 8 * hi], num_bytes, words[lo * num_bytes : hi * num_bytes])

    cpu.parallel_for(body, whole // _VALUES_PER_GROUP, _GRAIN)
    if whole < count:
        out[whole:] = pack_uints_torch(flat[whole:], num_bytes)
    return out.view(*values.shape, num_bytes)


def unpack_uints(packed: Tensor) -> Tensor:
    """Inverse of ``pack_uints``: (..., num_bytes) uint8 -> (...,) int64.

    Values are zero-extended; with 8 bytes they come back as two's complement.
    """
    num_bytes = packed.shape[-1]
    _check_width(num_bytes)
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_uints wants uint8 bytes, got {packed.dtype}.")
    if packed.is_cuda:
        return unpack_uints_torch(packed)
    flat = packed.contiguous().view(-1, num_bytes)
    count = flat.shape[0]
    whole = count - count % _VALUES_PER_GROUP
    out = torch.empty(count, dtype=torch.int64)
    target = out.numpy().view(np.uint64)
    words = flat[:whole].reshape(-1).numpy()
    if words.ctypes.data % 8:  # a view into a received frame may start anywhere
        words = words.copy()
    words = words.view(np.uint64)

    def body(lo: int, hi: int) -> None:
        cpu.unpack_words(words[lo * num_bytes : hi * num_bytes], num_bytes, target[8 * lo : 8 * hi])

    cpu.parallel_for(body, whole // _VALUES_PER_GROUP, _GRAIN)
    if whole < count:
        out[whole:] = unpack_uints_torch(flat[whole:])
    return out.view(packed.shape[:-1])


def pack_uints_torch(values: Tensor, num_bytes: int) -> Tensor:
    """``pack_uints`` in plain torch, on any device."""
    octets = values.contiguous().view(torch.uint8).view(*values.shape, 8)
    return octets[..., :num_bytes].contiguous()


def unpack_uints_torch(packed: Tensor) -> Tensor:
    """``unpack_uints`` in plain torch, on any device."""
    octets = packed.new_zeros((*packed.shape[:-1], 8))
    octets[..., : packed.shape[-1]] = packed
    return octets.view(torch.int64).view(packed.shape[:-1])


def _check_width(num_bytes: int) -> None:
    if not 1 <= num_bytes <= 8:
        raise ValueError(f"A packed integer has 1 to 8 bytes, not {num_bytes}.")
