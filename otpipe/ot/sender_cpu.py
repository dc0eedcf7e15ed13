"""The sender's arithmetic on a CPU; ``sender_device`` has the same for a GPU.

Shape suffixes: n transfers, b index bits, M = 2^b messages, w words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from otpipe.ot.channel import Bytes
from otpipe.ot.extension import U64, TreeLayout
from otpipe.ot.extension_cpu import CpuExtensionSender
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.masks_cpu import CpuMasks, Message, Part
from otpipe.ot.pads import TweakLedger, offset_table
from otpipe.ot.pads_cpu import CpuHash
from otpipe.ot.params import MAX_INDEX_BITS
from otpipe.ot.plan import Shape


@dataclass(frozen=True, repr=False, eq=False)
class Job:
    """Transfers of one request whose answers travel in one message.

    Attributes:
        shape: of the request.
        cot, element: number of the first COT, and of the first transfer, in the exchange.
        values: int64 (n, w), or (n, M, w) where messages are chosen from; of these transfers.
        results: int64 (n, w), contiguous, to be filled; None where messages are chosen from.
    """

    shape: Shape
    cot: int
    element: int
    values: Tensor
    results: Tensor | None


class SenderMath(Protocol):
    """What a device does for the sender. Keys are int64 (COTs, 2), the low half first."""

    def cots(self, first: int, count: int, corrections: Bytes) -> Tensor:
        """Keys q of COTs from ``first``, for one message of the receiver: (count, 2)."""

    def answers(self, jobs: Sequence[Job], keys: Tensor, flips: U64, first: int) -> Bytes:
        """All answers of one message, packed; fills the results.

        keys: of the exchange, whose first COT is number ``first``. flips: uint64 (transfers of the
        exchange,), on the host: choices xor what their COTs hold.
        """

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

    def answers(self, jobs: Sequence[Job], keys: Tensor, flips: U64, first: int) -> Bytes:
        """See ``SenderMath``."""
        parts = [
            Part(
                job.shape,
                len(job.values),
                job.cot,
                job.element,
                _u64(job.values),
                None if job.results is None else _u64(job.results),
            )
            for job in jobs
        ]
        return self._masks.answers(Message(parts), _u64(keys), self._offsets, flips, first)

    def random_pairs(self, keys: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
        """See ``SenderMath``."""
        words = self._masks.all_words(_u64(keys), self._offsets[:2], first, 1, 1, bits)
        both = torch.from_numpy(words.view(np.int64))
        return both[:, 0, 0].contiguous(), both[:, 1, 0].contiguous()


def _u64(values: Tensor) -> U64:
    return values.contiguous().numpy().view(np.uint64)
