"""Quantised activations: no output can overflow, and outliers cost few bits."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.errors import OtpipeError
from otpipe.kernels.activations import rms_norm_rows
from otpipe.protocol.fixed_point import (
    dequantize_outputs,
    mask_activations,
    open_outputs,
    output_bound,
    quantize_activations,
)


def _norms(weight: torch.Tensor) -> tuple[float, float]:
    wide = weight.double()
    return float(wide.norm(dim=1).max()), float(wide.abs().sum(dim=1).max())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 9),
    st.floats(-30, 30),
    st.integers(0, 5),
)
def test_no_output_leaves_the_ring(
    seed: int, n: int, m: int, log_scale: float, num_outliers: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (m, n), generator=generator).to(torch.int8)
    x = torch.randn(3, n, generator=generator) * 2.0**log_scale
    x[:, :num_outliers] *= 1e4
    # The adversarial row: aligned with x, every entry at its limit.
    x[2] = weight[0].float() * 2.0**log_scale
    l2, l1 = _norms(weight)
    rounded, unit = quantize_activations(x, l2, l1)
    exact = rounded.astype(object) @ weight.numpy().T.astype(object)
    assert np.abs(exact).max() < 2**31
    assert np.isfinite(unit).all()


def test_bound_holds_for_the_worst_row_and_is_tight_with_outliers() -> None:
    torch.manual_seed(1)
    n = 4096
    weight = torch.randint(-127, 128, (64, n), dtype=torch.int8)
    l2, _ = _norms(weight)
    x = torch.randn(2, n)
    x[1, 7] = 1e4
    bound = output_bound(x, l2)
    exact = (x.double() @ weight.double().T).abs().amax(dim=1)
    assert bool((bound >= exact).all())
    plain = l2 * x[1].double().norm()
    assert bound[1] < plain / 10, "the outlier should be bounded by 127 |x|, not by the row norm"


def test_rounding_error_is_small_and_signed_values_survive() -> None:
    torch.manual_seed(2)
    weight = torch.randint(-127, 128, (32, 512), dtype=torch.int8)
    x = torch.randn(4, 512)
    scale = torch.rand(32) + 0.1
    bias = torch.randn(32)
    rounded, unit = quantize_activations(x, *_norms(weight))
    y = (rounded.astype(np.int64) @ weight.numpy().T.astype(np.int64)).astype(np.int32)
    out = dequantize_outputs(y, unit, scale, bias)
    want = (x @ weight.float().T) * scale + bias
    assert float((out - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activation_is_refused(value: float) -> None:
    x = torch.zeros(1, 4)
    x[0, 2] = value
    with pytest.raises(OtpipeError, match="infinite or not a number"):
        quantize_activations(x, 100.0, 200.0)


def test_zero_activations_and_zero_weights() -> None:
    rounded, unit = quantize_activations(torch.zeros(2, 3), 100.0, 200.0)
    assert not rounded.any() and np.isfinite(unit).all()
    rounded, unit = quantize_activations(torch.full((1, 3), 1e30), 0.0, 0.0)
    assert np.isfinite(unit).all() and np.abs(rounded.astype(np.int64)).max() < 2**31


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 4), st.integers(0, 70))
def test_fused_kernels_agree_with_plain_torch(
    seed: int, n: int, rows: int, num_outliers: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (7, n), generator=generator).to(torch.int8)
    x = torch.randn(rows, n, generator=generator)
    x[:, :num_outliers] *= 1e3
    x[0] *= 0 if seed % 5 == 0 else 1
    mask = np.frombuffer(os.urandom(4 * rows * n), np.uint32).reshape(rows, n)
    l2, l1 = _norms(weight)
    masked, unit = mask_activations(x, mask, l2, l1)
    opened_x = (masked + mask).view(np.int32)
    twin, twin_unit = quantize_activations(x, l2, l1)
    # The kernel tries fewer outlier sets, so that its scale may be a little smaller. Where the
    # outliers are all there is, the root of a rest that cancels is sure to 1e-7 only.
    assert ((unit >= twin_unit * (1 - 1e-6)) & (unit <= twin_unit * (1 + 1e-6))).all()
    same = unit <= twin_unit * (1 + 1e-12)
    # Sums in another order may move a value across a rounding boundary, never further.
    assert not same.any() or np.abs(opened_x.astype(np.int64) - twin)[same].max() <= 1
    exact_x = x.double().numpy() / unit[:, None]
    assert np.abs(opened_x - exact_x).max() <= 0.5 + 1e-6

    exact = opened_x.astype(object) @ weight.numpy().T.astype(object)
    assert np.abs(exact).max() < 2**31
    y = exact.astype(np.int64).astype(np.int32)
    correction = np.frombuffer(os.urandom(4 * y.size), np.uint32).reshape(y.shape)
    scale, bias = torch.rand(7), torch.randn(7)
    for with_bias in (bias, None):
        out = torch.full((rows, 7), float("nan"))
        open_outputs(y.view(np.uint32) - correction, correction, unit, scale, with_bias, out)
        torch.testing.assert_close(
            out, dequantize_outputs(y, unit, scale, with_bias), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fused_kernel_refuses_non_finite(value: float) -> None:
    x = torch.zeros(2, 4)
    x[1, 2] = value
    with pytest.raises(OtpipeError, match="infinite or not a number"):
        mask_activations(x, np.zeros((2, 4), np.uint32), 100.0, 200.0)


@pytest.mark.parametrize("rows", [1, 5])
def test_fused_rms_norm_agrees_with_plain_torch(rows: int) -> None:
    x = torch.randn(rows, 777) * 30
    x[:, 3] = 1e4
    gain = torch.rand(777) + 0.5
    want = torch.nn.functional.rms_norm(x.double(), (777,), gain.double(), 1e-6)
    got = torch.from_numpy(rms_norm_rows(x.numpy(), gain.numpy(), 1e-6))
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6


@pytest.mark.parametrize("n", [4096, 13_824, 29_568, 262_144])
def test_the_kernel_never_overflows_where_its_sums_cancel(n: int) -> None:
    """An outlier first, then squares that a running sum loses, against a row of 127s."""
    l2, l1 = 127 * math.sqrt(n), 127.0 * n
    headroom = (2.0**31 - 1 - 0.5 * l1) * (1 - 1e-6)
    mask = np.zeros((1, n), np.uint32)
    for square in np.linspace(1.0, 1.99, 12):
        first = np.float32(math.sqrt(square))
        rest = 0.5 * 127 * float(first) / headroom
        for _ in range(20):  # the rest just above where it rounds up to one unit
            rest = 0.5 * (127 * float(first) + l2 * math.sqrt(n) * rest) / headroom
        for factor in (1.0005, 1.01, 1.03):
            x = torch.full((1, n), rest * factor)
            x[0, 0] = float(first)
            rounded, _ = mask_activations(x, mask, l2, l1)
            assert 127 * int(rounded.view(np.int32).astype(np.int64).sum()) < 2**31
