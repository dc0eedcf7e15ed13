"""What the two parties ask of an OT session; several requests can share one round.

The sender's request and the receiver's must agree in kind, count, bits and words: request i of one
party meets request i of the other. Values are int64, taken mod 2^bits; results are the
representatives in [0, 2^bits), with 64 bits the two's complement.

Shape suffixes: n transfers, w words, M = 2^index_bits messages of one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

#: what a receiver may pass as its choices: integers (n,), torch on the CPU or numpy
Choices = Tensor | NDArray[Any]


@dataclass(frozen=True, repr=False, eq=False)
class SendCorrelated:
    """The sender gets x, uniform; the receiver x + choice * correlation mod 2^bits.

    Attributes:
        correlation: int64 (n,) or (n, w), on the sender's device. With w words one choice bit
            selects all of them: a bit times a row.
        bits: 1 to 64.
    """

    correlation: Tensor
    bits: int


@dataclass(frozen=True, repr=False, eq=False)
class SendChosen:
    """The receiver gets m1 where its choice is 1, else m0; both int64 (n,) or (n, w)."""

    m0: Tensor
    m1: Tensor
    bits: int


@dataclass(frozen=True, repr=False, eq=False)
class SendOneOfMany:
    """The receiver gets messages[i, index[i]].

    Attributes:
        messages: int64 (n, M) or (n, M, w), M = 2 to 256, a power of two.
        bits: bits of each word, 1 to 64.
    """

    messages: Tensor
    bits: int


@dataclass(frozen=True, repr=False, eq=False)
class ReceiveCorrelated:
    """Meets ``SendCorrelated``; choice (n,) of 0 and 1.

    ``words`` None: the result is (n,); else (n, words).
    """

    choice: Choices
    bits: int
    words: int | None = None


@dataclass(frozen=True, repr=False, eq=False)
class ReceiveChosen:
    """Meets ``SendChosen``; choice (n,) of 0 and 1."""

    choice: Choices
    bits: int
    words: int | None = None


@dataclass(frozen=True, repr=False, eq=False)
class ReceiveOneOfMany:
    """Meets ``SendOneOfMany``; index (n,) in [0, 2^index_bits), index_bits 1 to 8."""

    index: Choices
    index_bits: int
    bits: int
    words: int | None = None


SenderRequest = SendCorrelated | SendChosen | SendOneOfMany
ReceiverRequest = ReceiveCorrelated | ReceiveChosen | ReceiveOneOfMany
