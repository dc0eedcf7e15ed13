"""The secure operations: one interface for the plaintext reference, the client and the server.

A program of these operations is written once and run by each of them. Operations that take
messages are steps (see ``rounds``); linear ones with public coefficients are methods of ``Share``.

Notation: n = bits of the operand's ring, L = ``bits`` = bits of the result's ring, b = index bits,
c = bits the client sends to make one correlated OT (31 with SoftSpokenOT at k = 4). Costs are bits
for one element in both directions together; ``cost`` computes them from the code, and
docs/secure_operations.md tabulates them. An OT of b index bits and messages of w bits costs
b (c + 1) + 2^b w, a correlated OT of w bits c + 1 + w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share
from otpipe.secure.tables import FieldFunction, PiecewiseTable

T = TypeVar("T")


class SecureOperations(Protocol):
    """What a program on secrets may do. The three implementations agree up to stated roundings."""

    device: torch.device
    """Of all shares."""

    def run(self, step: Step[T]) -> T:
        """Run one step to its end; the other party runs the same one."""

    # --- local ----------------------------------------------------------------------------------

    def public(self, values: Tensor, bits: int, frac: int = 0) -> Share:
        """Public integers as a share: the server's part is the values, the client's zero."""

    def add_public(self, x: Share, values: Tensor | int) -> Share:
        """x plus public integers in units of x."""

    def random(self, shape: Sequence[int], bits: int, frac: int = 0) -> Share:
        """Secrets that are uniform in the ring and that nobody knows."""

    # --- ring and scale -------------------------------------------------------------------------

    def rescale(self, x: Share, shift: int, bits: int, *, nonnegative: bool = False) -> Step[Share]:
        """x / 2^shift in a ring of L bits: truncation, extension, or both at once.

        The result is x / 2^shift rounded down or up, with expectation x / 2^shift (up to one unit
        of x) over the randomness of the shares; exact for shift 0. Never off by a wrap.

        Range: -2^(n-2) <= x < 2^(n-2), or 0 <= x < 2^(n-1) with ``nonnegative``; where
        L <= n - shift (no high bits needed), any x, and the result is taken mod 2^L.
        Cost: none for L <= n - shift; else 1 round, c + 1 + (L - n + shift).
        Source: Cheetah (2022), section 3.2.3; local part: SiRnn (2021), truncate-and-reduce.

        Raises:
            ValueError: shift is negative or leaves less than 3 bits.
        """

    def shifted(self, x: Share, shifts: Sequence[int], bits: int) -> Share:
        """x / 2^shift mod 2^L for each shift, along the first dimension of x, which has size 1.

        As ``rescale`` without high bits: rounded down or up. A negative shift multiplies, exactly.
        The result has scale 2^0, since its rows differ. Local.

        Raises:
            ValueError: a shift leaves less than L bits.
        """

    def select(
        self, condition: Share, x: Share, bits: int, *, nonnegative: bool = False
    ) -> Step[Share]:
        """x where the shared bit is 1, else 0, in a ring of L bits; exact.

        condition: bits = 1, of the shape of x. Range of x as for ``rescale`` when L > n.
        Cost: 1 round; for L <= n: (L + 1)(c + 1) + L + L (L + 1) / 2; for L > n
        (n + 3)(c + 1) + L + n L - n (n - 1) / 2 + 4 (L - n).

        Raises:
            ValueError: condition is no bit an element.
        """

    # --- products -------------------------------------------------------------------------------

    def mul(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """x y elementwise mod 2^L, x in n bits, y in m bits; exact. The scales add up.

        Range: an operand in a ring smaller than L must be below 2^(n-2) in magnitude; L <= n + m.
        Cost: 1 round; (n + m)(c + 1) + (n + m) L - n (n - 1) / 2 - m (m - 1) / 2, and for each
        operand of n < L bits, q = L - n: (q + 1)(c + 1) + q + q (q + 1) / 2 (if q <= m).

        Raises:
            ValueError: shapes differ, or L > n + m.
        """

    def mul_rows(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """x (R,) times each row of y (R, w) mod 2^L; exact. x must live in L bits at least.

        Cost: 1 round; as ``mul`` of y with an operand of L bits, but the L (c + 1) bits of the
        OTs chosen by x are paid once a row.

        Raises:
            ValueError: shapes do not fit, or x lives in less than L bits.
        """

    def square_sum(self, x: Share, bits: int) -> Step[Share]:
        """Sum of x^2 along the last dimension mod 2^L, n < L <= 2n; exact. The scale doubles.

        Range: -2^(n-2) <= x < 2^(n-2).
        Cost: 1 round; n (c + 1) + n (L - 1) - n (n - 1) / 2, and with q = L - n - 1 > 0
        (q + 1)(c + 1) + q + q (q + 1) / 2.

        Raises:
            ValueError: L outside its range.
        """

    def matmul(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """(B, I, K) times (B, K, J) mod 2^L; exact. Both live in L bits at least.

        Cost: L (c + 1) B K (I + J) + B I J K L (L + 1); one round for every 2^26 values that the
        OTs bring.

        Raises:
            ValueError: shapes do not fit, or an operand lives in less than L bits.
        """

    # --- comparison -----------------------------------------------------------------------------

    def is_negative(self, x: Share) -> Step[Share]:
        """The bit x < 0; exact, for every x of the ring.

        Cost: 1 round for the digits, 1 for every fourfold of them (2 rounds up to 25 bits);
        every digit of w bits: w (c + 1) + 2^(w+1).
        """

    def less_than(self, x: Share, y: Share) -> Step[Share]:
        """The bit x < y; exact where x - y does not leave the signed range of the ring."""

    def max(self, x: Share) -> Step[Share]:
        """The largest of each row, (R, P) -> (R,); exact.

        Range: the difference of two members of a row stays in the signed range of the ring.
        Cost: 4 rounds (2 + AND + select) for every fourfold of P, rings up to 25 bits.
        """

    # --- tables ---------------------------------------------------------------------------------

    def lookup(
        self, x: Share, index_bits: int, function: FieldFunction, field_bits: Sequence[int]
    ) -> Step[list[Share]]:
        """function(x - d), one share a field, with some 0 <= d < 2^(n - index_bits).

        The function is given x - d mod 2^n. Which d is a matter of the shares: uniform.
        Cost: 1 round; b (c + 1) + 2^b * sum of field_bits.
        """

    def evaluate(self, x: Share, table: PiecewiseTable) -> Step[Share]:
        """The table's function at x, to the table's error and one unit of its result.

        Range: [low + 2^(W - b), low + 2^W) units. Outside, x is taken mod 2^W: the caller sees to
        it that the result is not used (see ``functions``).
        Cost: 1 round; b (c + 1) + 2^b * sum of the fields' bits + for each basis function of m
        bits, raw ring R: m (c + 1) + m R - m (m - 1) / 2.
        """

    # --- opening --------------------------------------------------------------------------------

    def swap(self, x: Share) -> Step[Tensor]:
        """The secret itself, int64 in [0, 2^n), to BOTH parties.

        Only for x under a fresh mask from ``random`` that is used for nothing else.
        Cost: 1 round; 2 n, rounded up to whole bytes each.
        """

    def reveal_to_client(self, x: Share) -> Step[Tensor | None]:
        """The signed secret, int64, to the client; None at the server. For the program's output.

        Cost: 1 round; n, rounded up to whole bytes.
        """

    def give_to_server(self, values: Tensor, bits: int) -> Step[Tensor | None]:
        """The client's integers mod 2^bits to the server, int64; None at the client.

        Only for values under a fresh mask. The server's ``values`` are ignored and give the shape.
        Cost: ``bits`` each, rounded up to whole bytes, in one message without an answer: no round
        of its own, whatever follows goes out with it.
        """
