"""What the OT stack sends, in bytes, from parameters and shapes alone.

``docs/ot.md`` tabulates these; a test compares them with what a channel counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from otpipe.ot.curve import POINT_BYTES
from otpipe.ot.extension import rounded
from otpipe.ot.handshake import HELLO_BYTES
from otpipe.ot.params import BLOCK_BYTES, OtParams
from otpipe.ot.plan import Shape


@dataclass(frozen=True)
class Traffic:
    """Payload bytes in each direction; the receiver is the client, the sender the server."""

    to_sender: int
    to_receiver: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.to_sender + other.to_sender, self.to_receiver + other.to_receiver)


def setup_traffic(params: OtParams) -> Traffic:
    """Base OTs and seeds, once a connection."""
    points, sums = 2 * params.kappa * POINT_BYTES, 2 * params.kappa * BLOCK_BYTES
    return Traffic(to_sender=HELLO_BYTES + POINT_BYTES + sums, to_receiver=HELLO_BYTES + points)


def extension_traffic(params: OtParams, count: int) -> Traffic:
    """One ``extend(count)``."""
    return Traffic(to_sender=rounded(count) // 8 * params.extension_bits, to_receiver=0)


def exchange_traffic(shapes: Sequence[Shape]) -> Traffic:
    """One ``exchange``, its COTs not counted."""
    return Traffic(
        to_sender=sum(shape.choice_bytes for shape in shapes),
        to_receiver=sum(shape.answer_bytes(shape.count) for shape in shapes),
    )


def bits_per_transfer(params: OtParams, shape: Shape) -> tuple[float, float]:
    """Bits of one transfer to the sender and to the receiver, its COTs included."""
    return shape.index_bits * (params.extension_bits + 1.0), float(shape.answer_bits)
