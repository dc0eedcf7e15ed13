"""The operations of a decoder layer on shares against float64, with the values of large models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from two_parties import TwoParties, connect, fixed, joined, real, secret, split

from otpipe.errors import ParameterError
from otpipe.model.clear_ops import RopeTables
from otpipe.model.spec import RopeSpec
from otpipe.secure import DecoderFormats, PlainOperations, Share, cost_of
from otpipe.secure.cost import operand
from otpipe.secure.decoder import (
    HeadShapes,
    ShareCache,
    attention,
    rms_norm,
    swiglu,
)
from otpipe.secure.formats import SMALL_RESIDUAL

FORMATS = DecoderFormats()
PLAIN = PlainOperations()


@pytest.fixture(scope="module")
def parties() -> TwoParties:
    return connect("ideal")


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Error of each row relative to its norm."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def residual_rows() -> Tensor:
    """Rows of small, usual and large scale; massive channels of 1e4 and more in two of them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn((6, 256), generator=generator, dtype=torch.float64)
    rows *= torch.tensor([0.1, 1, 8, 30, 1, 400], dtype=torch.float64)[:, None]
    rows[3, 7], rows[4, 3], rows[4, 5] = 9000, -12000, 32000
    return rows


def test_rms_norm(parties: TwoParties) -> None:
    x = residual_rows()
    got = parties.compute(lambda ops, x: rms_norm(ops, x, 1e-6), fixed(x, 44, 26))
    assert (got.bits, got.frac) == (FORMATS.norm_output.bits, FORMATS.norm_output.frac)
    want = functional.rms_norm(x, (256,), eps=1e-6)
    plain = PLAIN.run(rms_norm(PLAIN, fixed(x, 44, 26), 1e-6))
    for result in (got, plain):
        error = relative(real(result), want)
        assert float(error[0]) < 4e-3  # rms 0.1, of which a unit of 2^-12 is 0.24 %
        assert float(error[1:].max()) < 6e-4
        # Each entry: its own rounding over the rms, the scale's error, and a unit of the result.
        rms = x.square().mean(1, keepdim=True).sqrt()
        allowed = want.abs() * (2.0**-11 + 2.0**-6 / (rms * 16)) + 2.0**-12 / rms + 2.0**-12
        assert bool(((real(result) - want).abs() <= allowed).all())


def test_rms_norm_of_small_rows_in_their_format(parties: TwoParties) -> None:
    """Embeddings of rms 0.01, a row of zeros, and one of large entries."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((4, 256), generator=generator, dtype=torch.float64)
    x *= torch.tensor([0.01, 0.05, 0.0, 200.0], dtype=torch.float64)[:, None]
    got = parties.compute(lambda ops, x: rms_norm(ops, x, 1e-6, SMALL_RESIDUAL), fixed(x, 44, 26))
    want = functional.rms_norm(x, (256,), eps=1e-6)
    assert float(relative(real(got), want)[[0, 1, 3]].max()) < 3e-3
    assert float(real(got)[2].abs().max()) <= 2.0**-6 * 1.01  # 0 or a unit of x, times 1000


def test_rms_norm_refuses_an_eps_its_format_does_not_hold() -> None:
    with pytest.raises(ParameterError, match=r"rms_norm_eps 1e-08 allows 1/rms above 1024"):
        PLAIN.run(rms_norm(PLAIN, fixed(torch.ones(1, 8), 44, 26), 1e-8))


def test_swiglu(parties: TwoParties) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, 2, 300), generator=generator, dtype=torch.float64)
    x *= torch.tensor([0.3, 1, 5, 60, 100], dtype=torch.float64)[:, None, None]
    x[0, :, 0] = torch.tensor([210, 250])
    x[1, :, 0] = torch.tensor([-210, -200])
    x[2, :, :4] = torch.tensor([[500, -500, 11.5, -11.5], [130, 500, -500, 500]])
    x = x.clamp(-507, 507)
    gate, up = x.unbind(1)
    want = functional.silu(gate) * up
    assert float(want.abs().max()) < 2**16
    shared = fixed(x.reshape(5, 600), 44, 31)
    got = parties.compute(swiglu, shared)
    assert (got.bits, got.frac) == (44, 12)
    for result in (got, PLAIN.run(swiglu(PLAIN, shared))):
        error = (real(result) - want).abs()
        unit = 2.0**-11
        # The derivative of silu is at most 1.1; gate and up are off by up to a unit.
        allowed = (8.5e-4 + 3.1 * unit) * up.abs() + functional.silu(gate).abs() * unit + 2 * unit
        assert bool((error <= allowed).all())
    assert float(relative(real(got), want).max()) < 2e-3


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    name: str
    heads: HeadShapes
    chunks: tuple[int, ...]
    scale: float
    key_bias: float = 0.0


ATTENTION_CASES = (
    AttentionCase("small", HeadShapes(6, 2, 16), (5, 3, 1), 1.0),
    AttentionCase("scores_of_hundreds", HeadShapes(4, 2, 16), (9, 1), 9.0),
    AttentionCase("key_bias", HeadShapes(4, 4, 8), (1,) * 6, 2.0, 60.0),
    AttentionCase("one_head_odd_size", HeadShapes(1, 1, 10), (18,), 1.0),
)


def attention_inputs(case: AttentionCase) -> tuple[Tensor, RopeTables, Tensor, float]:
    """(qkv, rope, softmax attention in float64, largest score)."""
    shapes, total = case.heads, sum(case.chunks)
    K, D, N = shapes.num_kv_heads, shapes.head_dim, shapes.num_heads
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((total, N + 2 * K, D), generator=generator, dtype=torch.float64) * case.scale
    x[:, N : N + K] += case.key_bias * torch.randn((D,), generator=generator)
    x[:, N + K :] = torch.randn((total, K, D), generator=generator) * 20
    rope = RopeTables(RopeSpec(theta=1e6), D)
    cos, sin = (each.double() for each in rope.rows(0, total))
    rotated = x[:, : N + K] * cos + torch.roll(x[:, : N + K], D // 2, 2) * sin
    q = rotated[:, :N].view(total, K, N // K, D)
    scores = torch.einsum("tkgd,pkd->kgtp", q, rotated[:, N:]) / math.sqrt(D)
    visible = torch.ones((total, total), dtype=torch.bool).tril()
    largest = float(scores[..., visible].abs().max())
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    want = torch.einsum("kgtp,pkd->tkgd", weights, x[:, N + K :]).reshape(total, -1)
    return x.reshape(total, -1), rope, want, largest


def attend(ops: Any, qkv: Share, case: AttentionCase, rope: RopeTables) -> Any:
    """All chunks of a case, in order, over one cache."""
    cache, outputs, at = ShareCache(1, capacity=2), [], 0
    for rows in case.chunks:
        cos, sin = rope.rows(at, at + rows)
        outputs.append(
            (yield from attention(ops, 0, qkv[at : at + rows], cache, case.heads, cos, sin))
        )
        cache.advance(rows)
        at += rows
    return outputs


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_attention(parties: TwoParties, case: AttentionCase) -> None:
    qkv, rope, want, largest = attention_inputs(case)
    assert largest < 900
    shared = fixed(qkv, 44, 27)
    got = parties.compute(lambda ops, x: attend(ops, x, case, rope), shared)
    plain = PLAIN.run(attend(PLAIN, shared, case, rope))
    for results in (got, plain):
        error = real(Share(torch.cat([each.data for each in results]), 44, 12)) - want
        # Scores are right to about 0.01; values are about 20.
        assert float(error.abs().max()) < 0.03 + 1e-3 * float(want.abs().max())
        assert float(error.norm() / want.norm()) < 1e-3


def test_attention_in_blocks_of_rows(parties: TwoParties, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is cut into blocks of rows; each sees its own positions."""
    monkeypatch.setattr("otpipe.secure.decoder.MAX_ELEMENTS", 100)
    test_attention(parties, ATTENTION_CASES[0])
    test_swiglu(parties)
    test_rms_norm(parties)


