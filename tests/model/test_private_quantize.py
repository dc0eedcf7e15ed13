"""Private-mode weights: small integer multipliers, one scale a segment, the stated extra error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otpipe.model import quantize
from otpipe.model.private_quantize import (
    DEFAULT_MULTIPLIER,
    dequantize_private,
    join_embedding,
    quantize_private,
    split_embedding,
)
from otpipe.model.quantize import quantize_rows


def noise(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(m, 1, generator=generator))
    return torch.randn(m, n, generator=generator) * scales


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 20),
    max_multiplier=st.sampled_from([1, 3, 16, 64, 127]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_weight_is_within_half_a_step(m: int, n: int, max_multiplier: int, seed: int) -> None:
    weight = noise(m, n, seed)
    private = quantize_private(weight, max_multiplier=max_multiplier)
    assert private.weight.dtype == torch.int8 and private.weight.min() >= -127
    assert private.multipliers.dtype == torch.int64 and private.multipliers.shape == (m,)
    assert private.multipliers.min() >= 1 and private.multipliers.max() <= max_multiplier
    (scale,) = private.scales
    step_m = private.multipliers * scale
    error = (dequantize_private(private) - weight).abs()
    assert bool((error <= step_m[:, None] * (0.5 + 1e-4)).all())
    # the step is that of public mode, or less than one unit above it
    public_m = quantize_rows(weight)[1]
    assert bool((step_m <= public_m + scale * (1 + 1e-4)).all())
    assert bool((step_m >= public_m * (1 - 1e-4)).all())


def test_the_largest_row_has_no_extra_error() -> None:
    weight = noise(40, 300)
    private = quantize_private(weight)
    largest = int(weight.abs().amax(1).argmax())
    assert int(private.multipliers[largest]) == DEFAULT_MULTIPLIER
    quantised, _ = quantize_rows(weight)
    assert (private.weight[largest].int() - quantised[largest].int()).abs().max() <= 1


def test_extra_error_is_what_the_docstring_says() -> None:
    """Root mean square c_i S / sqrt(12), at most 1 + S / s_i times that of public mode."""
    weight = noise(200, 4000, seed=3)
    private = quantize_private(weight)
    public, scale_m = quantize_rows(weight)
    error = (dequantize_private(private) - weight).square().mean(1).sqrt()
    step_m = private.multipliers * private.scales[0]
    # the rounding error is uniform where a step is small against the row: c_i well above 1
    fine = private.multipliers >= 4
    ratio = error[fine] / (step_m[fine] / 12**0.5)
    assert bool((ratio > 0.9).all()) and bool((ratio < 1.1).all())
    public_error = (public * scale_m[:, None] - weight).square().mean(1).sqrt()
    bound = 1 + private.scales[0] / scale_m
    assert bool((error[fine] / public_error[fine] < bound[fine] * 1.1).all())


def test_segments_have_scales_of_their_own() -> None:
    weight = torch.cat([noise(6, 50), 100 * noise(4, 50, seed=1)])
    private = quantize_private(weight, segments=(6, 4))
    alone = [quantize_private(weight[:6]), quantize_private(weight[6:])]
    assert private.scales == (alone[0].scales[0], alone[1].scales[0])
    assert torch.equal(private.weight, torch.cat([one.weight for one in alone]))
    assert torch.equal(private.multipliers, torch.cat([one.multipliers for one in alone]))
    want = torch.cat([dequantize_private(one) for one in alone])
    assert torch.equal(dequantize_private(private), want)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, table = noise(23, 17), noise(23, 16, seed=2)
    whole, split = quantize_private(weight, (20, 3)), split_embedding(table)
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 60)
    pieces, split_pieces = quantize_private(weight, (20, 3)), split_embedding(table)
    assert torch.equal(whole.weight, pieces.weight) and whole.scales == pieces.scales
    assert torch.equal(split.weight, split_pieces.weight) and split.scales == split_pieces.scales


def test_zeros() -> None:
    private = quantize_private(torch.zeros(3, 4))
    assert not private.weight.any() and not dequantize_private(private).any()
    assert not split_embedding(torch.zeros(3, 4)).weight.any()


@pytest.mark.parametrize("segments", [(3,), (2, 3), (4, 0)])
def test_segments_that_do_not_add_up(segments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not add up to 4 rows"):
        quantize_private(torch.ones(4, 2), segments)


@pytest.mark.parametrize("max_multiplier", [0, 128])
def test_multipliers_out_of_range(max_multiplier: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 127, not {max_multiplier}"):
        quantize_private(torch.ones(4, 2), max_multiplier=max_multiplier)


class TestEmbedding:
    def test_shares_of_a_one_hot_product_join_to_the_row(self) -> None:
        """Exactly, with uniform masks on either side."""
        table = noise(30, 12)
        private = split_embedding(table)
        assert private.weight.shape == (24, 30) and private.weight.stride(0) == 1
        mask = torch.randint(0, 1 << 44, (30, 24))
        client = private.weight.t().long() - mask
        row = join_embedding(client) + join_embedding(mask)
        value = (row << 20) >> 20
        (scale,) = private.scales
        assert value.abs().max() == 32639
        assert (value * scale - table).abs().max() <= scale * 0.501

    def test_error_is_far_below_that_of_eight_bits(self) -> None:
        table = noise(50, 400)
        private = split_embedding(table)
        value = join_embedding(private.weight.t().long())
        error = (value * private.scales[0] - table).square().mean().sqrt()
        public, scale = quantize_rows(table)
        public_error = (public * scale[:, None] - table).square().mean().sqrt()
        assert error < public_error / 20


@pytest.mark.gpu
def test_devices_agree() -> None:
    weight = noise(40, 64)
    for make in (quantize_private, split_embedding):
        one, other = make(weight), make(weight.cuda())
        assert torch.equal(one.weight, other.weight.cpu()) and one.scales == other.scales
        assert torch.equal(one.multipliers, other.multipliers.cpu())
