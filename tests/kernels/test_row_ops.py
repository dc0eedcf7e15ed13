"""The single-position kernels against the framework's operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from otpipe.kernels.row_ops import add_rows, attend_row, attend_rows, swiglu_row, swiglu_rows
from otpipe.model.clear_ops import causal_attention


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 4864])
def test_swiglu_equals_the_framework(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gate_up = torch.randn(2 * size, generator=generator) * 30
    gate_up[0] = -200.0
    out = np.empty(size, np.float32)

    swiglu_row(gate_up.numpy(), out)

    want = functional.silu(gate_up[:size].double()) * gate_up[size:].double()
    np.testing.assert_allclose(out, want.numpy(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("gate", [-1e30, -1e4, -89.0, -88.0, 0.0, 88.0, 1e4, 1e30])
def test_swiglu_saturates_as_silu_does(gate: float) -> None:
    out = np.empty(1, np.float32)

    swiglu_row(np.array([gate, 1.0], np.float32), out)

    want = functional.silu(torch.tensor(gate, dtype=torch.float64)).item()
    assert out[0] == pytest.approx(want, rel=1e-6, abs=1e-5)


def test_swiglu_keeps_what_is_not_a_number() -> None:
    out = np.empty(2, np.float32)

    swiglu_row(np.array([np.nan, 1.0, 1.0, np.inf], np.float32), out)

    assert np.isnan(out[0]) and np.isinf(out[1])


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "position"),
    [(1, 1, 2, 0), (2, 7, 64, 0), (2, 7, 64, 33), (3, 1, 10, 5), (8, 5, 128, 300)],
)
def test_attention_equals_the_framework(
    kv_heads: int, group: int, head_dim: int, position: int
) -> None:
    generator = torch.Generator().manual_seed(position + head_dim)
    heads = kv_heads * group
    qkv = torch.randn((heads + 2 * kv_heads, head_dim), generator=generator) * 3
    cache = torch.randn((2, kv_heads, position + 9, head_dim), generator=generator)
    angles = torch.rand(head_dim // 2, generator=generator) * 6
    cos, sin = angles.cos().repeat(2), torch.cat((-angles.sin(), angles.sin()))
    rotated = qkv * cos + torch.roll(qkv, head_dim // 2, dims=1) * sin
    want_cache = cache.clone()
    want_cache[0, :, position] = rotated[heads : heads + kv_heads]
    want_cache[1, :, position] = qkv[heads + kv_heads :]
    want = causal_attention(
        rotated[:heads].view(1, kv_heads, group, head_dim),
        want_cache[0, :, : position + 1],
        want_cache[1, :, : position + 1],
    )
    out = np.empty(heads * head_dim, np.float32)
    keys, values = cache.numpy()

    for k in range(kv_heads):  # heads are independent
        attend_row(
            qkv.view(-1).numpy(), cos.numpy(), sin.numpy(), keys, values, position, out, k, k + 1
        )

    np.testing.assert_allclose(out, want[0].numpy(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(cache, want_cache, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_rows", "start"), [(1, 0), (5, 0), (3, 17), (8, 120)])
def test_rows_of_a_prompt_attend_as_the_framework_does(num_rows: int, start: int) -> None:
    K, G, D, P = 2, 3, 24, start + num_rows
    generator = torch.Generator().manual_seed(num_rows)
    q_KTGD = 4 * torch.randn((K, num_rows, G, D), generator=generator)
    keys, values = torch.randn((2, K, P + 5, D), generator=generator)
    out = torch.full((num_rows, K * G * D), 7.0)
    attend_rows(q_KTGD.numpy(), keys.numpy(), values.numpy(), start, out.numpy())
    seen_TP = torch.ones((num_rows, P), dtype=torch.bool).tril(start)
    want = functional.scaled_dot_product_attention(
        q_KTGD.transpose(1, 2).reshape(K * G, num_rows, D).double(),
        keys[:, :P].repeat_interleave(G, 0).double(),
        values[:, :P].repeat_interleave(G, 0).double(),
        attn_mask=seen_TP,
    )
    torch.testing.assert_close(
        out.view(num_rows, K * G, D).transpose(0, 1).double(), want, rtol=1e-5, atol=1e-5
    )


def test_rows_are_added_and_activated_row_by_row() -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up, a = torch.randn((3, 14), generator=generator), torch.randn((3, 7), generator=generator)
    out = torch.empty((3, 7))
    swiglu_rows(gate_up.numpy(), out.numpy())
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(out, functional.silu(gate) * up)
    want = a + out
    add_rows(a.numpy(), out.numpy())
    assert torch.equal(a, want)
