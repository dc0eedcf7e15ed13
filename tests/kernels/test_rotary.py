"""The rotary embedding of a block of rows against the framework's operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from otpipe.kernels.rotary import rotate_rows


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "head_dim", "start"),
    [(1, 1, 1, 2, 0), (5, 2, 7, 64, 3), (13, 3, 1, 10, 0), (4, 8, 5, 128, 29)],
)
def test_queries_keys_and_values_go_where_attention_wants_them(
    rows: int, kv_heads: int, group: int, head_dim: int, start: int
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    heads = kv_heads * group
    qkv = torch.randn((rows, heads + 2 * kv_heads, head_dim), generator=generator)
    angles = torch.rand((rows, head_dim // 2), generator=generator) * 6
    cos = angles.cos().repeat(1, 2)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    cache = torch.randn((2, kv_heads, start + rows + 2, head_dim), generator=generator)
    want_cache = cache.clone()
    rotated = qkv * cos[:, None] + torch.roll(qkv, head_dim // 2, dims=2) * sin[:, None]
    here = slice(start, start + rows)
    want_cache[0, :, here] = rotated[:, heads : heads + kv_heads].transpose(0, 1)
    want_cache[1, :, here] = qkv[:, heads + kv_heads :].transpose(0, 1)
    want_q = rotated[:, :heads].view(rows, kv_heads, group, head_dim).transpose(0, 1)
    queries = np.empty((kv_heads, rows, group, head_dim), np.float32)
    keys, values = cache.numpy()

    rotate_rows(qkv.flatten(1).numpy(), cos.numpy(), sin.numpy(), queries, keys, values, start)

    np.testing.assert_allclose(queries, want_q.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(cache.numpy(), want_cache.numpy(), rtol=1e-6, atol=1e-6)
