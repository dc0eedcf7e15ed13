"""One list of operations that every implementation runs: the reference, and both parties.

A case makes secrets and says by how many units of the result the parties may differ from the
reference. Values go to the edges of the stated range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from two_parties import Program, secret, uniform

from otpipe.secure import Share
from otpipe.secure.functions import exp, reciprocal, reciprocal_sqrt, silu


@dataclass(frozen=True)
class Case:
    """``secrets`` are made from a number of elements; ``rounds`` is what the docstring promises."""

    name: str
    program: Program
    secrets: Callable[[int], list[Share]] = field(hash=False)
    rounds: int
    units: int = 0
    relative: float = 0.0


def edged(n: int, low: int, high: int) -> Tensor:
    """n integers of [low, high): both ends, around 0, and uniform ones."""
    values = uniform((n,), low, high)
    edges = torch.tensor([low, high - 1, 0, -1, 1, low + 1, high - 2])
    edges = edges.clamp(low, high - 1)[:n]
    values[: len(edges)] = edges
    return values


def _bits(n: int) -> Share:
    return secret(uniform((n,), 0, 2), 1)


def _one(low: int, high: int, bits: int, frac: int = 0) -> Callable[[int], list[Share]]:
    return lambda n: [secret(edged(n, low, high), bits, frac)]


def _two(bits: int) -> Callable[[int], list[Share]]:
    half = 1 << (bits - 2)

    def make(n: int) -> list[Share]:
        x = edged(n, -half, half)
        return [secret(x, bits, 3), secret(x.flip(0).roll(3), bits, 5)]

    return make


def _rows(bits: int, width: int = 25) -> Callable[[int], list[Share]]:
    half = 1 << (bits - 2)
    return lambda n: [secret(edged(-(-n // width) * width, -half, half).view(-1, width), bits)]


def _factor_and_rows(n: int) -> list[Share]:
    rows = max(2, n // 25)
    return [
        secret(edged(rows, -(1 << 20), 1 << 20), 44, 7),
        secret(edged(rows * 25, -(1 << 19), 1 << 19).view(rows, 25), 21, 2),
    ]


def _matrices(n: int) -> list[Share]:
    inner = max(2, n // 20)
    return [
        secret(edged(2 * 3 * inner, -(1 << 15), 1 << 15).view(2, 3, inner), 40, 1),
        secret(edged(2 * inner * 4, -(1 << 15), 1 << 15).view(2, inner, 4), 41, 2),
    ]


def _select_secrets(n: int) -> list[Share]:
    return [_bits(n), secret(edged(n, -(1 << 18), 1 << 18), 20, 4)]


def _magnitudes(low: float, high: float, bits: int, frac: int) -> Callable[[int], list[Share]]:
    def make(n: int) -> list[Share]:
        exponents = torch.linspace(low, high, n, dtype=torch.float64)
        exponents += uniform((n,), 0, 1 << 20) * ((high - low) / n * 2.0**-20)
        values = (2.0**exponents).round().to(torch.int64)
        return [secret(values.clamp(1 << int(low), (1 << int(high)) - 1), bits, frac)]

    return make


def _squares(base: Tensor) -> list[Tensor]:
    return [base & 7, base >> 5]


CASES = (
    Case("truncate", lambda o, x: o.rescale(x, 5, 20), _one(-(1 << 18), 1 << 18, 20), 1, 1),
    Case("extend", lambda o, x: o.rescale(x, 0, 40), _one(-(1 << 18), 1 << 18, 20), 1),
    Case(
        "extend_nonnegative",
        lambda o, x: o.rescale(x, 0, 40, nonnegative=True),
        _one(0, 1 << 19, 20),
        1,
    ),
    Case(
        "truncate_and_extend",
        lambda o, x: o.rescale(x, 9, 44),
        _one(-(1 << 38), 1 << 38, 40, 12),
        1,
        1,
    ),
    Case("shorten", lambda o, x: o.rescale(x, 9, 31), _one(-(1 << 38), 1 << 38, 40), 0, 1),
    Case("select", lambda o, c, x: o.select(c, x, 20), _select_secrets, 1),
    Case("select_to_larger", lambda o, c, x: o.select(c, x, 33), _select_secrets, 1),
    Case("select_to_smaller", lambda o, c, x: o.select(c, x, 11), _select_secrets, 1),
    Case("mul", lambda o, x, y: o.mul(x, y, 40), _two(20), 1),
    Case("mul_to_36", lambda o, x, y: o.mul(x, y, 36), _two(20), 1),
    Case("mul_in_one_ring", lambda o, x, y: o.mul(x, y, 30), _two(30), 1),
    Case("mul_to_smaller", lambda o, x, y: o.mul(x, y, 17), _two(30), 1),
    Case("mul_rows", lambda o, x, y: o.mul_rows(x, y, 43), _factor_and_rows, 1),
    Case("square_sum", lambda o, x: o.square_sum(x, 48), _rows(24), 1),
    Case("square_sum_narrow", lambda o, x: o.square_sum(x, 25), _rows(24), 1),
    Case("matmul", lambda o, x, y: o.matmul(x, y, 40), _matrices, 1),
    Case("is_negative", lambda o, x: o.is_negative(x), _one(-(1 << 13), 1 << 13, 14), 2),
    Case("is_negative_2_bits", lambda o, x: o.is_negative(x), _one(-2, 2, 2), 1),
    Case("is_negative_25_bits", lambda o, x: o.is_negative(x), _one(-(1 << 24), 1 << 24, 25), 2),
    Case("is_negative_50_bits", lambda o, x: o.is_negative(x), _one(-(1 << 49), 1 << 49, 50), 3),
    Case("less_than", lambda o, x, y: o.less_than(x, y.at_frac(3)), _two(24), 2),
    Case("max", lambda o, x: o.max(x), _rows(14), 4 + 4 + 3),
    Case("max_of_5", lambda o, x: o.max(x), _rows(14, 5), 4 + 3),
    Case("lookup_all_bits", lambda o, x: o.lookup(x, 8, _squares, (3, 4)), _one(-128, 128, 8), 1),
    Case("silu", silu, _one(-508 << 11, 508 << 11, 22, 11), 4, 3),
    Case("exp", lambda o, x: exp(o, x, 51), _one(-(255 << 12), 4 << 9, 23, 12), 2, 2, 1.5e-4),
    Case(
        "reciprocal",
        lambda o, x: reciprocal(o, x, 15, 30, 47, 27),
        _magnitudes(15.9, 30, 34, 16),
        4,
        2,
        2.0**-13,
    ),
    Case(
        "reciprocal_sqrt",
        lambda o, x: reciprocal_sqrt(o, x, 9, 48, 46, 24, 71.5),
        _magnitudes(9, 48, 49, 16),
        4,
        2,
        2.0**-13,
    ),
)


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
