"""Checkpoints of published shapes with random weights, written as Hugging Face directories.

Sizes are those of the models' published config.json files. The weights are noise, so speed is
real and language is not.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

SHAPES: dict[str, dict[str, int | bool]] = {
    "0.5b": {"hidden": 896, "layers": 24, "heads": 14, "kv": 2, "mlp": 4864, "tied": True},
    "1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv": 2, "mlp": 8960, "tied": True},
    "7b": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "mlp": 18944, "tied": False},
    "14b": {"hidden": 5120, "layers": 48, "heads": 40, "kv": 8, "mlp": 13824, "tied": False},
    "72b": {"hidden": 8192, "layers": 80, "heads": 64, "kv": 8, "mlp": 29568, "tied": False},
}
VOCABULARY = {"0.5b": 151936, "1.5b": 151936, "7b": 152064, "14b": 152064, "72b": 152064}
LAYERS_A_SHARD = 8


def qwen_config(name: str, num_layers: int | None = None) -> Qwen2Config:
    """The config of Qwen2.5-``name``; ``num_layers`` shortens the model."""
    shape = SHAPES[name]
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=shape["hidden"],
        num_hidden_layers=num_layers or shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["mlp"],
        vocab_size=VOCABULARY[name],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


def write_outline(name: str, directory: Path, num_layers: int | None = None) -> Path:
    """Write a checkpoint whose matrices are holes in sparse files, for ``serve_noise.py``.

    A model of 72 billion parameters has 145 GB of bf16 weights, more than many a disk with a GPU.
    """
    config = qwen_config(name, num_layers)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    vectors = {n: t for n, t in tensors.items() if t.ndim == 1}
    values = {
        n: torch.full(t.shape, 0.0 if n.endswith("bias") else 1.0, dtype=t.dtype)
        for n, t in vectors.items()
    }
    save_file(
        values,
        directory / "vectors.safetensors",
        metadata={"format": "pt"},
    )
    index = dict.fromkeys(vectors, "vectors.safetensors")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor_name, tensor in tensors.items():
        if tensor_name not in vectors:
            begin, end = end, end + tensor.nbytes
            header[tensor_name] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            index[tensor_name] = "matrices.safetensors"
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / "matrices.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": end}, "weight_map": index})
    )
    return directory


def write_checkpoint(
    name: str, directory: Path, device: str, num_layers: int | None = None
) -> Path:
    """Write bf16 shards of normal noise (std 0.02) unless they are there already."""
    done = directory / "complete"
    if done.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = qwen_config(name, num_layers)
    config.save_pretrained(directory)
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads

    def noise(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()

    def layer(i: int) -> dict[str, torch.Tensor]:
        p = f"model.layers.{i}."
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        return {
            f"{p}self_attn.q_proj.weight": noise(hidden, hidden),
            f"{p}self_attn.q_proj.bias": noise(hidden),
            f"{p}self_attn.k_proj.weight": noise(kv, hidden),
            f"{p}self_attn.k_proj.bias": noise(kv),
            f"{p}self_attn.v_proj.weight": noise(kv, hidden),
            f"{p}self_attn.v_proj.bias": noise(kv),
            f"{p}self_attn.o_proj.weight": noise(hidden, hidden),
            f"{p}mlp.gate_proj.weight": noise(mlp, hidden),
            f"{p}mlp.up_proj.weight": noise(mlp, hidden),
            f"{p}mlp.down_proj.weight": noise(hidden, mlp),
            f"{p}input_layernorm.weight": ones,
            f"{p}post_attention_layernorm.weight": ones.clone(),
        }

    ends = {
        "model.embed_tokens.weight": noise(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = noise(config.vocab_size, hidden)
    num_shards = 0
    index: dict[str, str] = {}
    total = 0

    def write(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total, num_shards
        shard = f"model-{num_shards:05d}.safetensors"
        num_shards += 1
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, shard))
        total += sum(t.nbytes for t in tensors.values())

    write(ends)
    del ends
    for first in range(0, config.num_hidden_layers, LAYERS_A_SHARD):
        pending: dict[str, torch.Tensor] = {}
        for i in range(first, min(first + LAYERS_A_SHARD, config.num_hidden_layers)):
            pending.update(layer(i))
        write(pending)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    done.touch()
    return directory