def test_too_many_positions_are_refused() -> None:
    heads, rows = HeadShapes(1, 1, 2), 3
    rope = RopeTables(RopeSpec(theta=1e4), 2)
    formats = dataclasses.replace(FORMATS, max_positions=2)
    qkv = secret(torch.zeros((rows, 6)), 44, 27)
    with pytest.raises(ParameterError, match="3 positions, but the fixed-point formats hold"):
        PLAIN.run(
            attention(PLAIN, 0, qkv, ShareCache(1), heads, *rope.rows(0, rows), formats=formats)
        )


def test_an_interrupted_pass_is_overwritten() -> None:
    """What a pass wrote without ``advance`` does not stay."""
    cache = ShareCache(1, capacity=1)
    rows = [secret(torch.full((1, 2, 4), value), 40, 13) for value in (1, 2, 3)]
    cache.append(0, rows[0], rows[0])
    keys, _ = cache.append(0, rows[1], rows[1])
    assert keys.shape == (1, 2, 4) and bool((keys.data == 2).all())
    cache.advance(2)
    keys, values = cache.append(0, rows[2], rows[2])
    assert [int(v) for v in keys.data[0, :, 0]] == [2, 2, 3, 3]
    assert torch.equal(keys.data, values.data)


def test_the_budgets_of_a_14b_layer() -> None:
    """Bytes an element and rounds at the sizes of Qwen2.5-14B, 256 positions; OTs included."""
    activated = cost_of(lambda ops: swiglu(ops, operand((1, 2 * 13824), 44, 31)))
    assert activated.total_bytes <= 1500 * 13824 and activated.rounds == 6
    norm = cost_of(lambda ops: rms_norm(ops, operand((1, 5120), 44, 26), 1e-6))
    assert norm.total_bytes <= 900 * 5120 and norm.rounds == 7
    from otpipe.secure.decoder import _weights

    rows, positions = 40, 256
    softmax = cost_of(
        lambda ops: _weights(
            ops,
            operand((rows, positions), 40, 28),
            torch.ones((rows, positions), dtype=torch.bool),
            FORMATS,
        )
    )
    assert softmax.total_bytes <= 800 * rows * positions and softmax.rounds == 18


def test_decoder_operations_on_the_real_stack() -> None:
    """Norm, SwiGLU and attention once each, over oblivious transfers."""
    parties = connect("real")
    x = residual_rows()[1:3, :24]
    got = parties.compute(lambda ops, x: rms_norm(ops, x, 1e-6), fixed(x, 44, 26))
    assert float(relative(real(got), functional.rms_norm(x, (24,), eps=1e-6)).max()) < 1e-3
    gate, up = x.chunk(2, 1)
    got = parties.compute(swiglu, fixed(x, 44, 31))
    assert float((real(got) - functional.silu(gate) * up).abs().max()) < 0.05
    case = AttentionCase("real", HeadShapes(2, 1, 4), (3, 1), 1.0)
    qkv, rope, want, _ = attention_inputs(case)
    pairs = split(fixed(qkv, 44, 27))
    server, client = parties.run(lambda ops, x: attend(ops, x, case, rope), [pairs[0]], [pairs[1]])
    rows = torch.cat([real(each) for each in joined(server, client)])
    assert float((rows - want).abs().max()) < 0.03
