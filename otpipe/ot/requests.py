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

    With more than one factor bit this is Gilboa's product (CRYPTO 1999, section 4): a correlated OT
    for each bit j of the choice, of values mod 2^(bits - j), whose results both parties add with
    the weights 2^j.

    Attributes:
        correlation: int64 (n,) or (n, w), on the sender's device. With w words one choice
            multiplies all of them: a number times a row.
        bits: 1 to 64.
        factor_bits: of the choice, 1 to ``bits``.
    """

    correlation: Tensor
    bits: int
    factor_bits: int = 1


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
    """Meets ``SendCorrelated``; choice (n,) in [0, 2^factor_bits).

    ``words`` None: the result is (n,); else (n, words).
    """

    choice: Choices
    bits: int
    words: int | None = None
    factor_bits: int = 1


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
