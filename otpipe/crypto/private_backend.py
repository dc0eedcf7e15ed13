"""What ``PrivateEvaluator`` asks of the code for one kind of device.

``private_cpu`` has compiled kernels, ``private_torch`` torch operations for CUDA. Both do the same
integer arithmetic, so that equal secrets give equal bytes; the torch one runs on any device and is
what the compiled one is tested against.

Shape suffixes: J polynomials of a block, N ring degree, R outputs, G answers, g outputs of one
answer, D = 16 digits. Sums are int64 (G, P, 2, N): parts P = 2 (A and B), then limbs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import MaskStream

#: groups of digits of a residue, ``wide.QUARTER_DIGITS`` each
QUARTERS = 4


class Backend(Protocol):
    """What differs between devices."""

    @staticmethod
    def tile_answers(packing: PrivatePacking) -> int:
        """Answers that are worth making at once."""

    @staticmethod
    def tile_bytes(packing: PrivatePacking) -> int:
        """Temporary memory of one tile, beyond its sums."""

    def new_planes(self, inputs: int) -> Tensor:
        """Room for the digits of so many inputs."""

    def new_public(self, count: int) -> Tensor:
        """Host memory for the digits of public polynomials, int8 (J, D, N)."""

    def new_sums(self, num_answers: int) -> Tensor:
        """Zero sums of so many answers: int64 (G, P, 2, N)."""

    def set_key(self, public_digits: Tensor, packed: Tensor) -> None:
        """Take a_0, int8 (1, D, N), and b_0, uint8 (1, N, 16)."""

    def stage_digits(self, digits_JDN: Tensor, planes: Tensor, first_row: int) -> None:
        """Digits of X^(-wT) a for public polynomials."""

    def stage_bytes(self, packed_JNB: Tensor, planes: Tensor, first_row: int) -> None:
        """Digits of X^(-wT) b for uploaded polynomials, uint8 (J, N, 16)."""

    def accumulate(
        self, weight_Rn: Tensor, multipliers_R: Tensor, planes: Tensor, sums: Tensor, part: int
    ) -> None:
        """sums[:, part] += c W x for the first n staged inputs x, g outputs to an answer."""

    def finish(self, sums: Tensor, first_answer: int, masks: MaskStream) -> Tensor:
        """Re-randomise, flood, mask and round sums (G, P, 2, N): uint8 CPU (G, answer_bytes)."""
