"""The decoder's non-linear steps for one position or a few, each one pass by one thread.

A decode step has hundreds of them on a few thousand numbers, where a framework's operator costs
more than its arithmetic. The twins they are tested against are in ``otpipe.model.clear_ops``.

Shape suffixes: T rows, P positions with room in the cache, K key/value heads, G query heads per
key/value head, D head size, i intermediate size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from otpipe.kernels.cpu import Array, float_kernel

_LOG2_E = np.float32(1.44269504088896341)
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_LARGEST_EXPONENT = np.float32(88.0)
_SMALLEST_EXPONENT = np.float32(-87.0)


def _typed_bitcast(typingctx: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), emit


#: the float32 with the bits of an int32
float_of_bits: Any = intrinsic(_typed_bitcast)


@float_kernel
def _exp(x: np.float32) -> np.float32:
    """e^x in float32 to 2 units in the last place, of x clipped to [-87, 88].

    Unlike the C library's it can be computed on a vector. Method and coefficients: Cephes, expf
    (Moshier 1989): x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, and 2^n from bits.
    """
    x = min(max(x, _SMALLEST_EXPONENT), _LARGEST_EXPONENT)
    n = np.float32(np.floor(np.float32(x * _LOG2_E + np.float32(0.5))))
    r = np.float32(np.float32(x - np.float32(n * _LN_2_HIGH)) - np.float32(n * _LN_2_LOW))
    y = np.float32(1.9875691500e-4)
    y = np.float32(y * r + np.float32(1.3981999507e-3))
    y = np.float32(y * r + np.float32(8.3334519073e-3))
    y = np.float32(y * r + np.float32(4.1665795894e-2))
    y = np.float32(y * r + np.float32(1.6666665459e-1))
    y = np.float32(y * r + np.float32(5.0000001201e-1))
    y = np.float32(y * r * r + r + np.float32(1.0))
    return np.float32(y * float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23))))


@float_kernel
def swiglu_row(gate_up: Array, out_i: Array) -> None:
    """out = silu(first half of gate_up) * second half; float32 (2 i,) and (i,)."""
    size = out_i.shape[0]
    for j in range(size):
        gate = gate_up[j]
        out_i[j] = gate / (np.float32(1.0) + _exp(-gate)) * gate_up[size + j]


@float_kernel
def swiglu_rows(gate_up_TI: Array, out_Ti: Array) -> None:
    """:func:`swiglu_row` of every row: float32 (T, 2 i) and (T, i)."""
    for t in range(out_Ti.shape[0]):
        swiglu_row(gate_up_TI[t], out_Ti[t])


@float_kernel
def add_rows(a_Tn: Array, b_Tn: Array) -> None:
    """a += b, float32."""
    for t in range(a_Tn.shape[0]):
        a, b = a_Tn[t], b_Tn[t]
        for j in range(a.shape[0]):
            a[j] += b[j]


@float_kernel
def attend_rows(
    q_KTGD: Array, keys_KPD: Array, values_KPD: Array, start: int, out_TF: Array
) -> None:
    """Causal softmax attention of rows whose keys and values are in the cache.

    Args:
        q_KTGD: float32, rotated queries; row t is position ``start`` + t and sees those up to it.
        keys_KPD, values_KPD: the cache.
        out_TF: float32 (T, K G D), heads in the order of the query.
    """
    num_kv_heads, num_rows, group, head_dim = q_KTGD.shape
    factor = np.float32(1.0 / np.sqrt(head_dim))
    query = np.empty(head_dim, np.float32)
    scores = np.empty(start + num_rows, np.float32)
    for k in range(num_kv_heads):
        for t in range(num_rows):
            seen = start + t + 1
            for g in range(group):
                for d in range(head_dim):
                    query[d] = q_KTGD[k, t, g, d] * factor
                at = (k * group + g) * head_dim
                _attend(
                    query, keys_KPD[k], values_KPD[k], scores[:seen], out_TF[t, at : at + head_dim]
                )


@float_kernel
def _attend(query: Array, key_PD: Array, value_PD: Array, scores: Array, out: Array) -> None:
    """out = softmax(query keys) values over the first positions, as many as ``scores`` holds."""
    _scores(query, key_PD, scores)
    peak = scores[0]
    for p in range(scores.shape[0]):
        peak = max(peak, scores[p])
    total = np.float32(0.0)
    for p in range(scores.shape[0]):
        weight = _exp(scores[p] - peak)
        scores[p] = weight
        total += weight
    _weighted_sum(scores, np.float32(1.0) / total, value_PD, out)


@float_kernel
def attend_row(
    qkv: Array,
    cos_D: Array,
    sin_D: Array,
    keys_KPD: Array,
    values_KPD: Array,
    position: int,
    out: Array,
    lo: int,
    hi: int,
) -> None:
    """Rotary embedding, append to the cache, and softmax attention of one position.

    Args:
        qkv: float32 ((K G + 2 K) D,): queries, keys and values.
        cos_D, sin_D: of this position; the sine carries the sign of the rotation's first half.
        keys_KPD, values_KPD: the cache; row ``position`` is written.
        position: the number of positions before this one.
        out: float32 (K G D,), heads in the order of the query.
        lo, hi: key/value heads to do.
    """
    num_kv_heads, head_dim = keys_KPD.shape[0], keys_KPD.shape[2]
    num_heads = out.shape[0] // head_dim
    group, seen = num_heads // num_kv_heads, position + 1
    factor = np.float32(1.0 / np.sqrt(head_dim))
    query = np.empty(head_dim, np.float32)
    scores = np.empty(seen, np.float32)
    for k in range(lo, hi):
        key, value = keys_KPD[k], values_KPD[k]
        _rotate(qkv, (num_heads + k) * head_dim, cos_D, sin_D, np.float32(1.0), key[position])
        start = (num_heads + num_kv_heads + k) * head_dim
        value[position] = qkv[start : start + head_dim]
        for head in range(k * group, (k + 1) * group):
            _rotate(qkv, head * head_dim, cos_D, sin_D, factor, query)
            _attend(query, key, value, scores, out[head * head_dim : (head + 1) * head_dim])


@float_kernel
def _scores(query_D: Array, keys_PD: Array, scores_P: Array) -> None:
    """Products of one query with the first keys; four at a time share each read of it."""
    seen, head_dim = scores_P.shape[0], query_D.shape[0]
    for p in range(0, seen - 3, 4):
        row_0, row_1, row_2, row_3 = keys_PD[p], keys_PD[p + 1], keys_PD[p + 2], keys_PD[p + 3]
        score_0 = score_1 = score_2 = score_3 = np.float32(0.0)
        for d in range(head_dim):
            q = query_D[d]
            score_0 += q * row_0[d]
            score_1 += q * row_1[d]
            score_2 += q * row_2[d]
            score_3 += q * row_3[d]
        scores_P[p], scores_P[p + 1], scores_P[p + 2], scores_P[p + 3] = (
            score_0,
            score_1,
            score_2,
            score_3,
        )
    for p in range(seen // 4 * 4, seen):
        row, score = keys_PD[p], np.float32(0.0)
        for d in range(head_dim):
            score += query_D[d] * row[d]
        scores_P[p] = score


@float_kernel
def _weighted_sum(weights_P: Array, factor: np.float32, values_PD: Array, out_D: Array) -> None:
    """factor * sum_p weights[p] values[p]."""
    seen = weights_P.shape[0]
    out_D[:] = np.float32(0.0)
    for p in range(0, seen - 3, 4):
        row_0, row_1, row_2, row_3 = (
            values_PD[p],
            values_PD[p + 1],
            values_PD[p + 2],
            values_PD[p + 3],
        )
        w_0, w_1 = weights_P[p] * factor, weights_P[p + 1] * factor
        w_2, w_3 = weights_P[p + 2] * factor, weights_P[p + 3] * factor
        for d in range(out_D.shape[0]):
            out_D[d] += w_0 * row_0[d] + w_1 * row_1[d] + w_2 * row_2[d] + w_3 * row_3[d]
    for p in range(seen // 4 * 4, seen):
        row, w = values_PD[p], weights_P[p] * factor
        for d in range(out_D.shape[0]):
            out_D[d] += w * row[d]


@float_kernel
def _rotate(
    qkv: Array, start: int, cos_D: Array, sin_D: Array, factor: np.float32, out_D: Array
) -> None:
    """out = factor * (x cos + roll(x, D / 2) sin) for the head that begins at ``start``."""
    half = cos_D.shape[0] // 2
    for d in range(half):
        low, high = qkv[start + d], qkv[start + half + d]
        out_D[d] = factor * (low * cos_D[d] + high * sin_D[d])
        out_D[half + d] = factor * (high * cos_D[half + d] + low * sin_D[half + d])
