"""Parameters of the preprocessing for private weights, and how a batch is packed.

Why this set and not a smaller one: docs/private_preprocessing.md, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from otpipe.crypto.params import StandardRing
from otpipe.errors import ParameterError
from otpipe.kernels import wide

#: the only modulus of the implementation: two 64-bit limbs, whose overflow is the reduction
_LOG2_Q = 128
#: most bits of the two parts of an answer; the first may be a whole limb
_MAX_FIRST_BITS, _MAX_SECOND_BITS = 64, 56
#: bits of the words that the flooding adds up, and how many it adds
FLOOD_WORD_BITS = 64
FLOOD_WORDS = 3
#: channel multipliers are integers from 0 to this
MAX_MULTIPLIER = wide.MAX_MULTIPLIER
#: fewest slots of a batch: fewer would not fill the 64-bit words in which answers are packed
MIN_SLOTS = 8


@dataclass(frozen=True, kw_only=True)
class PrivateParams(StandardRing):
    """RLWE with re-randomised, flooded answers, for weights that the client must not learn.

    Attributes:
        log2_p: ring bits k of pads and results.
        first_bits: bits per coefficient of the first part of an answer, whole bytes.
        second_bits: bits per coefficient of its second part, whole bytes.
        flood_shift: the flooding is (w_1 + w_2 + w_3) * 2^flood_shift, w_i uniform 64-bit words.

    Raises:
        ParameterError: the set lies outside the table or its answers would not decrypt.
    """

    log2_p: int
    first_bits: int
    second_bits: int
    flood_shift: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log2_q != _LOG2_Q:
            raise ParameterError(
                f"Private set {self.name!r} has a {self.log2_q}-bit modulus; use {_LOG2_Q}."
            )
        increase = 0 < self.log2_p < self.second_bits <= min(self.first_bits, _MAX_SECOND_BITS)
        if (
            not increase
            or self.first_bits > _MAX_FIRST_BITS
            or (self.first_bits % 8 or self.second_bits % 8)
        ):
            raise ParameterError(
                f"Private set {self.name!r} has {self.log2_p}-bit messages and answers of "
                f"{self.first_bits} and {self.second_bits} bits; the message must have the fewest "
                f"and the first part the most, up to {_MAX_FIRST_BITS} and {_MAX_SECOND_BITS}, "
                f"answers in whole bytes."
            )
        # The leakage bound needs the low bits, which the flooding leaves alone, to be rounded away.
        if not 0 < self.flood_shift < self.log2_q - self.first_bits:
            raise ParameterError(
                f"Private set {self.name!r} floods from bit {self.flood_shift}; use 1 to "
                f"{self.log2_q - self.first_bits - 1}, which rounding drops."
            )
        if self.allowed_rounding <= 0:
            raise ParameterError(
                f"Private set {self.name!r} floods {FLOOD_WORD_BITS + self.flood_shift} bits, "
                f"which leaves no room below a {self.log2_p}-bit message; flood less."
            )

    @property
    def delta_shift(self) -> int:
        """log2(Delta), Delta = q / p: where messages sit in a coefficient."""
        return self.log2_q - self.log2_p

    @property
    def upload_bytes(self) -> int:
        """Bytes per coefficient of b, unrounded: nothing about it depends on the weights."""
        return self.log2_q // 8

    @property
    def first_bytes(self) -> int:
        """Bytes per coefficient of the first part of an answer."""
        return self.first_bits // 8

    @property
    def second_bytes(self) -> int:
        """Bytes per coefficient of the second part of an answer."""
        return self.second_bits // 8

    @property
    def allowed_rounding(self) -> float:
        """Noise by rounding the first part that still decrypts, in its last place.

        Half a message, less the largest flooding, half a unit of the second part, and 2 units for
        everything else together: row sums of the errors and the noise of the re-randomisation are
        below 2^52 for 2^20 inputs, and the last place is at least 2^64.
        """
        unit = self.log2_q - self.first_bits
        flood = FLOOD_WORDS / 2 * 2.0 ** (FLOOD_WORD_BITS + self.flood_shift - unit)
        second = 2.0 ** (self.first_bits - self.second_bits - 1)
        return 2.0 ** (self.first_bits - self.log2_p - 1) - flood - second - 2


@dataclass(frozen=True)
class PrivatePacking:
    """How T slots of one map share polynomials of N coefficients.

    Attributes:
        params: the parameter set.
        num_slots: T, a power of two.
        inputs: v, input coordinates in one uploaded polynomial, a power of two.

    Coordinate j = v * J + w of all slots is X^(wT) r_j in polynomial J. Times X^(-wT) it comes to
    lie in coefficients 0 .. T-1, where W_ij r_j of all inputs adds up; other coordinates of the
    polynomial lie elsewhere. Output u of an answer is moved to X^(u v T), the garbage beside it
    reaches no further than v T - 1 coefficients, and only the T coefficients of each output leave
    the server.

    Raises:
        ParameterError: the numbers are no powers of two or do not fit N.
    """

    params: PrivateParams
    num_slots: int
    inputs: int

    def __post_init__(self) -> None:
        degree, slots = self.params.ring_degree, self.num_slots
        if not MIN_SLOTS <= slots <= degree or slots & (slots - 1):
            raise ParameterError(
                f"A batch of {slots} slots does not fit private set {self.params.name!r}; use a "
                f"power of two from {MIN_SLOTS} to {degree}."
            )
        if not 1 <= self.inputs <= degree // slots or self.inputs & (self.inputs - 1):
            raise ParameterError(
                f"{self.inputs} inputs a polynomial do not fit {slots} slots; use a power of two "
                f"up to {degree // slots}."
            )

    @property
    def stride(self) -> int:
        """Coefficients from one output of an answer to the next: v T."""
        return self.inputs * self.num_slots

    @property
    def outputs(self) -> int:
        """g, outputs that share one answer: N / (v T)."""
        return self.params.ring_degree // self.stride

    @property
    def answer_bytes(self) -> int:
        """Bytes of one answer: all N coefficients of the first part, g T of the second."""
        params = self.params
        useful = self.outputs * self.num_slots
        return params.ring_degree * params.first_bytes + useful * params.second_bytes

    def num_polynomials(self, in_features: int) -> int:
        """Polynomials uploaded for n inputs: the key (number 0) and ceil(n / v) of pads."""
        return 1 + -(-in_features // self.inputs)

    def num_answers(self, out_features: int) -> int:
        """Answers for m outputs: ceil(m / g)."""
        return -(-out_features // self.outputs)

    def upload_total(self, in_features: int) -> int:
        """Bytes uploaded for n inputs."""
        polynomial = self.params.ring_degree * self.params.upload_bytes
        return self.num_polynomials(in_features) * polynomial

    def download_total(self, out_features: int) -> int:
        """Bytes downloaded for m outputs."""
        return self.num_answers(out_features) * self.answer_bytes


PRIVATE_PARAMS = {
    params.name: params
    for params in (
        # q = 2^128 also lies inside the 192-bit column of the table (152 bits at this degree), and
        # of the later estimates of ePrint 2024/463 (214 bits for 128-bit security).
        PrivateParams(
            name="private44", ring_degree=8192, log2_q=128, log2_p=44, first_bits=56,
            second_bits=48, flood_shift=18,
        ),
    )
}  # fmt: skip


def choose_packing(
    params: PrivateParams, in_features: int, out_features: int, num_slots: int
) -> PrivatePacking:
    """The packing that moves the fewest bytes for one map and T slots.

    A pure function of public sizes: client and server call it and agree.

    Raises:
        ParameterError: num_slots does not fit the set.
    """
    best = PrivatePacking(params, num_slots, 1)
    best_bytes = best.upload_total(in_features) + best.download_total(out_features)
    inputs = 2
    while inputs <= params.ring_degree // num_slots:
        packing = PrivatePacking(params, num_slots, inputs)
        total = packing.upload_total(in_features) + packing.download_total(out_features)
        if total < best_bytes:
            best, best_bytes = packing, total
        inputs *= 2
    return best
