"""Row quantisation, its exact norms and digests."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otpipe.model import quantize
from otpipe.model.quantize import quantize_rows, row_norms, rows_digest


def test_known_row() -> None:
    weight = torch.tensor([[127.0, -63.5, 0.5, 1.5, -2.5, 0.0]])
    quantised, scale = quantize_rows(weight)
    assert scale.tolist() == [1.0]
    assert quantised.tolist() == [[127, -64, 0, 2, -2, 0]]  # ties to even
    assert quantised.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_half_a_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((33, 57), generator=generator).to(dtype)
    quantised, scale = quantize_rows(weight)
    error = (quantised.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.50001 * scale.double()[:, None]).all())
    assert quantised.abs().amax(1).tolist() == [127] * 33


def test_zero_and_vanishing_rows_have_scale_zero() -> None:
    quantised, scale = quantize_rows(torch.tensor([[0.0, -0.0], [1e-40, -3e-39], [1e-30, 0.0]]))
    assert scale.tolist()[:2] == [0.0, 0.0]
    assert quantised.tolist() == [[0, 0], [0, 0], [127, 0]]


def test_the_largest_floats_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    quantised, scale = quantize_rows(torch.tensor([[largest, -largest, largest / 127]]))
    assert quantised.tolist() == [[127, -127, 1]]
    assert torch.isfinite(scale).all()


@given(st.integers(0, 2**32 - 1))
def test_same_result_row_by_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-100, 100, (5, 1), generator=generator)
    weight = torch.randn((5, 9), generator=generator) * 2.0**exponents
    quantised, scale = quantize_rows(weight)
    for row in range(5):
        one, one_scale = quantize_rows(weight[row : row + 1])
        assert torch.equal(one[0], quantised[row])
        assert torch.equal(one_scale[0], scale[row])


@pytest.mark.parametrize("transposed", [False, True])
def test_row_norms_are_exact(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 7 * 301)  # chunks of 7 rows
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(-127, 128, (45, 301), dtype=torch.int8, generator=generator)
    exact = rows.numpy().astype(object)
    if transposed:
        exact = exact.T
    assert row_norms(rows, transposed=transposed) == (
        math.sqrt(max((exact**2).sum(1))),
        float(max(abs(exact).sum(1))),
    )


def test_row_norms_beyond_the_exact_range_of_float32() -> None:
    rows = torch.full((1, 3_000_001), 127, dtype=torch.int8)
    assert row_norms(rows) == (math.sqrt(127 * 127 * 3_000_001), 127.0 * 3_000_001)


def test_digest_is_sha256_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(-60, 60, dtype=torch.int8).view(24, 5)
    expected = hashlib.sha256(np.arange(-60, 60, dtype=np.int8).tobytes()).digest()
    assert rows_digest(rows) == expected
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 35)
    assert rows_digest(rows) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu_on_every_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-120, 120, (512, 1), generator=generator)
    weight = torch.randn((512, 999), generator=generator) * 2.0**exponents
    on_cpu, on_cuda = quantize_rows(weight), quantize_rows(weight.cuda())
    assert torch.equal(on_cuda[0].cpu(), on_cpu[0])
    assert torch.equal(on_cuda[1].cpu(), on_cpu[1])
    assert row_norms(on_cuda[0]) == row_norms(on_cpu[0])
    assert rows_digest(on_cuda[0]) == rows_digest(on_cpu[0])
