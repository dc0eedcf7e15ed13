"""How requests become messages: sizes that both parties compute from public shapes alone.

One exchange is one round: the receiver's choices, then the sender's answers. Both are streams of
bytes cut into messages of at most ``MESSAGE_BYTES``, so that neither party needs memory for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from otpipe.ot.params import MAX_INDEX_BITS, MAX_MESSAGE_BITS, MAX_WORD_BITS

MESSAGE_BYTES = 1 << 22
_CUT = 8  # transfers: any number of bits, times this, is whole bytes


@dataclass(frozen=True)
class Shape:
    """What both parties know of one request.

    Attributes:
        correlated: masked differences are sent; else all messages are.
        count: n transfers.
        index_bits: b; each transfer takes b COTs and chooses one of 2^b. Of a correlated one these
            are the bits of its factor, at most ``bits``; each chooses by itself.
        words: values of one message.
        bits: of each value; for bit j of a factor ``bits`` - j.

    Raises:
        ValueError: out of range.
    """

    correlated: bool
    count: int
    index_bits: int
    words: int
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_WORD_BITS:
            raise ValueError(f"Values have 1 to {MAX_WORD_BITS} bits, not {self.bits}.")
        if self.correlated and not 1 <= self.index_bits <= self.bits:
            raise ValueError(
                f"A factor of values of {self.bits} bits has 1 to {self.bits} bits, not "
                f"{self.index_bits}; higher ones do not matter."
            )
        if not self.correlated and not 1 <= self.index_bits <= MAX_INDEX_BITS:
            raise ValueError(
                f"A transfer chooses with 1 to {MAX_INDEX_BITS} index bits, not {self.index_bits}."
            )
        if not 1 <= self.words * self.bits <= MAX_MESSAGE_BITS:
            raise ValueError(
                f"A message of {self.words} words of {self.bits} bits is not possible; "
                f"use at least one word and at most {MAX_MESSAGE_BITS} bits."
            )

    @property
    def num_messages(self) -> int:
        """2^b: how many choices there are."""
        return 1 << self.index_bits

    @property
    def cots(self) -> int:
        """COTs that the request takes."""
        return self.count * self.index_bits

    @property
    def choice_bytes(self) -> int:
        """Bytes of the receiver's masked choices: b bits a transfer."""
        return -(-self.cots // 8)

    @property
    def answer_bits(self) -> int:
        """Bits of the sender's answer for one transfer."""
        if self.correlated:
            b = self.index_bits
            return self.words * (b * self.bits - b * (b - 1) // 2)
        return self.words * self.bits * self.num_messages

    @property
    def num_pads(self) -> int:
        """Pads that the sender makes for one transfer."""
        return 2 * self.index_bits if self.correlated else self.num_messages

    def answer_bytes(self, count: int) -> int:
        """Bytes of the answers to ``count`` transfers."""
        return -(-count * self.answer_bits // 8)


class Piece(NamedTuple):
    """Transfers [lo, hi) of request ``request``, whose answers travel in one message."""

    request: int
    lo: int
    hi: int


def answer_messages(shapes: Sequence[Shape]) -> list[list[Piece]]:
    """The sender's messages of one exchange, each a list of pieces in order."""
    messages: list[list[Piece]] = []
    room = 0
    for request, shape in enumerate(shapes):
        lo = 0
        while lo < shape.count:
            fitting = room * 8 // shape.answer_bits // _CUT * _CUT
            if not messages or min(fitting, shape.count - lo) <= 0:
                messages.append([])
                room = MESSAGE_BYTES
                fitting = max(_CUT, room * 8 // shape.answer_bits // _CUT * _CUT)
            hi = min(shape.count, lo + fitting)
            messages[-1].append(Piece(request, lo, hi))
            room -= shape.answer_bytes(hi - lo)
            lo = hi
    return messages


def choice_messages(shapes: Sequence[Shape]) -> list[int]:
    """Sizes of the receiver's messages of one exchange."""
    left = sum(shape.choice_bytes for shape in shapes)
    sizes = []
    while left > 0:
        sizes.append(min(left, MESSAGE_BYTES))
        left -= sizes[-1]
    return sizes
