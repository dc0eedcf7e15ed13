"""ring_gemm and its parts against Python integers; compiled kernels against their torch twins."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otpipe.kernels import combine_planes, cpu, digit_planes, int8_matmul, ring_gemm
from otpipe.kernels.ring_gemm import (
    MAX_EXACT_INNER,
    combine_planes_torch,
    digit_planes_torch,
    num_digits,
    storage_dtype,
)

#: the module, which its own function shadows in the package namespace
module = importlib.import_module("otpipe.kernels.ring_gemm")

BITS = [1, 8, 16, 31, 32, 40, 54, 55, 56, 63, 64]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def python_ring_gemm(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The definition, in unbounded Python integers."""
    product = x.cpu().numpy().astype(object) @ weight.cpu().numpy().astype(object).T
    half, modulus = 1 << (bits - 1), 1 << bits
    signed = (product + half) % modulus - half
    return torch.from_numpy(signed.astype(np.int64)).to(storage_dtype(bits))


def random_ring(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    """Any representative of the storage type, with the extremes in it."""
    dtype = storage_dtype(bits)
    info = torch.iinfo(dtype)
    octets = torch.randint(0, 256, (*shape, info.bits // 8), dtype=torch.uint8, generator=generator)
    x = octets.view(dtype).view(shape)
    flat = x.view(-1)
    extremes = torch.tensor([info.min, info.max, -1, 0, 1 << (bits - 2 if bits > 2 else 0)])
    count = min(extremes.numel(), flat.numel())
    flat[:count] = extremes[:count].to(dtype)
    return x


def random_weight(m: int, n: int, generator: torch.Generator, lowest: int = -127) -> Tensor:
    return torch.randint(lowest, 128, (m, n), dtype=torch.int8, generator=generator)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 7, 13), (2, 16, 8), (3, 5, 9), (37, 130, 67)])
def test_exact_against_python_integers(
    bits: int, shape: tuple[int, int, int], device: str, generator: torch.Generator
) -> None:
    num_rows, n, m = shape
    x = random_ring((num_rows, n), bits, generator)
    weight = random_weight(m, n, generator, lowest=-128)
    got = ring_gemm(x.to(device), weight.to(device), bits)
    assert got.dtype == storage_dtype(bits)
    assert torch.equal(got.cpu(), python_ring_gemm(x, weight, bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 32, 54, 64])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_most_negative_values(num_rows: int, bits: int, device: str) -> None:
    dtype = storage_dtype(bits)
    x = torch.full((num_rows, 300), torch.iinfo(dtype).min, dtype=dtype)
    x[:, ::3] = torch.iinfo(dtype).max
    weight = torch.full((11, 300), -128, dtype=torch.int8)
    weight[::2, 1::2] = 127
    got = ring_gemm(x.to(device), weight.to(device), bits)
    assert torch.equal(got.cpu(), python_ring_gemm(x, weight, bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 32, 54])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("layout", ["transposed", "row_slice", "strided_columns"])
def test_weights_of_any_strides(
    layout: str, num_rows: int, bits: int, device: str, generator: torch.Generator
) -> None:
    m, n = 29, 51
    base = random_weight(2 * m + n, 2 * n + m, generator).to(device)
    weight = {
        "transposed": base[:n, :m].contiguous().t(),
        "row_slice": base[3 : 3 + m, :n],
        "strided_columns": base[:m, : 2 * n : 2],
    }[layout]
    x = random_ring((num_rows, n), bits, generator)
    got = ring_gemm(x.to(device), weight, bits)
    assert torch.equal(got.cpu(), python_ring_gemm(x, weight, bits))


