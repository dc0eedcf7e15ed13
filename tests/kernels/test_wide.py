"""Arithmetic modulo 2^128 against Python integers, and compiled kernels against their twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otpipe.kernels import wide
from otpipe.kernels.ring_gemm import int8_matmul

MODULUS = 1 << 128
EDGES = [0, 1, MODULUS - 1, 1 << 127, (1 << 64) - 1, 1 << 64, (1 << 127) - 1]
VALUES = st.lists(st.sampled_from(EDGES) | st.integers(0, MODULUS - 1), min_size=1, max_size=20)


def limbs(numbers: list[int]) -> Tensor:
    low = torch.tensor([n % (1 << 64) for n in numbers], dtype=torch.uint64).view(torch.int64)
    high = torch.tensor([n >> 64 for n in numbers], dtype=torch.uint64).view(torch.int64)
    return torch.stack([low, high])


def numbers(x: Tensor) -> list[int]:
    low, high = (limb.reshape(-1).view(torch.uint64).tolist() for limb in x)
    return [h << 64 | lo for h, lo in zip(high, low, strict=True)]


@given(a=VALUES, b=VALUES, bits=st.integers(0, 127))
@settings(max_examples=200, deadline=None)
def test_operations(a: list[int], b: list[int], bits: int) -> None:
    size = min(len(a), len(b))
    a, b = a[:size], b[:size]
    x, y = limbs(a), limbs(b)
    assert numbers(wide.negated(x)) == [-n % MODULUS for n in a]
    assert numbers(wide.shifted_left(x, bits)) == [(n << bits) % MODULUS for n in a]
    assert numbers(wide.from_bytes(wide.to_bytes(x))) == a
    assert wide.to_bytes(x).numpy().tobytes() == b"".join(n.to_bytes(16, "little") for n in a)
    assert numbers(wide.add_(x.clone(), y)) == [
        (n + k) % MODULUS for n, k in zip(a, b, strict=True)
    ]
    dropped = 64 + bits % 64
    rounded = [((n + (1 << (dropped - 1))) >> dropped) for n in a]
    mask = (1 << (128 - dropped)) - 1
    got = [value & mask for value in wide.rounded_down(x, dropped).tolist()]
    assert got == [value & mask for value in rounded]


@given(a=VALUES)
@settings(max_examples=100, deadline=None)
def test_digits_stand_for_the_value(a: list[int]) -> None:
    digits = wide.to_digits(limbs(a).view(2, 1, -1))
    assert digits.shape == (16, 1, len(a)) and digits.dtype == torch.int8
    columns = digits[:, 0].t().tolist()
    assert [sum(d << (8 * i) for i, d in enumerate(c)) % MODULUS for c in columns] == a
    assert numbers(wide.from_digits(digits.transpose(0, 1))) == a


def test_signed_values_are_extended() -> None:
    x = torch.tensor([-1, 0, 5, -(2**63), 2**63 - 1])
    assert numbers(wide.from_signed(x)) == [int(v) % MODULUS for v in x]


def test_times_power_is_negacyclic() -> None:
    values = [3, 5, 7, 1 << 100]
    for exponent in range(4):
        want = [0] * 4
        for k, value in enumerate(values):
            at = k + exponent
            want[at % 4] = (-value if at >= 4 else value) % MODULUS
        assert numbers(wide.times_power(limbs(values), exponent)) == want


def ring_gemm(weight: Tensor, digits_JDN: Tensor, multipliers: Tensor) -> Tensor:
    """c W x mod 2^128 by the torch path: (2, R, N)."""
    n, _, degree = digits_JDN.shape
    sums = torch.zeros((2, len(weight), degree), dtype=torch.int64)
    for quarter in range(4):
        operand = digits_JDN[:, 4 * quarter : 4 * quarter + 4].reshape(n, -1)
        products = int8_matmul(weight, operand).view(len(weight), 4, degree)
        wide.add_quarter_torch(products, multipliers, quarter, sums)
    return sums


def test_ring_gemm_equals_python_integers() -> None:
    n, degree = 9, 16
    weight = torch.randint(-128, 128, (5, n), dtype=torch.int8)
    multipliers = torch.tensor([0, 1, 127, 64, 3])
    digits = torch.randint(-128, 128, (n, 16, degree), dtype=torch.int8)
    x = [numbers(wide.from_digits(digits[j : j + 1])) for j in range(n)]
    want = [
        int(multipliers[i]) * sum(int(weight[i, j]) * x[j][k] for j in range(n)) % MODULUS
        for i in range(5)
        for k in range(degree)
    ]
    assert numbers(ring_gemm(weight, digits, multipliers)) == want


def test_largest_products_do_not_overflow() -> None:
    """int32 products at both ends of their range, times the largest multiplier."""
    for value in (-(1 << 31), (1 << 31) - 1):
        products = torch.full((1, 4, 8), value, dtype=torch.int32)
        multipliers = torch.tensor([wide.MAX_MULTIPLIER])
        want = wide.MAX_MULTIPLIER * value * sum(1 << (8 * i) for i in range(4))
        for quarter in range(4):
            sums = torch.zeros((2, 1, 8), dtype=torch.int64)
            wide.add_quarter_torch(products, multipliers, quarter, sums)
            assert numbers(sums) == [(want << (32 * quarter)) % MODULUS] * 8


@pytest.mark.parametrize(("pack", "stride"), [(1, 64), (4, 16), (2, 32), (8, 8)])
@pytest.mark.parametrize("quarter", range(4))
def test_compiled_sums_equal_their_twin(pack: int, stride: int, quarter: int) -> None:
    """Over rows and coefficients in several calls, into groups with other values in them."""
    degree, num_rows, chunk = 64, 11, 16
    products = torch.randint(-(1 << 31), (1 << 31) - 1, (num_rows, 4, degree)).int()
    multipliers = torch.randint(0, 128, (num_rows,))
    groups = -(-num_rows // pack)
    sums = torch.randint(-(1 << 63), (1 << 63) - 1, (groups, 2, 2, degree))
    untouched = sums[:, 0].clone()
    want = sums[:, 1].transpose(0, 1).clone()
    for first in (0, 5):
        stop = 5 if first == 0 else num_rows
        rows = torch.zeros((2, stop - first, degree), dtype=torch.int64)
        wide.add_quarter_torch(products[first:stop], multipliers[first:stop], quarter, rows)
        wide.add_groups_torch(rows, first, pack, stride, want)
        for at in range(0, degree, chunk):
            piece = products[first:stop, :, at : at + chunk].contiguous()
            wide.add_quarter(
                piece, multipliers[first:stop], first, pack, stride, at, quarter, sums, 1
            )
    assert torch.equal(sums[:, 1].transpose(0, 1), want)
    assert torch.equal(sums[:, 0], untouched)


@pytest.mark.parametrize(("turns", "stride"), [(1, 64), (2, 32), (4, 8)])
def test_compiled_digits_equal_their_twin(turns: int, stride: int) -> None:
    degree, chunk, count = 64, 16, 5
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (count, degree, 2))
    words[0, :7, 0] = 0  # negation carries through a low word of zeros
    words[1] = torch.tensor([0, -(1 << 63)])
    planes = torch.zeros((degree // chunk, 4, 2 + count * turns, 4, chunk), dtype=torch.int8)
    wide.spread_digits(words, turns, stride, planes, 2)
    assert not planes[:, :, :2].any()
    values = words.movedim(-1, 0).contiguous()
    for turn in range(turns):
        moved = values
        if turn:
            moved = wide.negated(wide.times_power(values, degree - turn * stride))
        want = wide.to_digits(moved).transpose(0, 1)
        rows = planes[:, :, 2 + turn :: turns]  # (C, 4, J, 4, K)
        got = rows.permute(2, 1, 3, 0, 4).reshape(count, 16, degree)
        assert torch.equal(got, want)


def test_compiled_words_equal_their_twin() -> None:
    digits = torch.randint(-128, 128, (3, 16, 64), dtype=torch.int8)
    words = torch.empty((3, 64, 2), dtype=torch.int64)
    wide.words_from_digits(digits.numpy(), words.numpy().view("uint64"))
    assert torch.equal(words.movedim(-1, 0), wide.from_digits(digits))


@pytest.mark.gpu
def test_on_cuda() -> None:
    x = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 5, 64))
    y = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 5, 64))
    on_device = x.cuda()
    assert torch.equal(wide.add_(on_device.clone(), y.cuda()).cpu(), wide.add_(x.clone(), y))
    assert torch.equal(wide.to_digits(on_device).cpu(), wide.to_digits(x))
    assert torch.equal(wide.from_digits(wide.to_digits(on_device).transpose(0, 1)).cpu(), x)
    assert torch.equal(wide.times_power(on_device, 5).cpu(), wide.times_power(x, 5))
