"""Tiny Hugging Face checkpoints, built with transformers, and models with dequantised weights.

Weights are random but sized so that every part of the decoder matters for the logits: scores vary,
gates open and close, and the biases are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import rotate_half

from otpipe.model.checkpoint import Checkpoint, map_parts, norm_tensors
from otpipe.model.reference import float_map

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that tiny head sizes have wavelengths in all three ranges.
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def build_checkpoint(
    directory: Path,
    *,
    family: str = "qwen2",
    num_layers: int = 2,
    hidden_size: int = 48,
    intermediate_size: int = 80,
    num_heads: int = 3,
    num_kv_heads: int = 1,
    head_dim: int | None = None,
    vocab_size: int = 101,
    max_positions: int = 512,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope: Mapping[str, Any] | None = None,
    rms_norm_eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    outlier_tokens: Sequence[int] | None = None,
    outlier_score: float | None = None,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint into ``directory`` and return it.

    Args:
        head_dim, attention_bias, mlp_bias: llama only. Qwen2 always has q/k/v biases.
        max_shard_size: such as "20KB", to get several shards and an index.
        outlier_tokens: plant the outliers of large models on these tokens.
        outlier_score: with them, the largest attention score of every layer.
    """
    config: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "rms_norm_eps": rms_norm_eps,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": 10000.0}),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model: PreTrainedModel
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    else:
        config |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
        if head_dim is not None:
            config["head_dim"] = head_dim
        model = LlamaForCausalLM(LlamaConfig(**config))
    randomise(model, seed)
    if outlier_tokens is not None:
        plant_outliers(model, outlier_tokens, outlier_score)
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    torch.nn.Module.to(model, dtype).save_pretrained(directory, **options)
    return directory


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill all parameters: weights keep the scale of activations, gains near 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


def plant_outliers(
    model: PreTrainedModel, token_ids: Sequence[int], score: float | None = None
) -> None:
    """Give the model the extreme values of real large ones when it reads ``token_ids``.

    - gate inputs reach +-200 in two channels of every layer;
    - q and k biases (where there are any) are near +-100 in two channels a head;
    - the first layer drives two residual channels to about 1e4 at the first token ("massive
      activations") and to at most 300 elsewhere; later norms have small gains there;
    - with ``score``, queries are scaled until that is the largest magnitude of a visible score.
    """
    layers = model.model.layers
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> Any:
        return module.register_forward_hook(
            lambda _module, inputs, output: seen.update(
                {f"{name}.in": inputs[0][0], f"{name}.out": output[0]}
            )
        )

    def run() -> None:
        with torch.no_grad():
            model(torch.tensor([list(token_ids)]))

    model.eval()
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        handles = [watch("gate", mlp.gate_proj), watch("down", mlp.down_proj)]
        with torch.no_grad():
            if attention.q_proj.bias is not None:
                head_dim = attention.head_dim
                # Different rotary pairs for q and k: real scores are large, but not 1e4.
                attention.q_proj.bias.view(-1, head_dim)[:, head_dim // 2 - 1] = 93.0
                attention.q_proj.bias.view(-1, head_dim)[:, -1] = -107.0
                attention.k_proj.bias.view(-1, head_dim)[:, head_dim // 2 - 2] = -98.0
                attention.k_proj.bias.view(-1, head_dim)[:, -2] = 110.0
            if score is not None:
                _scale_scores(model, attention, token_ids, score)
            run()
            gate_weight = mlp.gate_proj.weight
            for channel, target in ((3, 200.0), (7, -200.0)):
                reached = seen["gate.out"][:, channel]
                extreme = reached[reached.abs().argmax()]
                gate_weight[channel] *= target / extreme
            if layer is layers[0]:
                run()
                for channel, target in ((5, 1e4), (11, -9e3)):
                    wanted = torch.linspace(-300.0, 300.0, len(token_ids))
                    wanted[0] = target
                    mlp.down_proj.weight[channel] = torch.linalg.lstsq(
                        seen["down.in"], wanted[:, None], driver="gelsd"
                    ).solution[:, 0]
            else:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[[5, 11]] = 0.02
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        model.model.norm.weight[[5, 11]] = 0.02


def _scale_scores(
    model: PreTrainedModel, attention: torch.nn.Module, token_ids: Sequence[int], target: float
) -> None:
    """Scale the queries of one layer until its largest visible score is ``target``."""
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output[0]})
        )
        for name in ("q_proj", "k_proj")
    ]
    model(torch.tensor([list(token_ids)]))
    for handle in handles:
        handle.remove()
    D, T = attention.head_dim, len(token_ids)
    cos, sin = model.model.rotary_emb(seen["q_proj"][None], torch.arange(T)[None])
    heads = [seen[name].view(T, -1, D) for name in ("q_proj", "k_proj")]
    q, k = (x * cos[0, :, None] + rotate_half(x) * sin[0, :, None] for x in heads)
    scores = torch.einsum("thd,phd->htp", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    largest = float(scores.tril().abs().max()) * attention.scaling
    for parameter in attention.q_proj.parameters():
        parameter *= target / largest


def transformers_model(directory: Path) -> PreTrainedModel:
    """The checkpoint in float32, computed by transformers' plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def dequantised_transformers_model(directory: Path) -> PreTrainedModel:
    """As :func:`transformers_model`, every matrix replaced by its int8 version times its scales."""
    checkpoint = Checkpoint.open(directory)
    maps = checkpoint.load_maps(range(len(checkpoint.spec.maps)))
    state: dict[str, Tensor] = {}
    for linear_map in checkpoint.spec.maps:
        floats = float_map(maps[linear_map.index], linear_map)
        rows = floats.weight.t() if linear_map.kind == "embed" else floats.weight
        first = 0
        for part in map_parts(checkpoint.spec, linear_map):
            state[part.weight] = rows[first : first + part.rows]
            if part.bias is not None and floats.bias is not None:
                state[part.bias] = floats.bias[first : first + part.rows]
            first += part.rows
    norms = checkpoint.load_norms()
    state |= {tensor: norms[name] for name, tensor in norm_tensors(checkpoint.spec).items()}
    model = transformers_model(directory)
    if checkpoint.spec.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def transformers_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits of all positions, float64 (rows, vocab), in one pass; ``model`` becomes float64.

    With outliers, float32 products alone cost transformers an error near 1e-5: too much for a
    reference. (Its norms and softmax stay in float32.)
    """
    with torch.no_grad():
        return model.double()(torch.tensor([list(token_ids)])).logits[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``want``."""
    return float((got.cpu().double() - want.double()).abs().max() / want.abs().max())
