"""What is measured of the secure operations: each alone, and the parts of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from otpipe.model.clear_ops import RopeTables
from otpipe.model.spec import RopeSpec
from otpipe.secure import Cost, DecoderFormats, Share, cost_of
from otpipe.secure.cost import operand
from otpipe.secure.decoder import (
    HeadShapes,
    ObliviousProducts,
    ShareCache,
    attention,
    rms_norm,
    swiglu,
)
from otpipe.secure.functions import exp, reciprocal, reciprocal_sqrt, silu
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rounds import Step

FORMATS = DecoderFormats()


@dataclass(frozen=True)
class Work:
    """One thing to measure.

    Attributes:
        name: what it is.
        elements: that a figure "an element" divides by.
        operands: (shape, bits, frac) of its secrets.
        program: from operations and shares to the step.
    """

    name: str
    elements: int
    operands: tuple[tuple[tuple[int, ...], int, int], ...]
    program: Callable[..., Step[Any]]

    @property
    def cost(self) -> Cost:
        """What one run costs."""
        return cost_of(lambda ops: self.program(ops, *(operand(*each) for each in self.operands)))


class FreeProducts:
    """Takes both products of attention as made: zero shares, without a message.

    What remains of attention then costs what it costs whatever makes the products.
    """

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """Scores of 0."""
        yield from ()
        shape = (*q_KRD.shape[:2], keys_KPD.shape[1])
        return Share(q_KRD.data.new_zeros(shape), bits, q_KRD.frac + keys_KPD.frac)

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """A context of 0."""
        yield from ()
        shape = (*weights_KRP.shape[:2], values_KPD.shape[2])
        return Share(weights_KRP.data.new_zeros(shape), bits, weights_KRP.frac + values_KPD.frac)


def operations(n: int) -> list[Work]:
    """Each operation and function, in the rings that a decoder layer has them in."""
    few = max(1, n // 64)
    return [
        Work("rescale, 40 to 44 bits", n, (((n,), 40, 22),), lambda o, x: o.rescale(x, 10, 44)),
        Work(
            "select, 22 bits", n, (((n,), 1, 0), ((n,), 22, 11)), lambda o, c, x: o.select(c, x, 22)
        ),
        Work(
            "mul, 22 and 22 to 40 bits",
            n,
            (((n,), 22, 11), ((n,), 22, 11)),
            lambda o, x, y: o.mul(x, y, 40),
        ),
        Work(
            "mul_rows, 46 and 29 to 46 bits",
            n,
            (((1,), 46, 24), ((1, n), 29, 12)),
            lambda o, x, y: o.mul_rows(x, y, 46),
        ),
        Work("square_sum, 25 to 49 bits", n, (((1, n), 25, 8),), lambda o, x: o.square_sum(x, 49)),
        Work("is_negative, 14 bits", n, (((n,), 14, 2),), lambda o, x: o.is_negative(x)),
        Work("max of 256, 14 bits", few * 256, (((few, 256), 14, 2),), lambda o, x: o.max(x)),
        Work(
            "lookup, 8 bits, 2 fields of 1",
            n,
            (((n,), 21, 11),),
            lambda o, x: o.lookup(x, 8, _two_bits, (1, 1)),
        ),
        Work("silu, 22 bits", n, (((n,), 22, 11),), silu),
        Work("exp, 23 to 51 bits", n, (((n,), 23, 12),), lambda o, x: exp(o, x, 51)),
        Work(
            "reciprocal, 15 octaves",
            few,
            (((few,), 34, 16),),
            lambda o, x: reciprocal(o, x, 15, 30, 47, 27),
        ),
        Work(
            "reciprocal_sqrt, 40 octaves",
            few,
            (((few,), 49, 16),),
            lambda o, x: reciprocal_sqrt(o, x, 8, 48, 46, 24, 71.5),
        ),
        Work(
            "matmul, 8 of 5 x 128 x 64, 40 bits",
            8 * 5 * 64,
            (((8, 5, 128), 40, 15), ((8, 128, 64), 40, 13)),
            lambda o, x, y: o.matmul(x, y, 40),
        ),
    ]


def _two_bits(base: torch.Tensor) -> list[torch.Tensor]:
    return [base & 1, base >> 20]


def layer_parts(shape: Mapping[str, int | bool], positions: int) -> list[Work]:
    """What a decoder layer has beside its linear maps, for one row at the last of ``positions``.

    Args:
        shape: "hidden", "heads", "kv" and "mlp", as in ``shapes.SHAPES``.
    """
    hidden, mlp = int(shape["hidden"]), int(shape["mlp"])
    heads = HeadShapes(int(shape["heads"]), int(shape["kv"]), hidden // int(shape["heads"]))
    K, D, N = heads.num_kv_heads, heads.head_dim, heads.num_heads
    cached = ((K, positions - 1, D), FORMATS.key.bits, FORMATS.key.frac)
    values = ((K, positions - 1, D), FORMATS.value.bits, FORMATS.value.frac)
    qkv = ((1, (N + 2 * K) * D), FORMATS.qkv.bits, FORMATS.qkv.frac)
    cos, sin = RopeTables(RopeSpec(theta=1e6), D).rows(positions - 1, positions)

    def attend(ops: SecureOperations, x: Share, keys: Share, values: Share) -> Step[Share]:
        cache = ShareCache(1, positions)
        cache.append(0, keys, values)
        cache.advance(positions - 1)
        return attention(ops, 0, x, cache, heads, cos, sin, FORMATS, FreeProducts())

    free = ObliviousProducts()
    scores, context = FORMATS.score.bits, FORMATS.context_bits
    return [
        Work("rms_norm", hidden, (((1, hidden), 44, 26),), lambda o, x: rms_norm(o, x, 1e-6)),
        Work(
            "rms_norm (second)", hidden, (((1, hidden), 44, 26),), lambda o, x: rms_norm(o, x, 1e-6)
        ),
        Work("attention without products", N * positions, (qkv, cached, values), attend),
        Work("swiglu", mlp, (((1, 2 * mlp), 44, 31),), swiglu),
        Work(
            "scores by OT",
            N * positions,
            (((K, N // K, D), scores, 15), ((K, positions, D), scores, 13)),
            lambda o, q, k: free.scores(o, 0, q, k, scores),
        ),
        Work(
            "context by OT",
            N * positions,
            (((K, N // K, positions), context, 16), ((K, positions, D), context, 11)),
            lambda o, w, v: free.context(o, 0, w, v, context),
        ),
    ]
