"""Matrix products from prepared ones: a few bytes an entry online, whatever the other factor.

Beaver, Efficient Multiparty Protocols Using Circuit Randomization (CRYPTO 1991), with matrices as
in Mohassel and Zhang, SecureML (IEEE S&P 2017), section 4.1. Masks a, b are uniform and known to
nobody, and their product is shared ahead of time. Both parties learn x - a and y - b, which are
uniform, and then

    x y = (x - a)(y - b) + (x - a) b + a (y - b) + a b

is local. A cached key or value is opened once, under one mask, for all queries to come; only
products of *masks* are prepared for each pair. A mask must never open a second value: the
difference of two openings is that of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from otpipe.secure.operations import SecureOperations
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share, reduced


class Mask:
    """A secret uniform tensor that opens one value.

    Attributes:
        share: of the mask.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self._used = False

    def spend(self) -> Share:
        """The share, once.

        Raises:
            RuntimeError: the mask has opened a value before.
        """
        if self._used:
            raise RuntimeError(
                "A mask opens one value; a second one would reveal their difference."
            )
        self._used = True
        return self.share


@dataclass(frozen=True, eq=False, repr=False)
class Opened:
    """A secret x (B, I, K) as the public x - a and shares of a, in one ring.

    Attributes:
        difference: int64 in [0, 2^bits), known to both parties.
        mask: share of a.
        frac: scale of x.
    """

    difference: Tensor
    mask: Share
    frac: int

    def transpose(self, dim0: int, dim1: int) -> Opened:
        """As ``Tensor.transpose``."""
        return Opened(
            self.difference.transpose(dim0, dim1), self.mask.transpose(dim0, dim1), self.frac
        )


def open_masked(ops: SecureOperations, x: Share, mask: Mask) -> Step[Opened]:
    """Open x under a mask of its shape and ring. 1 round.

    Raises:
        ValueError: the mask does not fit.
        RuntimeError: it has been used.
    """
    if (mask.share.shape, mask.share.bits) != (x.shape, x.bits):
        raise ValueError(f"A mask {mask.share!r} does not fit {x!r}.")
    own = mask.spend()
    difference = yield from ops.swap(x.at_frac(0) - own.at_frac(0))
    return Opened(difference, own.at_frac(0), x.frac)


def prepare_product(ops: SecureOperations, a_BIK: Mask, b_BKJ: Mask) -> Step[Share]:
    """Shares of a b for two masks, by OT, ahead of time; see ``SecureOperations.matmul``."""
    return ops.matmul(a_BIK.share, b_BKJ.share, a_BIK.share.bits)


def multiply_opened(
    ops: SecureOperations, x_BIK: Opened, y_BKJ: Opened, product_BIJ: Share
) -> Share:
    """Shares of x y mod 2^bits, from shares of the product of their masks; local."""
    bits = product_BIJ.bits
    local = ring_matmul(x_BIK.difference, reduced(y_BKJ.mask.data, bits), bits)
    local = local + ring_matmul(reduced(x_BIK.mask.data, bits), y_BKJ.difference, bits)
    known = ring_matmul(x_BIK.difference, y_BKJ.difference, bits)
    total = Share.of(local + product_BIJ.data, bits, x_BIK.frac + y_BKJ.frac)
    return ops.add_public(total, known)
