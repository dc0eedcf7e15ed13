"""One message of several requests, answered by any of the sender's implementations."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from ot_helpers import random_values, random_words
from torch import Tensor

from otpipe.ot.extension import TreeLayout
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import TweakLedger
from otpipe.ot.params import OtParams
from otpipe.ot.plan import Shape
from otpipe.ot.sender_cpu import CpuSenderMath, Job
from otpipe.ot.sender_device import DeviceSenderMath

PARAMS = OtParams("test", 8, log2_epoch=10)
DELTA = os.urandom(16)
FIRST = 1000
"""COT at which the exchange begins: it passes into the second epoch."""


@dataclass
class Asked:
    """What both parties put into one message, and what came of it."""

    shapes: list[Shape]
    keys: NDArray[np.uint64]
    flips: NDArray[np.uint64]
    values: list[Tensor]
    results: list[Tensor | None]
    packed: NDArray[np.uint8]

    @classmethod
    def of(cls, shapes: list[Shape]) -> Asked:
        keys = random_words(sum(shape.cots for shape in shapes), 2)
        flips = [random_values((s.count,), s.index_bits).numpy().view(np.uint64) for s in shapes]
        values = [
            random_values((s.count, *(() if s.correlated else (s.num_messages,)), s.words))
            for s in shapes
        ]
        return cls(shapes, keys, np.concatenate(flips), values, [], np.empty(0, np.uint8))

    def answered(self, math: CpuSenderMath | DeviceSenderMath, device: str = "cpu") -> Asked:
        """The same, answered by ``math``."""
        jobs, cot, element = [], 0, 0
        results: list[Tensor | None] = []
        for shape, values in zip(self.shapes, self.values, strict=True):
            own = values.to(device)
            results.append(torch.empty_like(own) if shape.correlated else None)
            jobs.append(Job(shape, cot, element, own, results[-1]))
            cot, element = cot + shape.cots, element + shape.count
        keys = torch.from_numpy(self.keys.view(np.int64)).to(device)
        packed = math.answers(jobs, keys, self.flips, FIRST)
        filled = [None if result is None else result.cpu() for result in results]
        return Asked(self.shapes, self.keys, self.flips, self.values, filled, packed)


def secrets_of(session: bytes = b"session") -> SenderSecrets:
    return SenderSecrets(DELTA, np.zeros((PARAMS.num_leaves, 16), np.uint8), session)


def cpu_math(native: bool | None = None) -> CpuSenderMath:
    return CpuSenderMath(secrets_of(), TreeLayout.of(PARAMS), TweakLedger(PARAMS), native)


def device_math(device: str = "cpu") -> DeviceSenderMath:
    layout, ledger = TreeLayout.of(PARAMS), TweakLedger(PARAMS)
    return DeviceSenderMath(secrets_of(), layout, ledger, torch.device(device))


MIXED = [
    [Shape(True, 40, 1, 1, 1), Shape(True, 77, 17, 3, 37), Shape(False, 40, 5, 7, 64)],
    [Shape(True, 3, 46, 300, 46)],
    [Shape(False, 100, 8, 2, 44), Shape(True, 1000, 40, 1, 64), Shape(False, 9, 2, 1, 1)],
    [Shape(True, 4000, 2, 5, 13), Shape(False, 3000, 4, 1, 2)],
]
