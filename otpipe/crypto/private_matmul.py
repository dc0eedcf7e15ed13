"""Shares of X Y mod 2^k, X the server's matrix of ring elements and Y the client's, ahead of time.

The oblivious linear evaluation of docs/private_preprocessing.md with ring elements in place of int8
weights: X is written in signed digits X = sum_i 2^(d i) X_i, and the client encrypts 2^(d i) Y for
every i, so that X Y = sum_i X_i (2^(d i) Y) is one product with the (m, n * digits) matrix of all
digits. A digit is what one ciphertext is multiplied by, so it bounds the noise; it is worked off in
*levels* of 7 bits, int8 products of the same ciphertexts (``DigitEvaluator``), which cost time and
no bytes. Re-randomisation, flooding and masks are those of ``PrivateEvaluator``, unchanged.

Bounds: ``private_matmul_noise``. The argument: docs/attention_products.md.

Shape suffixes: m rows of X, n columns of X and rows of Y, T columns of Y (slots), p = n * digits,
J polynomials of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import (
    MIN_SLOTS,
    PrivatePacking,
    PrivateParams,
    choose_packing,
)
from otpipe.crypto.private_rlwe import PrivateSecret, decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.errors import ParameterError

_LEVEL_BITS = 7
#: polynomials that are encrypted and sent at once: 4 MB
UPLOAD_BLOCK = 32
#: bytes of answers that are made and sent at once
ANSWER_BLOCK_BYTES = 4 << 20
#: |multiplier * (p_0 + 2^8 p_1 + 2^16 p_2 + 2^24 p_3)| < 2^62 for |p| <= 2^13 * inputs
_MAX_LOG2_LEVEL_TIMES_INPUTS = 24


@dataclass(frozen=True, kw_only=True)
class MatmulParams(PrivateParams):
    """A private set, and the digits of the matrices that go with it.

    Attributes:
        digit_bits: bits of a signed digit of the server's matrix.

    Raises:
        ParameterError: the set lies outside the table, or its answers would not decrypt.
    """

    digit_bits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.digit_bits <= self.log2_p:
            raise ParameterError(
                f"Private set {self.name!r} has digits of {self.digit_bits} bits; use 1 to "
                f"{self.log2_p}, those of a message."
            )

    @property
    def num_digits(self) -> int:
        """Digits of a ring element."""
        return -(-self.log2_p // self.digit_bits)

    @property
    def num_levels(self) -> int:
        """int8 products for one digit."""
        return -(-self.digit_bits // _LEVEL_BITS)


MATMUL_PARAMS = (
    MatmulParams(
        name="product40", ring_degree=8192, log2_q=128, log2_p=40, first_bits=56, second_bits=48,
        flood_shift=22, digit_bits=20,
    ),
    MatmulParams(
        name="product51", ring_degree=8192, log2_q=128, log2_p=51, first_bits=64, second_bits=56,
        flood_shift=11, digit_bits=13,
    ),
)  # fmt: skip


def params_for_bits(bits: int) -> MatmulParams:
    """The smallest set whose messages hold a ring of ``bits`` bits.

    Raises:
        ParameterError: no set does.
    """
    for params in MATMUL_PARAMS:
        if bits <= params.log2_p:
            return params
    raise ParameterError(
        f"Matrix products mod 2^{bits} cannot be prepared; use a ring of up to "
        f"{MATMUL_PARAMS[-1].log2_p} bits."
    )


@dataclass(frozen=True)
class Piece:
    """Columns first .. first + count - 1 of Y, in one exchange of ``packing.num_slots`` slots."""

    first: int
    count: int
    packing: PrivatePacking


@dataclass(frozen=True)
class ProductPlan:
    """How X (m, n) times Y (n, T) is made: a pure function of sizes that both parties compute.

    Attributes:
        params: the set.
        rows, inner, columns: m, n and T.
    """

    params: MatmulParams
    rows: int
    inner: int
    columns: int

    def __post_init__(self) -> None:
        """Raise ParameterError for sizes whose integer products could overflow."""
        if min(self.rows, self.inner, self.columns) < 1:
            raise ParameterError(
                f"A product of ({self.rows}, {self.inner}) and ({self.inner}, {self.columns}) was "
                f"asked for; every side must be at least 1."
            )
        level = _LEVEL_BITS * (self.params.num_levels - 1)
        if self.inputs << level >= 1 << _MAX_LOG2_LEVEL_TIMES_INPUTS:
            raise ParameterError(
                f"Set {self.params.name!r} multiplies rows of fewer than "
                f"{(1 << (_MAX_LOG2_LEVEL_TIMES_INPUTS - level)) // self.params.num_digits} "
                f"elements, not {self.inner}; split the inner dimension."
            )

    @property
    def inputs(self) -> int:
        """p, coordinates that are encrypted for each column."""
        return self.inner * self.params.num_digits

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The exchanges: powers of two of slots, padded where that is less than half empty."""
        found: list[Piece] = []
        first = 0
        while first < self.columns:
            rest = self.columns - first
            slots = max(MIN_SLOTS, min(self.params.ring_degree, 1 << (rest.bit_length() - 1)))
            if 2 * rest > 3 * slots and 2 * slots <= self.params.ring_degree:
                slots *= 2
            packing = choose_packing(self.params, self.inputs, self.rows, slots)
            found.append(Piece(first, min(slots, rest), packing))
            first += slots
        return tuple(found)

    @property
    def upload_bytes(self) -> int:
        """Client to server."""
        return sum(piece.packing.upload_total(self.inputs) for piece in self.pieces)

    @property
    def download_bytes(self) -> int:
        """Server to client."""
        return sum(piece.packing.download_total(self.rows) for piece in self.pieces)


