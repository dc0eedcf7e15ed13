"""Reading config.json and messages: what is supported, what is refused and with which sentence."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch
from checkpoints import LINEAR_ROPE, LLAMA3_ROPE
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from otpipe.errors import CheckpointError, ProtocolError
from otpipe.model.clear_ops import inverse_frequencies
from otpipe.model.spec import ModelSpec, RopeSpec

# The published config of Qwen2.5-14B (fields that matter).
QWEN_14B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# The published config of Llama-3.2-1B.
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def test_qwen_14b() -> None:
    spec = ModelSpec.from_config(QWEN_14B)
    assert (spec.head_dim, spec.q_size, spec.kv_size) == (128, 5120, 1024)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)
    assert spec.rope == RopeSpec(1e6)
    assert len(spec.maps) == 2 + 4 * 48
    assert [m.name for m in spec.maps[:6]] == [
        "embed",
        "layers.0.qkv",
        "layers.0.o",
        "layers.0.gate_up",
        "layers.0.down",
        "layers.1.qkv",
    ]
    assert [(m.out_features, m.in_features) for m in spec.maps[:5]] == [
        (5120, 152064),
        (7168, 5120),
        (5120, 5120),
        (27648, 5120),
        (5120, 13824),
    ]
    assert [m.ring_bits for m in spec.maps] == [8] + [32] * 193
    assert [m.has_bias for m in spec.maps[:3]] == [False, True, False]
    last = spec.maps[-1]
    assert (last.name, last.layer, last.out_features, last.in_features) == (
        "lm_head",
        None,
        152064,
        5120,
    )


def test_llama_1b() -> None:
    spec = ModelSpec.from_config(LLAMA_1B)
    assert spec.rope == RopeSpec(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert spec.tied_embeddings
    assert not spec.qkv_bias
    assert not any(m.has_bias for m in spec.maps)


def test_map_index_is_the_place_in_maps() -> None:
    spec = ModelSpec.from_config(QWEN_14B)
    for m in spec.maps:
        assert spec.map_index(m.kind, m.layer) == m.index
        assert spec.map(m.kind, m.layer) is m
        assert spec.maps[m.index] is m
    with pytest.raises(ValueError, match="layer 48 of 48 for a qkv map"):
        spec.map_index("qkv", 48)
    with pytest.raises(ValueError, match="belongs to no layer, got layer 0"):
        spec.map_index("lm_head", 0)


def test_norm_names() -> None:
    spec = replace(ModelSpec.from_config(QWEN_14B), num_layers=2)
    assert spec.norm_names == (
        "layers.0.input_norm",
        "layers.0.post_attention_norm",
        "layers.1.input_norm",
        "layers.1.post_attention_norm",
        "final_norm",
    )


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE, LINEAR_ROPE, LLAMA_1B["rope_scaling"]])
def test_rope_frequencies_equal_transformers_bit_for_bit(rope: dict[str, Any] | None) -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    rope = dict(rope or {"rope_type": "default"}) | {"rope_theta": 500000.0}
    config = LlamaConfig(**sizes, intermediate_size=8, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    spec = ModelSpec.from_config(config.to_dict())
    assert torch.equal(inverse_frequencies(spec.rope, 64), model.model.rotary_emb.inv_freq)


def test_both_spellings_of_rope_parameters() -> None:
    old = ModelSpec.from_config(LLAMA_1B)
    new_config = {k: v for k, v in LLAMA_1B.items() if k not in ("rope_scaling", "rope_theta")}
    new_config["rope_parameters"] = LLAMA_1B["rope_scaling"] | {"rope_theta": 500000.0}
    assert ModelSpec.from_config(new_config) == old
    oldest = LLAMA_1B | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelSpec.from_config(oldest).rope == RopeSpec(500000.0, "linear", 2.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True},  # max_window_layers is 70: no layer slides
        {"layer_types": ["full_attention"] * 48},
        {"use_sliding_window": True, "max_window_layers": 10, "sliding_window": 32768},
        {"num_key_value_heads": None},
        {"architectures": None},
        {"hidden_act": "swish"},
        {"num_experts": 0, "quantization_config": None},
    ],
)
def test_harmless_settings_are_accepted(changes: dict[str, Any]) -> None:
    spec = ModelSpec.from_config(QWEN_14B | changes)
    assert spec.num_kv_heads == (40 if "num_key_value_heads" in changes else 8)


SLIDING = "uses a sliding window or another partial attention"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3'; supported are 'qwen2' (Qwen2ForCausalLM)"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe'; supported are"),
        ({"model_type": None}, "model_type None; supported are"),
        ({"architectures": ["Qwen2ForReward"]}, "architectures ['Qwen2ForReward']; supported are"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq); supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported is 'silu'"),
        ({"num_experts": 8}, "num_experts 8; supported are dense models only"),
        ({"use_qk_norm": True}, "use_qk_norm set; supported are models without query/key norms"),
        ({"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 4096}, SLIDING),
        ({"layer_types": ["sliding_attention"] * 48, "sliding_window": 4096}, SLIDING),
        ({"layer_types": ["chunked_attention"]}, SLIDING),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'; supported are"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'; supported are"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope type 'dynamic'; supported are"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks 'factor' in its llama3 rope"),
        ({"rope_scaling": [1]}, "rope parameters [1], not an object"),
        ({"rope_theta": -1.0}, "rope theta -1.0, which must be a number from 1 to"),
        ({"rope_theta": "big"}, "rope_theta 'big', which must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; supported is 1.0"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "5120"}, "hidden_size '5120', which must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers True, which must be an integer"),
        ({"num_hidden_layers": 0}, "num_layers 0, which must be an integer from 1 to 1024"),
        ({"num_attention_heads": 7}, "hidden_size 5120 for 7 attention heads and no head_dim"),
        ({"num_attention_heads": 0}, "hidden_size 5120 for 0 attention heads"),
        ({"num_key_value_heads": 7}, "40 attention heads over 7 key/value heads"),
        ({"head_dim": 127}, "head_dim 127, which must be even"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no', which must be a boolean"),
        ({"vocab_size": 1 << 40}, "vocab_size 1099511627776, which must be an integer from"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan, which must be a number"),
    ],
)
def test_unsupported_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        ModelSpec.from_config(QWEN_14B | changes)
    assert message in str(raised.value)
    assert "config.json" in str(raised.value)


@pytest.mark.parametrize("config", [QWEN_14B, LLAMA_1B])
def test_message_round_trip(config: dict[str, Any]) -> None:
    spec = ModelSpec.from_config(config)
    assert ModelSpec.from_dict(msgpack.unpackb(msgpack.packb(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_layers": 2.0},
        {"num_layers": True},
        {"head_dim": 3},
        {"hidden_size": -1},
        {"num_kv_heads": 3},
        {"rms_norm_eps": 1},
        {"rms_norm_eps": float("inf")},
        {"family": "gpt2"},
        {"family": ["qwen2"]},
        {"tied_embeddings": 1},
        {"rope": None},
        {"rope": {"theta": 1e4}},
        {"surplus": 1},
    ],
)
def test_bad_messages_are_refused(changes: dict[str, Any]) -> None:
    message = ModelSpec.from_config(QWEN_14B).to_dict() | changes
    with pytest.raises(ProtocolError, match="model description of the server has"):
        ModelSpec.from_dict(message)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(ModelSpec.from_config(QWEN_14B).to_dict())), value=JUNK)
def test_any_single_wrong_field_is_refused_or_valid(field: str, value: object) -> None:
    message = ModelSpec.from_config(QWEN_14B).to_dict() | {field: value}
    with contextlib.suppress(ProtocolError):
        assert ModelSpec.from_dict(message).to_dict() == message
