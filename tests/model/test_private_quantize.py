"""Private-mode weights: integer multipliers, one power of two a segment, the stated extra error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otpipe.model.private_quantize import (
    MAX_MULTIPLIER,
    PrivateMap,
    Rows,
    dequantize_private,
    join_embedding,
    quantize_private,
    split_embedding,
)
from otpipe.model.quantize import quantize_rows

ANY = 60
"""An exponent that no test weight reaches."""


def noise(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(m, 1, generator=generator))
    return torch.randn(m, n, generator=generator) * scales


def chunks(weight: Tensor, size: int = 7) -> Rows:
    """The rows, some at a time."""
    return lambda: iter(weight.split(size))


def quantised(
    weight: Tensor, segments: tuple[int, ...] | None = None, finest: int = ANY
) -> PrivateMap:
    m, n = weight.shape
    return quantize_private(chunks(weight), n, segments or (m,), finest)


def table_of(table: Tensor, finest: int = ANY) -> PrivateMap:
    return split_embedding(chunks(table), *table.shape, finest)


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 20),
    finest=st.sampled_from([0, 3, 8, 11, ANY]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_weight_is_within_half_a_step(m: int, n: int, finest: int, seed: int) -> None:
    weight = noise(m, n, seed)
    private = quantised(weight, finest=finest)
    assert private.weight.dtype == torch.int8 and private.weight.min() >= -127
    assert private.multipliers.dtype == torch.int64 and private.multipliers.shape == (m,)
    assert private.multipliers.min() >= 1 and private.multipliers.max() <= MAX_MULTIPLIER
    (exponent,) = private.exponents
    scale = 2.0**-exponent
    step_m = private.multipliers * scale
    error = (dequantize_private(private) - weight).abs()
    assert bool((error <= step_m[:, None] * (0.5 + 1e-4)).all())
    # the step is that of public mode, or less than one unit above it
    public_m = quantize_rows(weight)[1]
    assert bool((step_m <= public_m + scale * (1 + 1e-4)).all())
    assert bool((step_m >= public_m * (1 - 1e-4)).all())
    # no finer scale would have held the largest row, or would have been allowed
    finer = float(weight.abs().max()) * 2.0 ** (exponent + 1)
    assert exponent == finest or finer > 127 * 127


def test_the_largest_row_has_at_least_half_the_multipliers() -> None:
    for seed in range(20):
        private = quantised(noise(40, 30, seed))
        assert 63 < int(private.multipliers.max()) <= MAX_MULTIPLIER


def test_weights_at_the_border_of_a_scale() -> None:
    """The largest entry exactly 127 * 127 steps, and the next float above it."""
    for exponent in (-3, 0, 14):
        border = torch.tensor([[127.0 * 127.0 * 2.0**-exponent]])
        private = quantised(border)
        assert private.exponents == (exponent,)
        assert torch.equal(dequantize_private(private), border)
        above = torch.nextafter(border, torch.tensor(1e9))
        assert quantised(above).exponents == (exponent - 1,)


def test_extra_error_is_what_the_docstring_says() -> None:
    """Root mean square c_i S / sqrt(12), at most 1 + S / s_i times that of public mode."""
    weight = noise(200, 4000, seed=3)
    private = quantised(weight)
    scale = 2.0 ** -private.exponents[0]
    public, scale_m = quantize_rows(weight)
    error = (dequantize_private(private) - weight).square().mean(1).sqrt()
    step_m = private.multipliers * scale
    # the rounding error is uniform where a step is small against the row: c_i well above 1
    fine = private.multipliers >= 4
    ratio = error[fine] / (step_m[fine] / 12**0.5)
    assert bool((ratio > 0.9).all()) and bool((ratio < 1.1).all())
    public_error = (public * scale_m[:, None] - weight).square().mean(1).sqrt()
    bound = 1 + scale / scale_m
    assert bool((error[fine] / public_error[fine] < bound[fine] * 1.1).all())


def test_segments_have_scales_of_their_own() -> None:
    weight = torch.cat([noise(6, 50), 100 * noise(4, 50, seed=1)])
    private = quantised(weight, segments=(6, 4))
    alone = [quantised(weight[:6]), quantised(weight[6:])]
    assert private.exponents == (*alone[0].exponents, *alone[1].exponents)
    assert private.exponents[0] > private.exponents[1]
    assert torch.equal(private.weight, torch.cat([one.weight for one in alone]))
    assert torch.equal(private.multipliers, torch.cat([one.multipliers for one in alone]))
    want = torch.cat([dequantize_private(one) for one in alone])
    assert torch.equal(dequantize_private(private), want)


def test_chunks_make_no_difference() -> None:
    weight = noise(23, 17)
    whole = quantize_private(chunks(weight, 23), 17, (20, 3), ANY)
    pieces = quantize_private(chunks(weight, 3), 17, (20, 3), ANY)
    assert torch.equal(whole.weight, pieces.weight) and whole.exponents == pieces.exponents
    table = noise(23, 16, seed=2)
    split = split_embedding(chunks(table, 23), 23, 16, ANY)
    split_pieces = split_embedding(chunks(table, 1), 23, 16, ANY)
    assert torch.equal(split.weight, split_pieces.weight)
    assert split.exponents == split_pieces.exponents


def test_zeros() -> None:
    private = quantised(torch.zeros(3, 4), finest=9)
    assert private.exponents == (9,)
    assert not private.weight.any() and not dequantize_private(private).any()
    assert not table_of(torch.zeros(3, 4)).weight.any()


@pytest.mark.parametrize(
    ("segments", "message"),
    [((3,), "do not add up to 4"), ((2, 3), "do not add up to 4"), ((4, 0), "without rows")],
)
def test_segments_that_do_not_fit(segments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantised(torch.ones(4, 2), segments)


class TestEmbedding:
    @pytest.mark.parametrize("finest", [ANY, 10])
    def test_shares_of_a_one_hot_product_join_to_the_row(self, finest: int) -> None:
        """Exactly, with uniform masks on either side."""
        table = noise(30, 12)
        private = table_of(table, finest)
        assert private.weight.shape == (24, 30) and private.weight.stride(0) == 1
        mask = torch.randint(0, 1 << 44, (30, 24))
        client = private.weight.t().long() - mask
        row = join_embedding(client) + join_embedding(mask)
        value = (row << 20) >> 20
        scale = 2.0 ** -private.exponents[0]
        assert value.abs().max() <= 32639
        assert finest == 10 or value.abs().max() > 16319
        assert (value * scale - table).abs().max() <= scale * 0.501

    def test_error_is_far_below_int8(self) -> None:
        table = noise(200, 64, seed=4)
        private = table_of(table)
        high, low = private.weight.t().long().chunk(2, 1)
        error = ((high * 256 + low) * 2.0 ** -private.exponents[0] - table).square().mean().sqrt()
        public, scale = quantize_rows(table)
        public_error = (public * scale[:, None] - table).square().mean().sqrt()
        assert error < public_error / 20


@pytest.mark.gpu
def test_devices_agree() -> None:
    weight = noise(40, 64)
    for make in (quantised, table_of):
        one, other = make(weight), make(weight.cuda())
        assert torch.equal(one.weight, other.weight.cpu()) and one.exponents == other.exponents
        assert torch.equal(one.multipliers, other.multipliers.cpu())
