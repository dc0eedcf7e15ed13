"""The non-linear operations of a decoder layer on shares: an ``Executor`` less its linear maps.

Norm gains do not occur: RMSNorm(x) * g followed by W is RMSNorm(x) followed by W diag(g), so a
server whose gains are private folds them into the columns of W before quantising, which changes no
product of reals (docs/secure_operations.md, "Norm gains").

Shape suffixes: T rows (token positions), H features, P positions in the cache, K key/value heads,
G query heads per key/value head, D head size, R = K G T rows of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from otpipe.errors import ParameterError
from otpipe.secure.formats import DecoderFormats, Format
from otpipe.secure.functions import EXP_FRAC, exp, reciprocal, reciprocal_sqrt, silu
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rounds import Step, together
from otpipe.secure.shares import Share, concatenate

DEFAULT_FORMATS = DecoderFormats()


def to_format(ops: SecureOperations, x: Share, target: Format) -> Step[Share]:
    """x at the scale and in the ring of ``target``."""
    return ops.rescale(x, x.frac - target.frac, target.bits)


MAX_ELEMENTS = 1 << 17
"""Elements that one block of a program works on: about 4 KB each at the server, mostly tables."""


def in_blocks(
    step_of: Callable[[slice], Step[Share]], num_rows: int, elements_per_row: int
) -> Step[Share]:
    """A step for some rows at a time, one block after the other, so that memory is bounded.

    Rounds: those of a block, for every ``MAX_ELEMENTS`` elements.
    """
    step = max(1, MAX_ELEMENTS // elements_per_row)
    parts = []
    for lo in range(0, num_rows, step):
        parts.append((yield from step_of(slice(lo, min(num_rows, lo + step)))))
    return concatenate(parts)


# --- RMSNorm ------------------------------------------------------------------------------------


def rms_norm(
    ops: SecureOperations, x_TH: Share, eps: float, formats: DecoderFormats = DEFAULT_FORMATS
) -> Step[Share]:
    """x / sqrt(mean(x^2) + eps) of every row, without a gain.

    Args:
        x_TH: as ``formats.residual``.
        eps: of the model; at least 2^-20 with the default formats.

    Returns:
        (T, H) as ``formats.norm_output``.

    Range: |x| < 2^15, sum of x^2 of a row < 2^32 (``formats.square_sum``).
    Error: each x and each result is rounded, by less than 2^-12; the row's scale is off by 2^-13,
    by 2^-19.6 / rms^2, and at random by about 2^-9.3 / (rms sqrt(H)): rounding to the format
    ``square_input``. ``formats.SMALL_RESIDUAL`` is 16 times finer.
    Rounds: 7.

    Raises:
        ParameterError: eps is too small for the format of 1/rms.
    """
    T, hidden = x_TH.shape
    return (yield from in_blocks(lambda rows: _rms_norm(ops, x_TH[rows], eps, formats), T, hidden))


def _rms_norm(
    ops: SecureOperations, x_TH: Share, eps: float, formats: DecoderFormats
) -> Step[Share]:
    hidden = x_TH.shape[1]
    short = yield from to_format(ops, x_TH, formats.norm_input)
    coarse = yield from to_format(ops, x_TH, formats.square_input)
    squares = yield from ops.square_sum(coarse, formats.square_sum.bits)
    smallest = eps * hidden * 2.0**squares.frac
    if eps * formats.inverse_rms.limit**2 < 1 or smallest < 1:
        raise ParameterError(
            f"rms_norm_eps {eps:g} allows 1/rms above {formats.inverse_rms.limit:g}; take fewer "
            f"fraction bits for inverse_rms."
        )
    energy = ops.add_public(squares, round(smallest))
    inverse = yield from reciprocal_sqrt(
        ops,
        energy,
        math.floor(math.log2(smallest)),
        energy.bits - 1,
        formats.norm_product.bits,
        formats.inverse_rms.frac,
        math.sqrt(hidden),
    )
    product = yield from ops.mul_rows(inverse, short, formats.norm_product.bits)
    return (yield from to_format(ops, product, formats.norm_output))


# --- SwiGLU -------------------------------------------------------------------------------------


def swiglu(
    ops: SecureOperations, gate_up: Share, formats: DecoderFormats = DEFAULT_FORMATS
) -> Step[Share]:
    """silu(first half) * second half of every row.

    Args:
        gate_up: (T, 2 intermediate) as ``formats.gate_up``.

    Returns:
        (T, intermediate) as ``formats.swiglu_output``.

    Range: |gate|, |up| < 512, |product| < 2^16.
    Error: that of ``silu`` times up, plus silu times half a unit of up, plus a unit of the result.
    Rounds: 6.
    """
    T, width = gate_up.shape
    return (yield from in_blocks(lambda rows: _swiglu(ops, gate_up[rows], formats), T, width // 2))


def _swiglu(ops: SecureOperations, gate_up: Share, formats: DecoderFormats) -> Step[Share]:
    half = gate_up.shape[1] // 2
    gate = yield from to_format(ops, gate_up[:, :half], formats.gate)
    up = yield from to_format(ops, gate_up[:, half:], formats.up)
    activated = yield from silu(ops, gate)
    product = yield from ops.mul(activated, up, formats.swiglu_product.bits)
    return (yield from to_format(ops, product, formats.swiglu_output))


# --- attention ----------------------------------------------------------------------------------


class ShareCache:
    """One party's shares of rotated keys and of values, in all layers.

    int64: 16 bytes a feature and position in each of the parties, in tensors that grow by half.
    """

    def __init__(self, num_layers: int, capacity: int = 256) -> None:
        """``capacity``: positions to have room for at first."""
        self._length = 0
        self._capacity = max(1, capacity)
        self._layers: list[tuple[Share, Share] | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Positions that are complete in every layer."""
        return self._length

    def advance(self, num_rows: int) -> None:
        """Declare the next ``num_rows`` positions, written in every layer, complete."""
        self._length += num_rows

    def append(self, layer: int, keys_KTD: Share, values_KTD: Share) -> tuple[Share, Share]:
        """Write the positions after ``length``; all keys and values so far, (K, P, D) each."""
        start, end = self._length, self._length + keys_KTD.shape[1]
        held = self._layers[layer]
        grown = tuple(
            _with_room(None if held is None else held[which], new, start, max(end, self._capacity))
            for which, new in enumerate((keys_KTD, values_KTD))
        )
        self._layers[layer] = (grown[0], grown[1])
        grown[0].data[:, start:end] = keys_KTD.data
        grown[1].data[:, start:end] = values_KTD.data
        return grown[0][:, :end], grown[1][:, :end]


