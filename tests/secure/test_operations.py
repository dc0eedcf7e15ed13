"""Every operation on both parties against the reference, and its cost against what was sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operation_cases import CASES, Case
from two_parties import connect, integers

from otpipe.ot import DEFAULT_OT_PARAMS
from otpipe.ot.costs import extension_traffic
from otpipe.secure import PlainOperations, Share, cost_of
from otpipe.secure.cost import operand


def assert_close(case: Case, got: Any, want: Any) -> None:
    if isinstance(got, list):
        for one, other in zip(got, want, strict=True):
            assert_close(case, one, other)
        return
    assert (got.bits, got.frac, got.shape) == (want.bits, want.frac, want.shape)
    if got.bits == 1:
        assert torch.equal(got.data, want.data)
        return
    apart = integers(Share.of(got.data - want.data, got.bits)).abs()
    allowed = case.units + case.relative * integers(want).abs().double()
    assert bool((apart <= allowed).all()), f"{int(apart.max())} units"


@pytest.mark.parametrize("kind", ["ideal", "real"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference_at_the_computed_cost(case: Case, kind: str) -> None:
    """The secret results agree, and rounds and bytes are those that ``cost_of`` computes."""
    parties = connect(kind)
    secrets = case.secrets(2000 if kind == "ideal" else 60)
    before = parties.traffic()
    got = parties.compute(case.program, *secrets)
    after = parties.traffic()
    plain = PlainOperations()
    assert_close(case, got, plain.run(case.program(plain, *secrets)))

    cost = cost_of(
        lambda ops: case.program(ops, *(operand(x.shape, x.bits, x.frac) for x in secrets))
    )
    spent = {name: after[name] - before[name] for name in after}
    assert cost.rounds == case.rounds == spent["rounds"]
    assert (cost.to_server, cost.to_client) == (spent["to_server"], spent["to_client"])
    if parties.ideal is not None:
        assert cost.cots == parties.ideal.cots
    else:
        # The pool is extended in blocks, at most once a round.
        exact = cost.extension_bytes
        block = extension_traffic(DEFAULT_OT_PARAMS, 1).to_sender
        assert exact <= spent["extension_bytes"] <= exact + block * max(1, cost.rounds)


def test_costs_of_the_docstrings() -> None:
    """The formulae of ``SecureOperations`` give what the code counts (c + 1 = 32)."""

    def bits(program: Any, *operands: Share) -> float:
        cost = cost_of(lambda ops: program(ops, *operands))
        return 8 * cost.total_bytes

    n, m, L = 20, 22, 40
    count = 64  # whole bytes in every request

    def gilboa(factor_bits: int, width: int) -> int:
        """Bits that a product sends to the client: bit j matters mod 2^(width - j)."""
        return sum(width - j for j in range(min(factor_bits, width)))

    x, y, c = operand((count,), n), operand((count,), m), operand((count,), 1)
    assert bits(lambda o: o.rescale(x, 5, 20)) == count * (32 + 5)
    assert bits(lambda o: o.select(c, x, n)) == count * ((n + 1) * 32 + n + gilboa(n, n))
    assert bits(lambda o: o.select(c, x, L)) == count * (
        (n + 3) * 32 + L + gilboa(n, L) + 4 * (L - n)
    )
    cross = (n + m) * 32 + gilboa(n, L) + gilboa(m, L)
    wraps = sum((q + 1) * 32 + q + gilboa(q, q) for q in (L - n, L - m))
    assert bits(lambda o: o.mul(x, y, L)) == count * (cross + wraps)
    q = 39 - n - 1
    square = n * 32 + gilboa(n, 38) + (q + 1) * 32 + q + gilboa(q, q)
    assert bits(lambda o: o.square_sum(x, 39)) == count * square
    a, b = operand((2, 3, 8), L), operand((2, 8, 4), L)
    entries = 2 * 3 * 4 * 8
    assert bits(lambda o: o.matmul(a, b, L)) == L * 32 * 2 * 8 * (3 + 4) + entries * 2 * gilboa(
        L, L
    )
    digits = [4, 4, 4, 1]
    leaves = sum(w * 32 + (1 + (i > 0)) * 2**w for i, w in enumerate(digits))
    assert bits(lambda o: o.is_negative(operand((count,), 14))) == count * (leaves + 6 * 32 + 64)
    rows, r = operand((count, 8), 21), operand((count,), L)
    each = 21 * 32 + gilboa(21, L) + gilboa(L, L)
    q = L - 21
    wrap = (q + 1) * 32 + q + gilboa(q, q)
    assert bits(lambda o: o.mul_rows(r, rows, L)) == count * (8 * (each + wrap) + L * 32)
    fields = cost_of(lambda o: o.lookup(x, 6, lambda base: [base, base], (3, 9)))
    assert 8 * fields.total_bytes == count * (6 * 32 + 64 * 12)
