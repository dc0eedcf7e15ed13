"""Small rings exhaustively: every secret with every share of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_parties import TwoParties, connect, integers, joined, secret, uniform

from otpipe.secure import Share
from otpipe.secure.shares import signed


@pytest.fixture(scope="module")
def parties() -> TwoParties:
    return connect("ideal")


def every_share(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, Share, Share]:
    """(values, server's, client's), each (n, 2^bits): each value under every client's share."""
    client = torch.arange(1 << bits).expand(len(values), -1)
    column = values[:, None].expand(-1, 1 << bits)
    return column, Share.of(column - client, bits), Share(client.contiguous(), bits)


@pytest.mark.parametrize(("shift", "bits"), [(1, 9), (3, 9), (3, 7), (3, 12), (6, 3), (6, 20)])
def test_truncation_rounds_down_or_up_and_never_wraps(
    parties: TwoParties, shift: int, bits: int
) -> None:
    """Over all shares: floor or floor + 1, and on average the real quotient."""
    x, server, client = every_share(torch.arange(-128, 128), 9)
    got = joined(*parties.run(lambda ops, x: ops.rescale(x, shift, bits), [server], [client]))
    quotient = x.double() / (1 << shift)
    floor = (x >> shift) if bits > 9 - shift else signed(x >> shift, bits)
    above = signed(got.data - floor, bits)
    assert bool(((above == 0) | (above == 1)).all())
    mean = (x >> shift) + above.double().mean(1, keepdim=True)
    assert torch.allclose(mean, quotient + 2.0**-shift, atol=1e-9)


def test_extension_is_exact_for_every_share(parties: TwoParties) -> None:
    x, server, client = every_share(torch.arange(-64, 64), 8)
    got = joined(*parties.run(lambda ops, x: ops.rescale(x, 0, 30), [server], [client]))
    assert torch.equal(integers(got), x)
    x, server, client = every_share(torch.arange(0, 128), 8)
    got = joined(
        *parties.run(lambda ops, x: ops.rescale(x, 0, 9, nonnegative=True), [server], [client])
    )
    assert torch.equal(got.data, x)


def test_without_its_wrap_bit_truncation_would_be_wrong(parties: TwoParties) -> None:
    """What the operation spares: shifting the shares alone errs by 2^(bits - shift)."""
    x, server, client = every_share(torch.arange(-64, 64), 8)
    local = Share.of((server.data >> 3) + (client.data >> 3), 8)
    wrong = (integers(local) - (x >> 3)).abs() > 1
    assert float(wrong.double().mean()) > 0.2


def test_sign_of_every_number_under_every_share(parties: TwoParties) -> None:
    x, server, client = every_share(torch.arange(-128, 128), 8)
    got = joined(*parties.run(lambda ops, x: ops.is_negative(x), [server], [client]))
    assert torch.equal(got.data, (x < 0).long())


def test_selection_of_every_number_under_every_share(parties: TwoParties) -> None:
    x, server, client = every_share(torch.arange(-16, 16), 6)
    for bit in (0, 1):
        for mask in (0, 1):
            condition = (
                Share(torch.full(x.shape, bit ^ mask), 1),
                Share(torch.full(x.shape, mask), 1),
            )
            for bits in (4, 6, 7, 25):
                got = joined(
                    *parties.run(
                        lambda ops, c, x: ops.select(c, x, bits),  # noqa: B023
                        [condition[0], server],
                        [condition[1], client],
                    )
                )
                assert torch.equal(got.data, Share.of(x * bit, bits).data)


def test_products_of_every_pair_under_every_share(parties: TwoParties) -> None:
    """All x and y of 5 bits with headroom, all 2^10 pairs of shares, into 10 bits."""
    values = torch.arange(-8, 8)
    x, x_server, x_client = every_share(values, 5)
    pairs = torch.cartesian_prod(torch.arange(x.numel()), torch.arange(x.numel()))
    first, second = pairs.unbind(1)

    def flat(share: Share, index: torch.Tensor) -> Share:
        return share.reshape(-1)[index]

    got = joined(
        *parties.run(
            lambda ops, x, y: ops.mul(x, y, 10),
            [flat(x_server, first), flat(x_server, second)],
            [flat(x_client, first), flat(x_client, second)],
        )
    )
    flat_x = x.reshape(-1)
    assert torch.equal(integers(got), flat_x[first] * flat_x[second])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_products_at_any_widths(parties: TwoParties, data: st.DataObject) -> None:
    n = data.draw(st.integers(3, 31), "bits of x")
    m = data.draw(st.integers(3, 31), "bits of y")
    bits = data.draw(st.integers(1, n + m), "bits of the product")
    x = uniform((40,), -(1 << (n - 2)), 1 << (n - 2))
    y = uniform((40,), -(1 << (m - 2)), 1 << (m - 2)).flip(0)
    got = parties.compute(lambda ops, x, y: ops.mul(x, y, bits), secret(x, n), secret(y, m))
    assert torch.equal(got.data, Share.of(x * y, bits).data)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_resizing_at_any_widths(parties: TwoParties, data: st.DataObject) -> None:
    n = data.draw(st.integers(4, 62), "bits of x")
    shift = data.draw(st.integers(0, n - 3), "shift")
    bits = data.draw(st.integers(1, 62), "bits of the result")
    x = uniform((40,), -(1 << (n - 2)), 1 << (n - 2))
    got = parties.compute(lambda ops, x: ops.rescale(x, shift, bits), secret(x, n))
    above = Share.of(got.data - (x >> shift), bits).data
    assert bool(((above == 0) | ((above == 1) & (shift > 0))).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 62), st.integers(1, 70))
def test_comparison_at_any_width(parties: TwoParties, bits: int, count: int) -> None:
    x = uniform((count,), -(1 << (bits - 1)), 1 << (bits - 1))
    got = parties.compute(lambda ops, x: ops.is_negative(x), secret(x, bits))
    assert torch.equal(got.data, (x < 0).long())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 41), st.integers(1, 3), st.booleans())
def test_maximum_of_any_length(parties: TwoParties, length: int, rows: int, ties: bool) -> None:
    x = uniform((rows, length), -2, 2) if ties else uniform((rows, length), -511, 512)
    got = parties.compute(lambda ops, x: ops.max(x), secret(x, 11))
    assert torch.equal(integers(got), x.amax(1))


def test_matrix_products_in_several_rounds(
    parties: TwoParties, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and rows that do not fit into one round."""
    x, y = uniform((3, 5, 4), -99, 99), uniform((3, 4, 6), -99, 99)
    for limit in (2 * 30 * 4 * 6 * 2, 2 * 30 * 4 * 6 * 6, 1):
        monkeypatch.setattr("otpipe.secure.products.MAX_MATMUL_RESULTS", limit)
        got = parties.compute(lambda ops, x, y: ops.matmul(x, y, 30), secret(x, 30), secret(y, 30))
        assert torch.equal(integers(got), x @ y)