def test_rows_and_columns_beyond_one_tile(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(module, "_CPU_TILE_ELEMENTS", 64 * 1024)
    x = random_ring((700, 20), 32, generator)
    weight = random_weight(333, 20, generator)
    assert torch.equal(ring_gemm(x, weight, 32), python_ring_gemm(x, weight, 32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 32, 54, 64])
def test_float64_fallback_is_exact(
    bits: int, device: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(module, "_int_mm_is_exact", lambda device: False)
    monkeypatch.setattr(module, "_FLOAT_TILE_COLUMNS", 16)
    x = random_ring((6, 41), bits, generator)
    weight = random_weight(50, 41, generator, lowest=-128)
    got = ring_gemm(x.to(device), weight.to(device), bits)
    assert torch.equal(got.cpu(), python_ring_gemm(x, weight, bits))


@pytest.mark.parametrize("device", DEVICES)
def test_int8_matmul_does_not_overflow(device: str) -> None:
    for n, dtype in [(MAX_EXACT_INNER, torch.int32), (151936, torch.int64), (400000, torch.int64)]:
        a = torch.full((2, n), -128, dtype=torch.int8, device=device)
        b = torch.full((n, 3), -128, dtype=torch.int8, device=device)
        got = int8_matmul(a, b)
        assert got.dtype == dtype
        assert torch.equal(got.cpu().long(), torch.full((2, 3), n << 14))


def test_longest_sum_fits_int32() -> None:
    assert MAX_EXACT_INNER << 14 < 1 << 31
    assert MAX_EXACT_INNER % 8 == 0


@pytest.mark.parametrize("bits", [8, 32, 54])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_inner_dimension_beyond_the_int32_bound(bits: int, num_rows: int) -> None:
    n = MAX_EXACT_INNER + 9
    dtype = storage_dtype(bits)
    x = torch.full((num_rows, n), torch.iinfo(dtype).min + 0x80, dtype=dtype)
    weight = torch.full((2, n), -128, dtype=torch.int8)
    assert torch.equal(ring_gemm(x, weight, bits), python_ring_gemm(x, weight, bits))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_inner_dimension_gives_zero(device: str) -> None:
    x = torch.zeros((3, 0), dtype=torch.int32, device=device)
    weight = torch.zeros((5, 0), dtype=torch.int8, device=device)
    assert torch.equal(ring_gemm(x, weight, 32).cpu(), torch.zeros((3, 5), dtype=torch.int32))


@given(data=st.data(), bits=st.sampled_from(BITS))
@settings(max_examples=60, deadline=None)
def test_digits_are_signed_bytes_that_sum_to_the_value(data: st.DataObject, bits: int) -> None:
    dtype = storage_dtype(bits)
    info = torch.iinfo(dtype)
    edge = st.sampled_from([info.min, info.max, -129, -128, -1, 0, 127, 128])
    numbers = data.draw(st.lists(edge | st.integers(info.min, info.max), min_size=1, max_size=40))
    x = torch.tensor(numbers, dtype=dtype).view(1, -1)
    planes = digit_planes(x, bits)
    assert planes.shape == (num_digits(bits), 1, len(numbers))
    assert planes.dtype == torch.int8
    assert torch.equal(planes, digit_planes_torch(x, bits))
    for column, number in enumerate(numbers):
        total = sum(int(d) << (8 * i) for i, d in enumerate(planes[:, 0, column]))
        assert (total - number) % (1 << (8 * num_digits(bits))) == 0
    recombined = combine_planes(planes.int(), bits)
    assert torch.equal(recombined, signed_residue(numbers, bits).view(1, -1))


def signed_residue(numbers: list[int], bits: int) -> Tensor:
    half = 1 << (bits - 1)
    values = [(number + half) % (1 << bits) - half for number in numbers]
    return torch.tensor(values, dtype=storage_dtype(bits))


@pytest.mark.parametrize("bits", BITS)
def test_compiled_kernels_equal_their_twins(bits: int, generator: torch.Generator) -> None:
    x = random_ring((19, 211), bits, generator)
    assert torch.equal(digit_planes(x, bits), digit_planes_torch(x, bits))
    products = torch.randint(
        -(2**31), 2**31 - 1, (num_digits(bits), 19, 211), generator=generator
    ).int()
    assert torch.equal(combine_planes(products, bits), combine_planes_torch(products, bits))
    wide = torch.zeros((19, 400), dtype=storage_dtype(bits))
    combine_planes(products, bits, out=wide[:, 50:261])
    assert torch.equal(wide[:, 50:261], combine_planes_torch(products, bits))
    assert not wide[:, :50].any() and not wide[:, 261:].any()


@pytest.mark.parametrize(
    ("dtype_x", "dtype_w", "bits"),
    [
        (torch.int64, torch.int8, 32),
        (torch.int32, torch.int8, 40),
        (torch.int32, torch.int32, 32),
        (torch.float32, torch.int8, 32),
    ],
)
def test_wrong_dtypes_are_refused(dtype_x: torch.dtype, dtype_w: torch.dtype, bits: int) -> None:
    with pytest.raises(TypeError, match="ring_gemm mod 2"):
        ring_gemm(torch.zeros((1, 2), dtype=dtype_x), torch.zeros((3, 2), dtype=dtype_w), bits)


def test_mismatched_shapes_and_bits_are_refused() -> None:
    x, weight = torch.zeros((1, 2), dtype=torch.int32), torch.zeros((3, 4), dtype=torch.int8)
    with pytest.raises(ValueError, match="wants x"):
        ring_gemm(x, weight, 32)
    for bits in (0, 65):
        with pytest.raises(ValueError, match="1 to 64 bits"):
            ring_gemm(x, weight, bits)


class TestParallelFor:
    def test_covers_the_range_once(self) -> None:
        hits = np.zeros(1000, np.int64)

        def body(lo: int, hi: int) -> None:
            hits[lo:hi] += 1

        cpu.parallel_for(body, 1000, 7)
        assert (hits == 1).all()
        cpu.parallel_for(body, 0, 7)
        assert (hits == 1).all()

    def test_raises_what_the_body_raises(self) -> None:
        def body(lo: int, hi: int) -> None:
            raise KeyError("planted")

        with pytest.raises(KeyError, match="planted"):
            cpu.parallel_for(body, 100, 1)

    def test_nested_and_concurrent_calls_finish(self) -> None:
        totals = []

        def outer() -> None:
            hits = np.zeros((40, 40), np.int64)

            def body(lo: int, hi: int) -> None:
                for row in range(lo, hi):

                    def inner(a: int, b: int, row: int = row) -> None:
                        hits[row, a:b] += 1

                    cpu.parallel_for(inner, 40, 1)

            cpu.parallel_for(body, 40, 1)
            totals.append(int(hits.sum()))

        threads = [threading.Thread(target=outer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert totals == [1600] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 20, 32])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 33), (129, 1025), (300, 4100), (5, 70_001)])
def test_fused_cuda_gemv_equals_digits(bits: int, rows: int, m: int, n: int) -> None:
    """The Triton kernel against its plain-torch twin, for both weight layouts."""
    fused = pytest.importorskip("otpipe.kernels.gemv_triton")
    x = torch.randint(-(2**31), 2**31, (rows, n), dtype=torch.int64).to(torch.int32)
    x[:, 0] = -(2**31)
    weight = torch.randint(-128, 128, (m, n), dtype=torch.int8)
    weight[0] = -128
    planes = digit_planes(x, 32)
    products = int8_matmul(planes.view(-1, n), weight.t().contiguous())
    want = combine_planes(products.view(4, rows, m).to(torch.int32), 32)
    for layout in (weight, weight.t().contiguous().t()):
        if fused.fits(x.cuda(), layout.cuda()):
            assert torch.equal(fused.gemv(x.cuda(), layout.cuda()).cpu(), want)
        else:
            assert rows > 1
            assert layout.stride(1) == 1
        assert torch.equal(
            ring_gemm(x.cuda(), layout.cuda(), bits).cpu(), ring_gemm(x, layout, bits)
        )
