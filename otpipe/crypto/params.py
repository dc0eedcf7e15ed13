"""RLWE parameter sets and the published table that bounds them.

A set is accepted only inside the 128-bit classical column for ternary secrets of the Homomorphic
Encryption Standard (Albrecht et al., 2018, table 1); anything else raises ParameterError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from otpipe.errors import ParameterError

#: ring degree N -> largest log2(q) for 128-bit classical security, ternary secret, sigma = 3.2
#: (Homomorphic Encryption Standard, 2018, table 1)
STANDARD_MAX_LOG2_Q = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}

#: sigma = 8 / sqrt(2 pi), the error width of that table
STANDARD_ERROR_STD = 8 / math.sqrt(2 * math.pi)

#: evaluation accumulates modulo 2^64 and the client's exact products split q into two limbs
_MAX_IMPLEMENTED_LOG2_Q = 56


@dataclass(frozen=True, kw_only=True)
class StandardRing:
    """R_q = Z_q[X]/(X^N + 1), q = 2^log2_q, with the secret and error distributions of the table.

    Attributes:
        name: key in the table of sets it belongs to.
        ring_degree: N, a power of two; one polynomial holds N slots.
        log2_q: ciphertext modulus in bits.
        secret: distribution of t; only "ternary" (uniform in {-1, 0, 1}) is in the table.
        error_eta: centred binomial error, std sqrt(eta / 2); 21 gives 3.24, as in SEAL 4.
        security_bits: classical security claimed; only 128 is in the table.
        source: where the bound on (N, q) comes from.

    Raises:
        ParameterError: the set lies outside the table.
    """

    name: str
    ring_degree: int
    log2_q: int
    secret: str = "ternary"
    error_eta: int = 21
    security_bits: int = 128
    source: str = "Homomorphic Encryption Standard 2018, table 1 (ternary, 128-bit classical)"

    def __post_init__(self) -> None:
        largest = STANDARD_MAX_LOG2_Q.get(self.ring_degree)
        if largest is None:
            raise ParameterError(
                f"RLWE set {self.name!r} has ring degree {self.ring_degree}; "
                f"use one of {sorted(STANDARD_MAX_LOG2_Q)}."
            )
        if self.log2_q > largest:
            raise ParameterError(
                f"RLWE set {self.name!r} has a {self.log2_q}-bit modulus; degree "
                f"{self.ring_degree} is 128-bit secure up to {largest} bits."
            )
        if self.secret != "ternary" or self.security_bits != 128:
            raise ParameterError(
                f"RLWE set {self.name!r} claims {self.security_bits} bits with a {self.secret!r} "
                f"secret; the table here covers 128 bits with 'ternary'."
            )
        if self.error_std < STANDARD_ERROR_STD:
            raise ParameterError(
                f"RLWE set {self.name!r} has error width {self.error_std:.2f}; the table needs at "
                f"least {STANDARD_ERROR_STD:.2f} (error_eta 21)."
            )

    @property
    def num_planes(self) -> int:
        """Base-256 digits that cover q: planes of a public polynomial a_j."""
        return -(-self.log2_q // 8)

    @property
    def error_std(self) -> float:
        """Standard deviation of one error coefficient."""
        return math.sqrt(self.error_eta / 2)

    @property
    def log2_heavy_secret(self) -> float:
        """Chernoff bound on a ternary t with more than 3N/4 nonzeros (the mean is 2N/3)."""
        divergence = 0.75 * math.log(0.75 * 1.5) + 0.25 * math.log(0.25 * 3)
        return -self.ring_degree * divergence / math.log(2)


@dataclass(frozen=True, kw_only=True)
class RlweParams(StandardRing):
    """Secret-key RLWE for public weights: messages mod p = 2^log2_p.

    Attributes:
        log2_p: message modulus in bits: 8 or 32, the ring of the map it serves.
        answer_bits: bits per coefficient of an answer after modulus switching, whole bytes.
        upload_bytes: widths in which b may be sent, ascending; the last one holds all of q.

    Raises:
        ParameterError: the set lies outside the table or cannot work.
    """

    log2_p: int
    answer_bits: int
    upload_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.log2_p < self.answer_bits < self.log2_q <= _MAX_IMPLEMENTED_LOG2_Q:
            raise ParameterError(
                f"RLWE set {self.name!r} has p, answer and q of {self.log2_p}, {self.answer_bits} "
                f"and {self.log2_q} bits; they must increase, up to {_MAX_IMPLEMENTED_LOG2_Q}."
            )
        if self.log2_p not in (8, 32) or self.answer_bits % 8:
            raise ParameterError(
                f"RLWE set {self.name!r} has {self.log2_p}-bit messages and {self.answer_bits}-bit "
                f"answers; messages have 8 or 32 bits and answers whole bytes."
            )
        widths = self.upload_bytes
        if not widths or sorted(set(widths)) != list(widths) or widths[-1] != self.num_planes:
            raise ParameterError(
                f"RLWE set {self.name!r} offers upload widths {widths}; list them ascending, the "
                f"last one {self.num_planes} bytes."
            )

    @property
    def answer_bytes(self) -> int:
        """Bytes per coefficient of an answer."""
        return self.answer_bits // 8

    @property
    def message_dtype(self) -> np.dtype[np.unsignedinteger]:
        """Storage of pads and results: uint8 or uint32."""
        return np.dtype(np.uint8 if self.log2_p == 8 else np.uint32)

    def dropped_upload_bits(self, upload_bytes: int) -> int:
        """Low bits of b that are rounded away when it travels in ``upload_bytes`` bytes."""
        if upload_bytes not in self.upload_bytes:
            raise ParameterError(
                f"RLWE set {self.name!r} was asked for {upload_bytes} upload bytes; "
                f"use one of {self.upload_bytes}."
            )
        return max(0, self.log2_q - 8 * upload_bytes)

    def pack_factor(self, num_slots: int) -> int:
        """Output ciphertexts that share one answer polynomial in a batch of ``num_slots``."""
        if not 1 <= num_slots <= self.ring_degree or num_slots & (num_slots - 1):
            raise ParameterError(
                f"A batch of {num_slots} slots does not fit RLWE set {self.name!r}; use a power "
                f"of two up to {self.ring_degree}."
            )
        return self.ring_degree // num_slots


RLWE_PARAMS = {
    params.name: params
    for params in (
        RlweParams(
            # One bit below the table: later estimates ("Security Guidelines for Implementing
            # Homomorphic Encryption", ePrint 2024/463) are slightly more careful at this degree.
            name="ring32", ring_degree=2048, log2_q=53, log2_p=32, answer_bits=40,
            upload_bytes=(6, 7),
        ),
        RlweParams(
            name="ring8", ring_degree=2048, log2_q=32, log2_p=8, answer_bits=16,
            upload_bytes=(4,),
        ),
    )
}  # fmt: skip


def params_for_ring(ring_bits: int) -> RlweParams:
    """The parameter set that prepares pads modulo 2^ring_bits."""
    for params in RLWE_PARAMS.values():
        if params.log2_p == ring_bits:
            return params
    raise ParameterError(
        f"No RLWE set has {ring_bits}-bit messages; "
        f"use {sorted(params.log2_p for params in RLWE_PARAMS.values())}."
    )
