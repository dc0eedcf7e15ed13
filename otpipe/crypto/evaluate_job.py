"""What an evaluation is about, whatever the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from otpipe.crypto.params import RlweParams


@dataclass(frozen=True)
class Part:
    """One half of a ciphertext: digit planes kept, and the bits its digits are shifted up."""

    num_planes: int
    shift: int


@dataclass(frozen=True)
class EvaluationJob:
    """One map and one batch.

    Attributes:
        weight: (m, n) int8 on the device that computes, any strides.
        params, map_index, a_key: as the client announced them.
        pack: g, outputs in one answer ciphertext.
        upload_bytes, dropped_bits: width of the coefficients of b, and what it lacks.
        capacity: inputs whose digits are kept at a time.
        keeps_inputs: capacity is n; otherwise sums of all outputs are kept.
    """

    weight: Tensor
    params: RlweParams
    map_index: int
    a_key: bytes
    pack: int
    upload_bytes: int
    dropped_bits: int
    capacity: int
    keeps_inputs: bool

    @property
    def num_outputs(self) -> int:
        """m."""
        return self.weight.shape[0]

    @property
    def num_groups(self) -> int:
        """Answer ciphertexts."""
        return -(-self.num_outputs // self.pack)

    @property
    def group_shape(self) -> tuple[int, int, int]:
        """Of one answer ciphertext, uint8."""
        return 2, self.params.ring_degree, self.params.answer_bytes

    @property
    def group_bytes(self) -> int:
        """Size of one answer ciphertext."""
        return 2 * self.params.ring_degree * self.params.answer_bytes

    @cached_property
    def parts(self) -> tuple[Part, Part]:
        """Digits of a and of b."""
        return Part(self.params.num_planes, 0), Part(self.upload_bytes, self.dropped_bits)

    def rows_of(self, first_group: int, stop_group: int) -> tuple[int, int]:
        """First and last (exclusive) output of consecutive groups."""
        return first_group * self.pack, min(self.num_outputs, stop_group * self.pack)

    def tiles(self, num_groups: int, rows: int) -> Iterator[tuple[int, int]]:
        """Cut ``num_groups`` into nearly equal tiles of at most ``rows`` outputs (or one group)."""
        most = max(1, rows // self.pack)
        count = -(-num_groups // most)
        for tile in range(count):
            yield num_groups * tile // count, num_groups * (tile + 1) // count
