"""Attention products from masks prepared by RLWE: exact, costs as computed, each mask once."""

from __future__ import annotations

import math
import socket
import threading
from typing import Any

import pytest
import torch
from product_parties import multiply, prepared
from torch import Tensor
from two_parties import (
    CPU,
    PlainOperations,
    TwoParties,
    connect,
    fixed,
    integers,
    joined,
    real,
    secret,
    split,
    uniform,
)

from otpipe.errors import ConnectionLost, ParameterError, UsageError
from otpipe.protocol.wire import FrameConnection
from otpipe.protocol.wire_channel import WireChannel
from otpipe.secure import DecoderFormats, Share, Step
from otpipe.secure.decoder import HeadShapes, ShareCache, attention
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts
from otpipe.secure.shares import random_ring

SMALL = AttentionSizes(HeadShapes(4, 2, 4), 40, 51)
ONE_HEAD = AttentionSizes(HeadShapes(1, 1, 2), 40, 51)
ODD = AttentionSizes(HeadShapes(9, 3, 5), 40, 51)


def exact(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """x y mod 2^bits by Python integers, (K, I, J)."""
    products = [
        ((a.numpy().astype(object) @ b.numpy().astype(object)) % (1 << bits)).tolist()
        for a, b in zip(x, y, strict=True)
    ]
    return torch.tensor(products)


def visible(first: int, stop: int, num_positions: int, group: int) -> Tensor:
    """bool (rows, positions) of the rows of positions first .. stop - 1."""
    row = torch.arange(first, stop).repeat_interleave(group)
    return torch.arange(num_positions) <= row[:, None]


def run_text(
    parties: TwoParties,
    made: list[PreparedProducts],
    sizes: AttentionSizes,
    passes: list[int],
    *,
    rows_at_once: int = 100,
) -> None:
    """A text in passes of several rows, against Python integers; secrets fill their whole rings.

    rows_at_once: positions queried in one call, as the decoder has it for long passes, while the
        keys and values of the whole pass are there from the first call on.
    """
    heads, group = sizes.heads, sizes.group
    K, D, total = heads.num_kv_heads, heads.head_dim, sum(passes)
    keys = Share(random_ring((K, total, D), sizes.score_bits, CPU), sizes.score_bits, 13)
    values = Share(random_ring((K, total, D), sizes.context_bits, CPU), sizes.context_bits, 11)
    done = 0
    for count in passes:
        first, done = done, done + count
        key_shares, value_shares = split(keys[:, :done]), split(values[:, :done])
        for lo in range(first, done, rows_at_once):
            hi = min(done, lo + rows_at_once)
            seen = visible(lo, hi, done, group)
            shape = (K, (hi - lo) * group, D)
            q = Share(random_ring(shape, sizes.score_bits, CPU), sizes.score_bits, 15)
            scores = multiply(parties, made, "scores", split(q), key_shares)
            assert (scores.bits, scores.frac) == (sizes.score_bits, 28)
            want = exact(q.data, keys.data[:, :done].transpose(1, 2), sizes.score_bits)
            assert torch.equal(scores.data, torch.where(seen, want, 0))

            shares = [
                torch.where(seen, random_ring((K, *seen.shape), sizes.context_bits, CPU), 0)
                for _ in range(2)
            ]
            w = tuple(Share(share, sizes.context_bits, 16) for share in shares)
            context = multiply(parties, made, "context", (w[0], w[1]), value_shares)
            assert (context.bits, context.frac) == (sizes.context_bits, 27)
            want = exact(joined(*w).data, values.data[:, :done], sizes.context_bits)
            assert torch.equal(context.data, want)


def test_a_text_over_two_blocks_is_exact_and_costs_what_is_computed() -> None:
    """Prefill, a pass across the border of blocks, single rows; then the prepared end."""
    parties = connect("ideal")
    made = prepared(parties, SMALL, 4, 3)
    ends = parties.client_end, parties.server_end
    ahead = [SMALL.preparation_bytes(0, 4), SMALL.preparation_bytes(4, 7)]
    key_bytes = 32 * len(ahead)
    assert ends[0].sent_bytes["products.upload"] == sum(up for up, _ in ahead)
    assert ends[0].sent_bytes["products.key"] == key_bytes
    assert ends[1].sent_bytes["products.answers"] == sum(down for _, down in ahead)

    rounds = ends[0].rounds
    passes = [3, 2, 1, 1]
    run_text(parties, made, SMALL, passes)
    assert ends[0].rounds - rounds == 2 * len(passes)
    online = sum(SMALL.online_bytes(sum(passes[:i]), count) for i, count in enumerate(passes))
    assert ends[0].sent_bytes["secure.values"] == online
    assert ends[1].sent_bytes["secure.values"] == online

    q = secret(torch.ones((2, 2, 4)), 40)
    keys = secret(torch.ones((2, 8, 4)), 40)
    with pytest.raises(UsageError, match=r"8 positions, but .* prepared for 7; prepare more"):
        multiply(parties, made, "scores", split(q), split(keys))


def test_odd_numbers_of_heads_and_groups_are_exact() -> None:
    parties = connect("ideal")
    run_text(parties, prepared(parties, ODD, 3), ODD, [2, 1])


def test_rows_of_a_pass_may_come_in_several_calls() -> None:
    """Calls across the border of blocks, and before the last keys of the pass are seen."""
    parties = connect("ideal")
    made = prepared(parties, SMALL, 3, 3)
    run_text(parties, made, SMALL, [5, 1], rows_at_once=2)


def test_layers_have_masks_of_their_own() -> None:
    parties = connect("ideal")
    made = prepared(parties, ONE_HEAD, 1, layers=2)
    q = secret(torch.full((1, 1, 2), 3), 40)
    for layer in (1, 0):
        result = multiply(parties, made, "scores", split(q), split(q), layer=layer)
        assert integers(result).tolist() == [[[18]]]
    for side in made:
        first, second = (side._layers[layer].key_mask for layer in (0, 1))
        assert not torch.equal(first, second)


def test_the_decoders_attention_runs_on_prepared_products() -> None:
    """The same program in plaintext, and on shares with prepared products, three rows and one."""
    heads, formats = HeadShapes(2, 1, 4), DecoderFormats()
    sizes = AttentionSizes(heads, formats.score.bits, formats.context_bits)
    parties = connect("ideal")
    made = prepared(parties, sizes, 4)
    qkv = fixed(uniform((4, 16), -3000, 3000) / 1000, formats.qkv.bits, formats.qkv.frac)
    angles = torch.ones((4, 1, 4)) * math.sqrt(0.5)

    def program(ops: SecureOperations, qkv: Share, products: Any) -> Step[list[Share]]:
        cache, results = ShareCache(1), []
        for rows in (slice(0, 3), slice(3, 4)):
            cos = angles[rows]
            results.append(
                (yield from attention(ops, 0, qkv[rows], cache, heads, cos, cos, formats, products))
            )
            cache.advance(rows.stop - rows.start)
        return results

    plain = PlainOperations()
    want = plain.run(program(plain, qkv, None))
    server, client = split(qkv)
    got = joined(*parties.run(program, [server, made[0]], [client, made[1]]))
    for result, expected in zip(got, want, strict=True):
        assert float((real(result) - real(expected)).abs().max()) < 4e-3


def test_a_mask_opens_one_value() -> None:
    """Rows that were queried cannot be queried again, nor out of order; rings must agree."""
    parties = connect("ideal")
    made = prepared(parties, ONE_HEAD, 2)
    two = secret(torch.ones((1, 2, 2)), 40)
    one = two[:, :1]
    for wrong, keys in ((two, one), (secret(torch.ones((1, 3, 2)), 40), two)):
        with pytest.raises(ValueError, match="every position is queried once, in order"):
            multiply(parties, made, "scores", split(wrong), split(keys))
        parties = connect("ideal")
        made = prepared(parties, ONE_HEAD, 2)
    multiply(parties, made, "scores", split(one), split(one))
    multiply(parties, made, "scores", split(one), split(two))
    with pytest.raises(ValueError, match="every position is queried once, in order"):
        made[0].scores(parties.server, 0, one, two, 40).send(None)
    with pytest.raises(ValueError, match=r"prepared mod 2\^51, but .* mod 2\^40"):
        made[0].context(parties.server, 0, one, two, 40).send(None)


@pytest.mark.parametrize("method", ["scores", "context"])
def test_a_round_that_did_not_end_spends_its_masks(method: str) -> None:
    """Keys and values of that round would otherwise open a second time, beside other rows."""
    parties = connect("ideal")
    made = prepared(parties, ONE_HEAD, 2)
    bits = 40 if method == "scores" else 51
    one, two = (secret(torch.ones((1, rows, 2)), bits) for rows in (1, 2))
    weights = {1: secret(torch.ones((1, 1, 1)), bits), 2: secret(torch.ones((1, 1, 2)), bits)}
    step = getattr(made[1], method)
    rows = {1: one, 2: one} if method == "scores" else weights
    first = step(parties.client, 0, rows[1], one, bits)
    assert len(first.send(None)) == 1  # the message of the client
    with pytest.raises(ConnectionLost):
        first.throw(ConnectionLost("the server is gone"))
    with pytest.raises(UsageError, match="start the text again with new products"):
        step(parties.client, 0, rows[2], two, bits).send(None)
    with pytest.raises(UsageError, match="start the text again with new products"):
        made[1].prepare(1)


def test_a_preparation_that_did_not_end_is_the_last() -> None:
    parties = connect("ideal")
    made = prepared(parties, ONE_HEAD)
    parties.client_end.close()
    with pytest.raises(ConnectionLost):
        made[0].prepare(1)
    with pytest.raises(UsageError, match="start the text again with new products"):
        made[0].prepare(1)


def test_a_preparation_that_would_tell_too_much_is_refused_before_anything_is_sent() -> None:
    sizes = AttentionSizes(HeadShapes(64, 8, 128), 40, 51)
    parties = connect("ideal")
    made = PreparedProducts("client", parties.client_end, sizes, range(80))
    with pytest.raises(ParameterError, match="prepare fewer positions or layers at a time"):
        made.prepare(4096)
    assert not parties.client_end.sent_bytes
    with pytest.raises(ParameterError, match=r"mod 2\^52 cannot be prepared"):
        PreparedProducts("client", parties.client_end, AttentionSizes(sizes.heads, 40, 52), [0])


def test_a_preparation_runs_over_the_frames_of_a_connection() -> None:
    """The channel of the product, where payloads may be unaligned and sockets block when full."""
    left, right = socket.socketpair()
    ends = (
        WireChannel(FrameConnection(left), "client", 60.0),
        WireChannel(FrameConnection(right), "server", 60.0),
    )
    made = [
        PreparedProducts("server", ends[0], ONE_HEAD, [0]),
        PreparedProducts("client", ends[1], ONE_HEAD, [0]),
    ]
    thread = threading.Thread(target=made[0].prepare, args=(2,))
    thread.start()
    made[1].prepare(2)
    thread.join()
    up, down = ONE_HEAD.preparation_bytes(0, 2)
    assert ends[1].sent_bytes == {"products.key": 32, "products.upload": up}
    assert ends[1].received_bytes == {"products.answers": down}
    (server,), (client,) = (side._layers[0].blocks for side in made)
    keys = made[0]._layers[0].key_mask + made[1]._layers[0].key_mask
    want = exact(server.query + client.query, keys.transpose(1, 2), 40)
    assert torch.equal((server.scores + client.scores) & ((1 << 40) - 1), want)
    left.close()
    right.close()
