"""What an evaluator accepts and when: blocks in order, then the answers, once."""

from __future__ import annotations

import torch
from torch import Tensor

from otpipe.errors import ProtocolError


class BlockOrder:
    """Progress of one upload of ``total`` polynomials of ``ring_degree`` coefficients.

    ``unit`` is what the messages call one of them.
    """

    def __init__(self, total: int, ring_degree: int, num_bytes: int, unit: str) -> None:
        self.received = 0
        self._total, self._unit = total, unit
        self._polynomial = (ring_degree, num_bytes)
        self._answered = False

    def check(self, first: int, block: Tensor) -> None:
        """Raise ProtocolError unless ``block``, uint8 (J, N, bytes), is the next one."""
        count = block.shape[0] if block.dim() == 3 else 0
        left = self._total - self.received
        if (
            block.dtype != torch.uint8
            or tuple(block.shape) != (count, *self._polynomial)
            or not 1 <= count <= left
        ):
            degree, num_bytes = self._polynomial
            raise ProtocolError(
                f"A block of shape {tuple(block.shape)} ({block.dtype}) arrived; expected uint8 "
                f"(1 to {left}, {degree}, {num_bytes})."
            )
        if first != self.received or self._answered:
            raise ProtocolError(
                f"Block {first} arrived out of order; {self._unit} {self.received} is next."
            )

    def start_answers(self) -> None:
        """Raise ProtocolError unless all inputs are there and the answers are asked for once."""
        if self.received != self._total or self._answered:
            raise ProtocolError(
                f"Answers were asked for after {self.received} of {self._total} inputs"
                f"{', a second time' if self._answered else ''}; send the inputs once, then ask."
            )
        self._answered = True
