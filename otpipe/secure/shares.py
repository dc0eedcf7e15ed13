"""Additive shares modulo 2^bits, and what each party does to its own share without a message.

A secret integer v is held as v = v_server + v_client mod 2^bits. A :class:`Share` is one party's
part; the plaintext reference holds v itself in the same type. Everything linear with public
coefficients is local and is a method here; whatever costs a message is in ``operations``.

The secret is signed, in [-2^(bits-1), 2^(bits-1)), and stands for the real number v * 2^-frac. A
share with one bit is a bit shared by exclusive or, which is addition mod 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpipe.crypto.randomness import random_bytes

MAX_RING_BITS = 62
"""Shares are stored as non-negative int64, so that ``>>`` is the logical shift; sums of two fit."""


def reduced(values: Tensor, bits: int) -> Tensor:
    """The representative in [0, 2^bits); ``values`` int64, products may have wrapped mod 2^64."""
    return values & ((1 << bits) - 1)


def signed(values: Tensor, bits: int) -> Tensor:
    """The representative in [-2^(bits-1), 2^(bits-1))."""
    half = 1 << (bits - 1)
    return reduced(values + half, bits) - half


def random_ring(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    """Secret int64 values, uniform in [0, 2^bits): AES-CTR under a key of the operating system."""
    if device.type == "meta":
        return torch.empty(tuple(shape), dtype=torch.int64, device=device)
    count = 1
    for size in shape:
        count *= size
    width = next(n for n in (1, 2, 4, 8) if 8 * n >= bits)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    values = torch.from_numpy(random_bytes(width * count)).view(kind).to(device)
    return reduced(values.to(torch.int64), bits).view(tuple(shape))


@dataclass(frozen=True, eq=False, repr=False)
class Share:
    """One party's additive share of a tensor of secrets.

    Attributes:
        data: int64, any shape, in [0, 2^bits).
        bits: of the ring, 1 to 62.
        frac: the secret integer v stands for v * 2^-frac.
    """

    data: Tensor
    bits: int
    frac: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a ring or a dtype that the protocols do not have."""
        if not 1 <= self.bits <= MAX_RING_BITS:
            raise ValueError(
                f"A share lives in a ring of 1 to {MAX_RING_BITS} bits, not {self.bits}."
            )
        if self.data.dtype != torch.int64:
            raise ValueError(f"A share is int64, not {self.data.dtype}.")

    @classmethod
    def of(cls, values: Tensor, bits: int, frac: int = 0) -> Share:
        """A share with any int64 representatives ``values``."""
        return cls(reduced(values, bits), bits, frac)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor of secrets."""
        return self.data.shape

    def __repr__(self) -> str:
        return f"Share({tuple(self.shape)}, {self.bits} bits, frac {self.frac})"

    # --- linear ---------------------------------------------------------------------------------

    def __add__(self, other: Share) -> Share:
        """Elementwise sum, broadcasting; both in one ring and at one scale."""
        self._require_like(other)
        return Share.of(self.data + other.data, self.bits, self.frac)

    def __sub__(self, other: Share) -> Share:
        """Elementwise difference, broadcasting; both in one ring and at one scale."""
        self._require_like(other)
        return Share.of(self.data - other.data, self.bits, self.frac)

    def __neg__(self) -> Share:
        return Share.of(-self.data, self.bits, self.frac)

    def times(self, factor: int | Tensor, factor_frac: int = 0) -> Share:
        """Times public integers that stand for ``factor * 2^-factor_frac``."""
        return Share.of(self.data * factor, self.bits, self.frac + factor_frac)

    def sum(self, dim: int) -> Share:
        """Sum of the secrets along ``dim``."""
        return Share.of(self.data.sum(dim), self.bits, self.frac)

    def low_bits(self, bits: int) -> Share:
        """The secret mod 2^bits: the same signed value where it fits ``bits`` bits."""
        if bits > self.bits:
            raise ValueError(
                f"{self.bits} bits hold no {bits} low bits; a larger ring needs rescale."
            )
        return Share.of(self.data, bits, self.frac)

    def at_frac(self, frac: int) -> Share:
        """The same integers read at another scale: the real numbers change by a power of two."""
        return Share(self.data, self.bits, frac)

    # --- shape ----------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Share:
        return Share(self.data[index], self.bits, self.frac)

    def reshape(self, *shape: int) -> Share:
        """As ``Tensor.reshape``."""
        return Share(self.data.reshape(*shape), self.bits, self.frac)

    def transpose(self, dim0: int, dim1: int) -> Share:
        """As ``Tensor.transpose``."""
        return Share(self.data.transpose(dim0, dim1), self.bits, self.frac)

    def expand(self, *shape: int) -> Share:
        """As ``Tensor.expand``: copies of the same secret, which share its randomness."""
        return Share(self.data.expand(*shape), self.bits, self.frac)

    def _require_like(self, other: Share) -> None:
        if (self.bits, self.frac) != (other.bits, other.frac):
            raise ValueError(
                f"{self!r} and {other!r} differ in ring or scale; rescale one of them."
            )


def concatenate(shares: Sequence[Share], dim: int = 0) -> Share:
    """Shares of one ring and scale, one after the other along ``dim``."""
    for share in shares[1:]:
        shares[0]._require_like(share)
    return Share(torch.cat([share.data for share in shares], dim), shares[0].bits, shares[0].frac)


def stack(shares: Sequence[Share], dim: int = 0) -> Share:
    """Shares of one ring, scale and shape along a new dimension."""
    for share in shares[1:]:
        shares[0]._require_like(share)
    return Share(torch.stack([share.data for share in shares], dim), shares[0].bits, shares[0].frac)
