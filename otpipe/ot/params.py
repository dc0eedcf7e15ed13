"""Parameter sets of an OT session, with the bounds they rest on.

``OT_PARAMS`` is the one table. ``docs/ot.md`` explains the numbers; a test recomputes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from otpipe.errors import ParameterError

BLOCK_BYTES = 16
"""A COT, a pad block and an AES block have 128 bits."""

COT_ROUNDING = 2048
"""COTs are made in multiples of this: whole groups of AES blocks for each leaf."""

MAX_INDEX_BITS = 8
MAX_WORD_BITS = 64
MAX_MESSAGE_BITS = 1 << 14
"""Of one message of one transfer, over all its words."""


@dataclass(frozen=True)
class OtParams:
    """One set: base OTs, extension, hash, and how much a session may use them.

    Attributes:
        name: key in ``OT_PARAMS``.
        k: SoftSpokenOT's field exponent: leaves of a tree 2^k, bits sent for each COT about 128/k.
            1 is IKNP.
        kappa: bits of Delta, of a seed and of a COT; 128 base OTs.
        group: of the base OTs; prime order, so that a point on the curve is a point of the group.
        log2_epoch: COTs under one key of the hash's permutation.
        log2_max_cots: COTs of a session.
        source: where the constructions and bounds come from.

    Raises:
        ParameterError: the set lies outside what the sources and the implementation cover.
    """

    name: str
    k: int
    kappa: int = 128
    group: str = "P-256"
    log2_epoch: int = 16
    log2_max_cots: int = 40
    source: str = (
        "base OT: Masny, Rindal, Endemic Oblivious Transfer (CCS 2019), 128 bits from CDH on P-256 "
        "(FIPS 186-5, SP 800-57 part 1, table 2); extension: Roy, SoftSpokenOT (CRYPTO 2022), "
        "semi-honest; hash: Guo, Katz, Wang, Yu (IEEE S&P 2020), section 7.4"
    )

    def __post_init__(self) -> None:
        if self.kappa != 128 or self.group != "P-256":
            raise ParameterError(
                f"OT set {self.name!r} asks for {self.kappa} bits over {self.group}; "
                f"use 128 bits over P-256."
            )
        if not 1 <= self.k <= 8:
            raise ParameterError(f"OT set {self.name!r} has k = {self.k}; use 1 (IKNP) to 8.")
        if not 10 <= self.log2_epoch <= self.log2_max_cots or not 11 <= self.log2_max_cots <= 40:
            raise ParameterError(
                f"OT set {self.name!r} has 2^{self.log2_epoch} COTs a hash key and "
                f"2^{self.log2_max_cots} a session; "
                f"keep 10 <= epoch <= session and 11 <= session <= 40."
            )

    @property
    def tree_depths(self) -> tuple[int, ...]:
        """Levels of each tree: k, and in the last one what is left of 128."""
        whole, rest = divmod(self.kappa, self.k)
        return (self.k,) * whole + ((rest,) if rest else ())

    @property
    def num_trees(self) -> int:
        """Length of the repetition code."""
        return len(self.tree_depths)

    @property
    def num_leaves(self) -> int:
        """Seeds of all trees."""
        return sum(1 << depth for depth in self.tree_depths)

    @property
    def extension_bits(self) -> int:
        """Bits that the receiver sends for one COT: one for each tree but the first."""
        return self.num_trees - 1

    @property
    def max_cots(self) -> int:
        """COTs of a session."""
        return 1 << self.log2_max_cots

    @property
    def epoch_cots(self) -> int:
        """COTs under one key of the hash's permutation."""
        return 1 << self.log2_epoch

    def log2_pads_per_epoch(self, blocks: int = 1) -> float:
        """log2 of the most pad blocks unknown to the receiver that one permutation produces.

        A 1-of-2^b transfer uses b COTs and leaves 2^b - 1 pads unknown: most per COT at b = 8.
        """
        per_cot = max(((1 << b) - 1) / b for b in range(1, MAX_INDEX_BITS + 1))
        return self.log2_epoch + math.log2(per_cot * blocks)

    def log2_hash_advantage(self, log2_work: float, blocks: int = 1) -> float:
        """log2 of 4 q (p + Q) / 2^128, the bound on telling any pad of a session from uniform.

        q unknown pad blocks under one permutation, Q in the session, p = 2^log2_work evaluations
        of AES by the adversary (``docs/ot.md``, section 5).
        """
        log2_q = self.log2_pads_per_epoch(blocks)
        log2_total = log2_q + self.log2_max_cots - self.log2_epoch
        log2_sum = max(log2_work, log2_total) + math.log2(1 + 2.0 ** -abs(log2_work - log2_total))
        return 2 + log2_q + log2_sum - self.kappa

    def log2_stream_advantage(self, log2_work: float) -> float:
        """log2 of the bound on telling the unknown leaf streams of a session from uniform.

        The unknown AES-128 keys are the leaf of each tree and the nodes above it, one a level: p
        keys tried against all of them, since all encrypt the same counters. Besides, the birthday
        bound of counter mode on 2^log2_max_cots / 128 blocks of each leaf.
        """
        blocks = self.log2_max_cots - 7
        birthday = math.log2(self.num_trees) + 2 * blocks - 1 - 128
        search = math.log2(self.num_trees + self.kappa) + log2_work - 128
        return max(birthday, search) + math.log2(1 + 2.0 ** -abs(birthday - search))


OT_PARAMS = {params.name: params for params in (OtParams(f"softspoken{k}", k) for k in range(1, 9))}

DEFAULT_OT_PARAMS = OT_PARAMS["softspoken4"]
"""31 bits and 4 AES blocks for one COT; the others trade one against the other."""
