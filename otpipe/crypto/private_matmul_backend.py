"""Backends whose first part of an answer has all 64 bits of the high limb.

``private_cpu`` and ``private_torch`` pack up to 56 bits. Messages of 51 bits leave too little room
for the rounding of a 56-bit first part (docs/attention_products.md, section 4); with 64 bits it is
the high limb, rounded by the low one's top bit.

Shape suffixes: G answers, N ring degree, L limbs, M = N/2, g outputs of an answer, T slots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto import negacyclic_wide
from otpipe.crypto.private_backend import Backend
from otpipe.crypto.private_cpu import CompiledBackend, _finish_second
from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import AnswerSecrets
from otpipe.crypto.private_torch import TorchBackend
from otpipe.kernels import wide
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.packing import pack_uints


def wide_backend(packing: PrivatePacking, device: torch.device) -> Backend:
    """The backend of a device for a set with a 64-bit first part."""
    if device.type == "cpu":
        return WideCompiledBackend(packing)
    return WideTorchBackend(packing, device)


class WideCompiledBackend(CompiledBackend):
    """``CompiledBackend`` with a 64-bit first part."""

    def _round(
        self, parts: Array, sums: Array, secret: AnswerSecrets, masks_gT: Array, row: Array
    ) -> None:
        packing, params = self._packing, self._params
        split = self._degree * params.first_bytes
        _finish_first(
            parts[0],
            self._limbs[1],
            *self._twist,
            sums[0],
            secret.error,
            row[:split].view(np.uint64),
        )
        _finish_second(
            parts[1],
            self._limbs[1],
            *self._twist,
            sums[1],
            secret.flood,
            params.flood_shift,
            masks_gT,
            params.delta_shift,
            packing.stride,
            params.log2_q - params.second_bits,
            params.second_bytes,
            row[split:].view(np.uint64),
        )


class WideTorchBackend(TorchBackend):
    """``TorchBackend`` with a 64-bit first part."""

    def rounded(self, first: Tensor, second: Tensor) -> Tensor:
        """The bytes of answers: uint8 (G, answer_bytes)."""
        params, count = self._params, first.shape[1]
        high = (first[1] + ((first[0] >> 63) & 1)).contiguous()
        low = wide.rounded_down(second, params.log2_q - params.second_bits)
        packed = pack_uints(low, params.second_bytes)
        return torch.cat([high.view(torch.uint8).view(count, -1), packed.reshape(count, -1)], 1)


@kernel
def _finish_first(
    product: Array,
    limb_bits: int,
    real: Array,
    imag: Array,
    sums: Array,
    error: Array,
    words: Array,
) -> None:
    """words = round((sums + u a_0 + e_1) / 2^64). product: (L, M, 2). sums: uint64 (2, N)."""
    degree = error.shape[0]
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    negacyclic_wide.unfold(product, limb_bits, real, imag, low, high)
    wide.add_shifted(error.astype(np.int64), 1, 0, low, high)
    for k in range(degree):
        total = low[k] + sums[0, k]
        carry = np.uint64(total < low[k])
        words[k] = high[k] + sums[1, k] + carry + (total >> np.uint64(63))