def _with_room(held: Share | None, new: Share, used: int, needed: int) -> Share:
    if held is not None and held.shape[1] >= needed:
        return held
    heads, _, head_dim = new.shape
    capacity = needed if held is None else max(needed, held.shape[1] + held.shape[1] // 2)
    data = new.data.new_zeros((heads, capacity, head_dim))
    if held is not None:
        data[:, :used] = held.data[:, :used]
    return Share(data, new.bits, new.frac)


@dataclass(frozen=True)
class HeadShapes:
    """num_heads query heads of head_dim features over num_kv_heads key/value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class AttentionProducts(Protocol):
    """How the two matrix products of attention are made; both are of two secrets."""

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """q k^T (K, R, P) mod 2^bits; both factors live in that ring."""

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """weights v (K, R, D) mod 2^bits; both factors live in that ring."""


class ObliviousProducts:
    """Both products by OT: about 16 KB a score at head size 128, more than all the rest of a token.

    The runtime has ``rlwe_products`` instead; plaintext multiplies by these.
    """

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """See :class:`AttentionProducts`."""
        return ops.matmul(q_KRD, keys_KPD.transpose(1, 2), bits)

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """See :class:`AttentionProducts`."""
        return ops.matmul(weights_KRP, values_KPD, bits)


def rotate(ops: SecureOperations, x_TND: Share, cos_TD: Tensor, sin_TD: Tensor, frac: int) -> Share:
    """Rotary embedding of N heads with public angles: local.

    Args:
        cos_TD, sin_TD: real numbers (T, 1, D), the first half of sin negated (``RopeTables.rows``),
            scaled as the result is to be; held at scale 2^-frac.

    Error: (|x| + |neighbour|) * 2^-(frac + 1), rounding of the angles' functions.
    """
    cos, sin = (
        (values.double() * 2.0**frac).round().to(torch.int64).to(ops.device)
        for values in (cos_TD, sin_TD)
    )
    half = x_TND.shape[2] // 2
    swapped = Share(torch.roll(x_TND.data, half, dims=2), x_TND.bits, x_TND.frac)
    return x_TND.times(cos, frac) + swapped.times(sin, frac)


def attention(
    ops: SecureOperations,
    layer: int,
    qkv: Share,
    cache: ShareCache,
    heads: HeadShapes,
    cos_TD: Tensor,
    sin_TD: Tensor,
    formats: DecoderFormats = DEFAULT_FORMATS,
    products: AttentionProducts | None = None,
) -> Step[Share]:
    """Rotary embedding, append to the cache, causal attention.

    Args:
        qkv: (T, (heads + 2 kv heads) * head_dim) as ``formats.qkv``; row i is position
            ``cache.length`` + i.
        cos_TD, sin_TD: (T, 1, D) of those positions (``model.clear_ops.RopeTables.rows``).
        products: how the matrix products are made; by OT if not given.

    Returns:
        (T, heads * head_dim) as ``formats.attention_output``.

    Range: |q|, |k| < 2^11 (q / sqrt(D) below 2^9), |v| < 256, |score| < 500, at most
    ``formats.max_positions`` positions.
    Error: scores to the rounding of q to 2^-15 and k to 2^-13 (times the other's norm) and 2^-12;
    weights as ``exp``; the division 2^-12.5 relative.
    Rounds: 3 + 4 ceil(log4 P) + 2 + 5 + 2, and those of the matrix products.

    Raises:
        ParameterError: more positions than the formats hold.
    """
    products = products or ObliviousProducts()
    K, D = heads.num_kv_heads, heads.head_dim
    G, T = heads.num_heads // K, qkv.shape[0]
    if cache.length + T > formats.max_positions:
        raise ParameterError(
            f"{cache.length + T} positions, but the fixed-point formats hold the sums of "
            f"{formats.max_positions}; take fewer fraction bits for value."
        )
    x_TND = qkv.reshape(T, heads.num_heads + 2 * K, D)
    rotated = heads.num_heads + K
    plain_TND, v_TKD = yield from together(
        to_format(ops, x_TND[:, :rotated], formats.rope_input),
        to_format(ops, x_TND[:, rotated:], formats.value),
    )
    extra = min(3, int(math.log2(D) / 2))  # 1 / sqrt(D) leaves room for as many bits of it
    scale = 1 / math.sqrt(D)
    q_TND = rotate(
        ops,
        plain_TND[:, : heads.num_heads],
        cos_TD * scale,
        sin_TD * scale,
        formats.rope_frac + extra,
    )
    k_TKD = rotate(ops, plain_TND[:, heads.num_heads :], cos_TD, sin_TD, formats.rope_frac)
    query = yield from to_format(ops, q_TND, formats.query)
    key = yield from to_format(ops, k_TKD, formats.key)
    keys_KPD, values_KPD = cache.append(layer, key.transpose(0, 1), v_TKD.transpose(0, 1))
    q_TKGD = query.reshape(T, K, G, D)
    visible_TP = _visible(T, keys_KPD.shape[1])

    def attend(rows: slice) -> Step[Share]:
        return _attend(
            ops, layer, q_TKGD[rows], keys_KPD, values_KPD, visible_TP[rows], formats, products
        )

    return (yield from in_blocks(attend, T, heads.num_heads * keys_KPD.shape[1]))


def _attend(
    ops: SecureOperations,
    layer: int,
    q_TKGD: Share,
    keys_KPD: Share,
    values_KPD: Share,
    visible_TP: Tensor,
    formats: DecoderFormats,
    products: AttentionProducts,
) -> Step[Share]:
    """Softmax attention of some rows, (T, K G D) as ``formats.attention_output``."""
    T, K, G, D = q_TKGD.shape
    P = keys_KPD.shape[1]
    q_KRD = q_TKGD.transpose(0, 1).reshape(K, T * G, D)
    scores = yield from products.scores(ops, layer, q_KRD, keys_KPD, formats.score.bits)
    visible_RP = visible_TP.repeat_interleave(G, 0).repeat(K, 1)  # R = K T G
    weights_RP = yield from _weights(ops, scores.reshape(K * T * G, P), visible_RP, formats)
    weights_KRP = weights_RP.reshape(K, T * G, P)
    context, inverse = yield from together(
        products.context(ops, layer, weights_KRP, values_KPD, formats.context_bits),
        _inverse_sum(ops, weights_RP.sum(1), P, formats),
    )
    short = yield from to_format(ops, context.reshape(K * T * G, D), formats.context)
    product = yield from ops.mul_rows(inverse, short, formats.attention_product.bits)
    mean = yield from to_format(ops, product, formats.attention_output)
    return mean.reshape(K, T, G, D).transpose(0, 1).reshape(T, K * G * D)


def _visible(num_rows: int, num_positions: int) -> Tensor:
    """bool (T, P): row i is position P - T + i and sees itself and those before."""
    full = torch.ones((num_rows, num_positions), dtype=torch.bool)
    return full.tril(num_positions - num_rows)


def _weights(
    ops: SecureOperations, scores_RP: Share, visible_RP: Tensor, formats: DecoderFormats
) -> Step[Share]:
    """exp(score - maximum of the row), 0 where not visible, in the context's ring.

    The maximum is of scores rounded to 1/4: it differs from the row's by less than that, which
    every weight has as a common factor, and the division by their sum takes it out. It costs half
    the bits of a comparison at full scale.
    """
    coarse = yield from to_format(ops, scores_RP, formats.score_coarse)
    low = yield from to_format(ops, scores_RP, formats.score_low)
    # What a row does not see is public: a score below all others, and a weight of 0.
    lowest = ops.public(
        torch.full((1,), -math.floor(formats.score.limit) << coarse.frac), coarse.bits, coarse.frac
    )
    seen = Share(torch.where(visible_RP.to(ops.device), coarse.data, lowest.data), coarse.bits)
    top = yield from ops.max(seen)
    # Multiplied by 2^(difference of the scales), a number mod 2^n is one mod 2^(n + difference).
    lift = low.frac - coarse.frac
    top = Share(top.low_bits(low.bits - lift).data << lift, low.bits, low.frac)
    below = low - top.reshape(-1, 1)
    if bool(visible_RP.all()):
        return (yield from exp(ops, below, formats.context_bits))
    places = tuple(index.to(ops.device) for index in visible_RP.nonzero(as_tuple=True))
    weights = yield from exp(ops, below[places], formats.context_bits)
    data = torch.zeros_like(seen.data)
    data[places] = weights.data
    return Share(data, weights.bits, weights.frac)


def _inverse_sum(
    ops: SecureOperations, total_R: Share, num_positions: int, formats: DecoderFormats
) -> Step[Share]:
    """1 / sum of weights; it is at least 0.77, the largest weight, and at most 1.65 P."""
    high = EXP_FRAC + math.ceil(math.log2(1.65 * num_positions + 1))
    return reciprocal(
        ops,
        total_R.low_bits(high + 2),
        EXP_FRAC - 1,
        high,
        formats.attention_product.bits,
        formats.inverse_sum.frac,
    )
