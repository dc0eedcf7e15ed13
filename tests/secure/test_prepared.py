"""Matrix products from prepared products of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from two_parties import PlainOperations, TwoParties, connect, integers, secret, uniform

from otpipe.secure import Share, cost_of
from otpipe.secure.cost import operand
from otpipe.secure.operations import SecureOperations
from otpipe.secure.prepared import Mask, multiply_opened, open_masked, prepare_product
from otpipe.secure.rounds import together


def cached_products(ops: SecureOperations, keys: Share, first: Share, second: Share) -> Any:
    """Two queries against the same opened keys: x keys^T, with one opening of the keys."""
    key_mask = Mask(ops.random(keys.shape, keys.bits))
    # The products of masks exist before any value does.
    query_masks = [Mask(ops.random(first.shape, first.bits)) for _ in range(2)]
    transposed = Mask(key_mask.share.transpose(1, 2))
    products = yield from together(*(prepare_product(ops, m, transposed) for m in query_masks))
    opened_keys = yield from open_masked(ops, keys, key_mask)
    results = []
    for query, mask, product in zip((first, second), query_masks, products, strict=True):
        opened = yield from open_masked(ops, query, mask)
        results.append(multiply_opened(ops, opened, opened_keys.transpose(1, 2), product))
    return results


@pytest.mark.parametrize("kind", ["ideal", "real", "plain"])
def test_products_of_opened_values_are_exact(kind: str) -> None:
    keys = secret(uniform((2, 5, 3), -(1 << 17), 1 << 17), 41, 9)
    queries = [secret(uniform((2, 2, 3), -(1 << 17), (1 << 17) + i), 41, 4) for i in range(2)]
    if kind == "plain":
        plain = PlainOperations()
        results = plain.run(cached_products(plain, keys, *queries))
    else:
        results = connect(kind).compute(cached_products, keys, *queries)
    for result, query in zip(results, queries, strict=True):
        assert (result.bits, result.frac) == (41, 13)
        want = integers(query) @ integers(keys).transpose(1, 2)
        assert torch.equal(integers(result), want)


def test_an_opening_costs_its_own_size_and_no_more() -> None:
    """A query of 128 features against any number of keys: 6 bytes a feature and direction."""

    def program(ops: SecureOperations) -> Any:
        return open_masked(ops, operand((1, 7, 128), 41), Mask(ops.random((1, 7, 128), 41)))

    cost = cost_of(program)
    assert (cost.rounds, cost.cots) == (1, 0)
    assert cost.to_server == cost.to_client == 7 * 128 * 6


def test_openings_are_uniform_and_independent_of_the_value() -> None:
    """What both parties learn, for two extreme values: top and bottom bytes are flat."""
    for value in (-(1 << 39), (1 << 39) - 1):
        parties: TwoParties = connect("ideal")
        x = secret(torch.full((1, 200, 200), value), 41)
        masks = [Mask(parties.server.random(x.shape, 41)), Mask(parties.client.random(x.shape, 41))]
        half = uniform((1, 200, 200), 0, 1 << 41)
        server, client = parties.run(
            open_masked,
            [Share.of(x.data - half, 41), masks[0]],
            [Share(half, 41), masks[1]],
        )
        assert torch.equal(server.difference, client.difference)
        for shift in (0, 33):
            counts = torch.bincount(((server.difference >> shift) & 255).reshape(-1), minlength=256)
            expected = server.difference.numel() / 256
            statistic = float(((counts - expected) ** 2 / expected).sum())
            assert abs(statistic - 255) < 6 * (2 * 255) ** 0.5


def test_a_mask_opens_one_value() -> None:
    plain = PlainOperations()
    mask = Mask(plain.random((1, 2, 2), 20))
    x = secret(torch.ones((1, 2, 2)), 20)
    plain.run(open_masked(plain, x, mask))
    with pytest.raises(RuntimeError, match="A mask opens one value; a second one would reveal"):
        plain.run(open_masked(plain, x, mask))


def test_a_mask_of_another_shape_or_ring_is_refused() -> None:
    plain = PlainOperations()
    x = secret(torch.ones((1, 2, 2)), 20)
    for mask in (Mask(plain.random((1, 2, 3), 20)), Mask(plain.random((1, 2, 2), 21))):
        with pytest.raises(ValueError, match=r"A mask Share\(.*\) does not fit Share\("):
            plain.run(open_masked(plain, x, mask))
