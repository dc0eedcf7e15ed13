"""Functions over their whole range: against float64, densely, at edges and far outside."""

from __future__ import annotations

import math

import pytest
import torch
from two_parties import TwoParties, connect, integers, joined, real, secret

from otpipe.errors import ParameterError
from otpipe.secure import PlainOperations, Share, together
from otpipe.secure.functions import (
    _exp_table,
    _octave_table,
    _silu_tail,
    exp,
    reciprocal,
    reciprocal_sqrt,
    silu,
)

PLAIN = PlainOperations()


@pytest.fixture(scope="module")
def parties() -> TwoParties:
    return connect("ideal")


@pytest.mark.parametrize("repeat", range(3))
def test_silu_error_over_all_inputs(parties: TwoParties, repeat: int) -> None:
    """All of [-24, 24], every 173rd unit outside, both ends; fresh shares each time."""
    limit = 508 << 11
    x = torch.cat(
        (
            torch.arange(-24 << 11, 24 << 11),
            torch.arange(-limit + repeat, limit, 173),
            torch.tensor([-limit, limit - 1]),
        )
    )
    got = parties.compute(silu, secret(x, 22, 11))
    value = x.double() / 2048
    error = (real(got) - torch.nn.functional.silu(value)).abs()
    unit = 1 / 2048
    assert float(error.max()) < 8.5e-4 + 2 * unit
    smooth = (value.abs() < 9.5) | (value.abs() >= 13.5)
    assert float(error[smooth].max()) < 3.0e-4 + 2 * unit
    beyond = value.abs() >= 13.5
    assert float(error[beyond].max()) <= 2e-5  # exactly x or 0; silu(-13.5) is -1.9e-5
    rms = float(error.square().mean().sqrt())
    assert rms < 0.7 * unit


def test_silu_at_the_open_end_of_its_window(parties: TwoParties) -> None:
    """-13.5 is folded to 13.5, where the window ends: even if the low bits of a share are 0."""
    x = torch.full((1 << 15,), -27 << 10)
    client = torch.zeros_like(x)  # the zone lookup sees x itself
    server = Share.of(x - client, 22, 11)
    got = joined(*parties.run(silu, [server], [Share(client, 22, 11)]))
    assert int(integers(got).abs().max()) <= 1


@pytest.mark.parametrize(("frac", "limit"), [(9, 2032), (11, 508), (13, 127), (14, 63)])
def test_silu_at_other_scales(parties: TwoParties, frac: int, limit: int) -> None:
    """A tensor with larger or smaller values takes another scale in a ring of 22 bits."""
    if frac < 11:
        with pytest.raises(ValueError, match=r"zones coarser than 4.0; take a smaller ring"):
            PLAIN.run(silu(PLAIN, secret(torch.zeros(2), 22, frac)))
        bits, limit = 22 - (11 - frac), 508
    else:
        bits = 22
    x = torch.linspace(-limit, limit, 20001).mul(1 << frac).round().to(torch.int64)
    got = parties.compute(silu, secret(x, bits, frac))
    error = (real(got) - torch.nn.functional.silu(x.double() / (1 << frac))).abs()
    assert float(error.max()) < 8.5e-4 + 2.0 ** (1 - frac)


@pytest.mark.parametrize("repeat", range(3))
def test_exp_error_over_all_inputs(parties: TwoParties, repeat: int) -> None:
    """All of [-26, 0.6], every 211th unit down to -2039."""
    low, high = -2039 << 12, int(0.6 * 4096)
    x = torch.cat((torch.arange(-26 << 12, high + 1), torch.arange(low + repeat, -26 << 12, 211)))
    x = torch.cat((x, torch.tensor([low])))
    got = parties.compute(lambda ops, x: exp(ops, x, 51), secret(x, 23, 12))
    exact = (x.double() / 4096).exp()
    error = (real(got) - exact).abs()
    assert bool((error <= 6.5e-5 * exact + 7.1e-6 + 2.0**-16).all())
    assert bool((got.data[x < (-24 << 12)] == 0).all())
    assert int(integers(got).min()) >= 0


def test_tables_are_as_accurate_as_their_docstrings_say() -> None:
    """Every entry at 65 points of its interval."""
    assert _silu_tail(11).error < 3.0e-4
    assert _silu_tail(13).error < 3.0e-4
    assert _octave_table(False, 1.0).error < 2.0**-14.5
    assert _octave_table(True, 1.9).error < 2.0**-14.5
    exponential = _exp_table(12)
    assert exponential.error < 6.5e-5 * math.e + 7.1e-6


def test_reciprocal_is_right_at_every_border_of_an_octave(parties: TwoParties) -> None:
    """Powers of two and their neighbours, over the whole range."""
    borders = 1 << torch.arange(15, 31)
    x = torch.cat((borders[:-1], borders - 1, borders[:-1] + 1)).unique()
    x = x[(x >= 1 << 15) & (x < 1 << 30)]
    got = parties.compute(lambda o, x: reciprocal(o, x, 15, 30, 47, 27), secret(x, 32, 16))
    exact = 2.0**43 / x.double()
    assert bool(((integers(got) - exact).abs() <= exact * 2.0**-13 + 1).all())


def test_reciprocal_sqrt_over_twelve_decades(parties: TwoParties) -> None:
    borders = 1 << torch.arange(8, 48)
    x = torch.cat((borders, borders - 1, borders + 1, (borders * 1.37).long())).clamp_min(1 << 8)
    x = x[x < 1 << 47]
    program = lambda o, x: reciprocal_sqrt(o, x, 8, 48, 46, 24, 71.55)  # noqa: E731
    got = parties.compute(program, secret(x, 49, 16))
    exact = 71.55 / (x.double() * 2.0**-16).sqrt() * 2.0**24
    assert bool(((integers(got) - exact).abs() <= exact * 2.0**-13 + 1).all())


def test_a_result_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ParameterError, match="too large for a ring of 30 bits; take fewer"):
        PLAIN.run(reciprocal(PLAIN, secret(torch.ones(1), 32, 16), 2, 20, 30, 27))


def test_steps_side_by_side_share_their_rounds(parties: TwoParties) -> None:
    """Four rounds of one and two of the other are four, and both results are right."""
    x, z = secret(torch.arange(-9, 9) << 11, 22, 11), secret(torch.arange(-9, 1) << 11, 23, 12)

    def program(ops: object, x: Share, z: Share) -> object:
        return together(silu(ops, x), exp(ops, z, 40), silu(ops, x))  # type: ignore[arg-type]

    before = parties.traffic()["rounds"]
    got = parties.compute(program, x, z)
    assert parties.traffic()["rounds"] - before == 4
    want = PLAIN.run(program(PLAIN, x, z))  # type: ignore[arg-type]
    for one, other in zip(got, want, strict=True):  # type: ignore[call-overload]
        assert int(integers(Share.of(one.data - other.data, one.bits)).abs().max()) <= 12
