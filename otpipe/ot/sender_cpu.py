"""The sender's arithmetic on a CPU; ``sender_device`` has the same for a GPU.

Shape suffixes: n transfers, b index bits, M = 2^b messages, w words.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from otpipe.ot.channel import Bytes
from otpipe.ot.extension import U64, TreeLayout
from otpipe.ot.extension_cpu import CpuExtensionSender
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.masks_cpu import CpuMasks
from otpipe.ot.pads import TweakLedger, offset_table
from otpipe.ot.pads_cpu import CpuHash, combine
from otpipe.ot.params import MAX_INDEX_BITS


class SenderMath(Protocol):
    """What a device does for the sender. Keys are int64 (COTs, 2), the low half first."""

    def cots(self, first: int, count: int, corrections: Bytes) -> Tensor:
        """Keys q of COTs from ``first``, for one message of the receiver: (count, 2)."""

    def mask_messages(
        self, keys: Tensor, first: int, index_bits: int, flips: Bytes, messages: Tensor, bits: int
    ) -> Bytes:
        """Messages (n, M, w) under their pads, packed; flips uint8 (n,) on the host."""

    def mask_correlated(
        self, keys: Tensor, first: int, flips: Bytes, correlation: Tensor, bits: int
    ) -> tuple[Tensor, Bytes]:
        """x (n, w), and packed x + correlation - pad 1, for correlation (n, w)."""

    def random_pairs(self, keys: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
        """Both pads of each transfer as values (n,)."""


class CpuSenderMath:
    """``SenderMath`` with compiled kernels."""

    def __init__(
        self,
        secrets: SenderSecrets,
        layout: TreeLayout,
        ledger: TweakLedger,
        native: bool | None = None,
    ) -> None:
        """``native``: compiled AES; None: where the processor has it."""
        self._extension = CpuExtensionSender(layout, secrets.leaves, secrets.delta, native)
        self._masks = CpuMasks(CpuHash(secrets.session, ledger, native))
        self._offsets = offset_table(secrets.delta, MAX_INDEX_BITS)

    def cots(self, first: int, count: int, corrections: Bytes) -> Tensor:
        """See ``SenderMath``."""
        words = corrections.view(np.uint64).reshape(-1, count // 64)
        return torch.from_numpy(self._extension.block(first, count, words).view(np.int64))

    def mask_messages(
        self, keys: Tensor, first: int, index_bits: int, flips: Bytes, messages: Tensor, bits: int
    ) -> Bytes:
        """See ``SenderMath``."""
        bases, offsets = combine(_u64(keys), index_bits), self._offsets[: 1 << index_bits]
        return self._masks.mask_chosen(
            bases, offsets, first, index_bits, flips, _u64(messages), bits
        )

    def mask_correlated(
        self, keys: Tensor, first: int, flips: Bytes, correlation: Tensor, bits: int
    ) -> tuple[Tensor, Bytes]:
        """See ``SenderMath``."""
        x, packed = self._masks.mask_correlated(
            _u64(keys), self._offsets[:2], first, flips, _u64(correlation), bits
        )
        return torch.from_numpy(x.view(np.int64)), packed

    def random_pairs(self, keys: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
        """See ``SenderMath``."""
        words = self._masks.all_words(_u64(keys), self._offsets[:2], first, 1, 1, bits)
        both = torch.from_numpy(words.view(np.int64))
        return both[:, 0, 0].contiguous(), both[:, 1, 0].contiguous()


def _u64(values: Tensor) -> U64:
    return values.contiguous().numpy().view(np.uint64)
