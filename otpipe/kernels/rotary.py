"""Rotary embedding of a block of rows, fused with the writes that attention wants next.

One pass over the fused q/k/v rows leaves the queries grouped by key head, ready to be multiplied,
and the keys and values at their positions in the cache. The plain-torch twin is
:meth:`otpipe.model.clear_ops.ClearExecutor.attention`.

Shape suffixes: T rows, P positions, F features of a fused row, K key/value heads, G query heads a
key/value head, D head size.
"""

from __future__ import annotations

from otpipe.kernels.cpu import Array, kernel


@kernel
def _rotate(x: Array, cos: Array, sin: Array, out: Array) -> None:
    half = x.shape[0] // 2
    for j in range(half):
        out[j] = x[j] * cos[j] + x[j + half] * sin[j]
        out[j + half] = x[j + half] * cos[j + half] + x[j] * sin[j + half]


@kernel
def rotate_rows(
    qkv_TF: Array,
    cos_TD: Array,
    sin_TD: Array,
    q_KTGD: Array,
    keys_KPD: Array,
    values_KPD: Array,
    start: int,
) -> None:
    """Rotate queries and keys, and put keys and values at positions start, start + 1, ...

    Args:
        qkv_TF: float32 (T, (K G + 2 K) D): queries, keys, values of every row.
        cos_TD, sin_TD: float32 (T, D); the first half of the sines negated.
        q_KTGD: float32 (K, T, G, D), overwritten with the rotated queries.
        keys_KPD, values_KPD: float32 (K, P, D), P >= start + T; T positions are overwritten.
    """
    num_rows = qkv_TF.shape[0]
    K, _, G, D = q_KTGD.shape
    for t in range(num_rows):
        row, cos, sin = qkv_TF[t], cos_TD[t], sin_TD[t]
        for k in range(K):
            for g in range(G):
                at = (k * G + g) * D
                _rotate(row[at : at + D], cos, sin, q_KTGD[k, t, g])
            at = (K * G + k) * D
            _rotate(row[at : at + D], cos, sin, keys_KPD[k, start + t])
            at += K * D
            values_KPD[k, start + t, :] = row[at : at + D]