# --- client -------------------------------------------------------------------------------------


def upload(
    secret: PrivateSecret, plan: ProductPlan, piece: Piece, a_key: bytes, index: int, y_nT: Tensor
) -> Iterator[NDArray[np.uint8]]:
    """The client's message: blocks uint8 (J, N, 16), first the key, then the digits' multiples.

    y_nT: int64 (n, columns of the plan) in [0, 2^k), CPU.
    index: different for every piece under one a_key.

    Raises:
        SecretReused: the index was used before under this secret and a_key.
    """
    params, packing = plan.params, piece.packing
    yield encrypt_key(secret, a_key, index)
    columns_Tn = y_nT[:, piece.first : piece.first + piece.count].t()
    step = UPLOAD_BLOCK * packing.inputs
    for lo in range(0, plan.inputs, step):
        coordinates = torch.arange(lo, min(lo + step, plan.inputs))
        shifts = coordinates // plan.inner * params.digit_bits
        multiples = columns_Tn[:, coordinates % plan.inner] << shifts
        r_Tp = np.zeros((packing.num_slots, len(coordinates)), np.uint64)
        r_Tp[: piece.count] = (multiples & ((1 << params.log2_p) - 1)).numpy().view(np.uint64)
        yield encrypt_block(secret, packing, a_key, index, 1 + lo // packing.inputs, r_Tp)


def client_share(
    secret: PrivateSecret, plan: ProductPlan, piece: Piece, answers: NDArray[np.uint8]
) -> Tensor:
    """The client's share of the piece's columns, int64 (m, count) in [0, 2^k).

    answers: uint8 (G, answer_bytes).

    Raises:
        ProtocolError: the answers have another shape.
    """
    results = decrypt_block(secret, piece.packing, answers, plan.rows)
    return torch.from_numpy(results[:, : piece.count].astype(np.int64))


# --- server -------------------------------------------------------------------------------------


def signed_digits(x: Tensor, params: MatmulParams) -> Tensor:
    """Signed digits int64 (m, n * digits) of ring elements (m, n), the lowest digit first.

    sum_i 2^(digit_bits * i) * digit_i = x mod 2^log2_p.
    """
    half = 1 << (params.digit_bits - 1)
    rest, found = x, []
    for _ in range(params.num_digits):
        digit = ((rest + half) & (2 * half - 1)) - half
        found.append(digit)
        rest = (rest - digit) >> params.digit_bits
    return torch.cat(found, 1)


def levels_of(digits: Tensor, params: MatmulParams) -> list[Tensor]:
    """int8 matrices w_l with digits = sum_l 2^(7 l) w_l, each in [-64, 63]."""
    half = 1 << (_LEVEL_BITS - 1)
    rest, found = digits, []
    for _ in range(params.num_levels):
        low = ((rest + half) & (2 * half - 1)) - half
        found.append(low.to(torch.int8))
        rest = (rest - low) >> _LEVEL_BITS
    return found


class DigitEvaluator(PrivateEvaluator):
    """``PrivateEvaluator`` for a matrix of digits wider than int8. Not thread-safe; one exchange.

    Args:
        levels: int8 (m, p), as ``levels_of`` gives them.
        packing, map_index, a_key, masks: as there.

    Raises:
        MaskReused: the masks hid another exchange before.
    """

    def __init__(
        self,
        levels: Sequence[Tensor],
        packing: PrivatePacking,
        map_index: int,
        a_key: bytes,
        masks: MaskStream,
    ) -> None:
        ones = torch.ones(len(levels[0]), dtype=torch.int64, device=levels[0].device)
        super().__init__(levels[0], ones, packing, map_index, a_key, masks)
        self._levels = [(weight, ones << (_LEVEL_BITS * i)) for i, weight in enumerate(levels)]

    def _accumulate(self, first_answer: int, stop_answer: int, sums: Tensor) -> None:
        """All levels of the same ciphertexts, each at its power of two."""
        for weight, multipliers in self._levels:
            self._weight, self._multipliers = weight, multipliers
            super()._accumulate(first_answer, stop_answer, sums)


class ProductServer:
    """The server's side of one piece: takes the upload, gives the answers, keeps a share.

    Args:
        x_mn: int64 (m, n) in [0, 2^k), on the device that computes.
        plan, piece: what both parties agreed on.
        a_key: 32 bytes of the client.
        index: of the exchange, as the client used it.
    """

    def __init__(
        self, x_mn: Tensor, plan: ProductPlan, piece: Piece, a_key: bytes, index: int
    ) -> None:
        if x_mn.shape != (plan.rows, plan.inner):
            raise ValueError(f"A matrix {tuple(x_mn.shape)} came for a plan of {plan!r}.")
        self._plan, self._piece = plan, piece
        levels = levels_of(signed_digits(x_mn, plan.params), plan.params)
        # A key of its own for every exchange: the masks are this party's share.
        self._masks = MaskStream(fresh_mask_key(), index, plan.rows, plan.params.log2_p)
        self._evaluator = DigitEvaluator(levels, piece.packing, index, a_key, self._masks)

    def add_block(self, first: int, block: Tensor) -> None:
        """Polynomials first, first + 1, ..., uint8 (J, N, 16).

        Raises:
            ProtocolError: it is not the next block, or has another shape.
        """
        self._evaluator.add_block(first, block)

    def answers(self) -> Iterator[tuple[int, Tensor]]:
        """(first answer, uint8 (G, answer_bytes)) in order.

        Raises:
            ProtocolError: inputs are missing, or the answers were already taken.
        """
        return self._evaluator.answers(ANSWER_BLOCK_BYTES)

    def share(self) -> Tensor:
        """The server's share of the piece's columns, int64 (m, count) in [0, 2^k), CPU."""
        rows_Tm = self._masks.rows(0, self._piece.count)
        return torch.from_numpy(np.ascontiguousarray(rows_Tm.T))
