"""The plaintext reference: the same operations on the secrets themselves, in exact integers.

It protects nothing. A "share" here holds the secret mod 2^bits. It rounds to nearest where the
parties round up or down at random, and evaluates functions in float64 where they use tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from otpipe.secure import resizing
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.rounds import Request, Step, drive, immediate
from otpipe.secure.shares import Share, random_ring, reduced, signed
from otpipe.secure.tables import FieldFunction, PiecewiseTable

T = TypeVar("T")


class PlainOperations:
    """See :class:`otpipe.secure.operations.SecureOperations`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.empty(0, device=device).device

    def run(self, step: Step[T]) -> T:
        """Run one step; it has no rounds."""
        return drive(step, _no_messages)

    def public(self, values: Tensor, bits: int, frac: int = 0) -> Share:
        """See ``SecureOperations``."""
        return Share.of(values.to(self.device, torch.int64), bits, frac)

    def add_public(self, x: Share, values: Tensor | int) -> Share:
        """See ``SecureOperations``."""
        if isinstance(values, Tensor):
            values = values.to(self.device)
        return Share.of(x.data + values, x.bits, x.frac)

    def random(self, shape: Sequence[int], bits: int, frac: int = 0) -> Share:
        """See ``SecureOperations``."""
        return Share(random_ring(shape, bits, self.device), bits, frac)

    @immediate
    def rescale(self, x: Share, shift: int, bits: int, *, nonnegative: bool = False) -> Share:
        """See ``SecureOperations``; rounds half up."""
        value = x.data if nonnegative else signed(x.data, x.bits)
        half = (1 << shift) >> 1
        return Share.of((value + half) >> shift, bits, x.frac - shift)

    def shifted(self, x: Share, shifts: Sequence[int], bits: int) -> Share:
        """See ``SecureOperations``; rounds half up."""
        return resizing.shifted(x, signed(x.data, x.bits), shifts, bits, halves=True)

    @immediate
    def select(self, condition: Share, x: Share, bits: int, *, nonnegative: bool = False) -> Share:
        """See ``SecureOperations``."""
        value = x.data if nonnegative else signed(x.data, x.bits)
        return Share.of(value * condition.data, bits, x.frac)

    @immediate
    def mul(self, x: Share, y: Share, bits: int) -> Share:
        """See ``SecureOperations``."""
        product = signed(x.data, x.bits) * signed(y.data, y.bits)
        return Share.of(product, bits, x.frac + y.frac)

    @immediate
    def mul_rows(self, x: Share, y: Share, bits: int) -> Share:
        """See ``SecureOperations``."""
        product = signed(x.data, x.bits)[:, None] * signed(y.data, y.bits)
        return Share.of(product, bits, x.frac + y.frac)

    @immediate
    def square_sum(self, x: Share, bits: int) -> Share:
        """See ``SecureOperations``."""
        return Share.of(signed(x.data, x.bits).square().sum(-1), bits, 2 * x.frac)

    @immediate
    def matmul(self, x: Share, y: Share, bits: int) -> Share:
        """See ``SecureOperations``."""
        product = ring_matmul(reduced(x.data, bits), reduced(y.data, bits), bits)
        return Share.of(product, bits, x.frac + y.frac)

    @immediate
    def is_negative(self, x: Share) -> Share:
        """See ``SecureOperations``."""
        return Share(x.data >> (x.bits - 1), 1)

    def less_than(self, x: Share, y: Share) -> Step[Share]:
        """See ``SecureOperations``."""
        return self.is_negative(x - y)

    @immediate
    def max(self, x: Share) -> Share:
        """See ``SecureOperations``."""
        return Share.of(signed(x.data, x.bits).amax(1), x.bits, x.frac)

    @immediate
    def lookup(
        self, x: Share, index_bits: int, function: FieldFunction, field_bits: Sequence[int]
    ) -> list[Share]:
        """See ``SecureOperations``; d is what the low bits of x are."""
        low_bits = x.bits - index_bits
        fields = function((x.data >> low_bits) << low_bits)
        return [Share.of(field, bits) for field, bits in zip(fields, field_bits, strict=True)]

    @immediate
    def evaluate(self, x: Share, table: PiecewiseTable) -> Share:
        """See ``SecureOperations``; in float64."""
        value = table.reference(x.data).to(x.data.device)
        return Share.of(value, table.out_bits, table.out_frac)

    @immediate
    def swap(self, x: Share) -> Tensor:
        """See ``SecureOperations``."""
        return x.data

    @immediate
    def reveal_to_client(self, x: Share) -> Tensor | None:
        """See ``SecureOperations``."""
        return signed(x.data, x.bits)

    @immediate
    def give_to_server(self, values: Tensor, bits: int) -> Tensor | None:
        """See ``SecureOperations``; the reference is both parties."""
        return reduced(values.to(self.device, torch.int64), bits)


def _no_messages(requests: Sequence[Request]) -> list[Any]:
    assert not requests, "the plaintext reference has no peer"
    return []
