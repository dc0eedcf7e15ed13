"""One list of decoder cases that the tests of every executor run.

A case is a checkpoint, a text and how the text is cut into passes: a prompt in one or several
chunks, then single tokens as in decoding. :func:`run_case` compares all logits with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    build_checkpoint,
    dequantised_transformers_model,
    relative_error,
    transformers_logits,
    transformers_model,
)
from torch import Tensor

from otpipe.model.program import Executor, forward

# Thirteen tokens below the smallest vocabulary, with repetitions.
TOKENS = (2, 71, 8, 28, 18, 28, 45, 90, 45, 23, 53, 60, 28)


@dataclass(frozen=True)
class Case:
    """``chunks`` are the numbers of tokens of the passes; they add up to ``len(token_ids)``."""

    name: str
    options: Mapping[str, Any] = field(hash=False)  # keyword arguments of build_checkpoint
    token_ids: tuple[int, ...] = TOKENS
    chunks: tuple[int, ...] = (7, 3, 1, 1, 1)

    def build(self, directory: Path) -> Path:
        """Write the checkpoint of this case."""
        return build_checkpoint(directory, **self.options)


CASES = (
    Case("qwen2_gqa_3_heads_1_kv", {}),
    Case(
        "qwen2_tied_6_heads_2_kv_bf16",
        {
            "hidden_size": 60,
            "num_heads": 6,
            "num_kv_heads": 2,
            "tied": True,
            "dtype": torch.bfloat16,
        },
        chunks=(1,) * len(TOKENS),
    ),
    Case(
        "qwen2_sharded_fp16",
        {
            "hidden_size": 56,
            "num_heads": 7,
            "dtype": torch.float16,
            "max_shard_size": "20KB",
            "num_layers": 3,
        },
        chunks=(5, 8),
    ),
    Case(
        "llama_head_dim_10_hidden_36",
        {"family": "llama", "hidden_size": 36, "head_dim": 10, "intermediate_size": 70},
        chunks=(len(TOKENS),),
    ),
    Case(
        "llama_all_biases_mha",
        {
            "family": "llama",
            "hidden_size": 40,
            "num_heads": 5,
            "num_kv_heads": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-5,
        },
    ),
    Case(
        "llama3_rope_tied_sharded_bf16",
        {
            "family": "llama",
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "rope": LLAMA3_ROPE,
            "tied": True,
            "max_shard_size": "20KB",
            "dtype": torch.bfloat16,
            "vocab_size": 131,
        },
    ),
    Case("llama_linear_rope", {"family": "llama", "rope": LINEAR_ROPE}),
    Case("one_layer_one_token", {"num_layers": 1}, token_ids=(5,), chunks=(1,)),
    # A seed with a small float32 error: cancellation of outliers amplifies rounding in others.
    Case("qwen2_outliers", {"outlier_tokens": TOKENS, "num_layers": 3, "seed": 3}),
    Case(
        "llama_outliers_tied",
        {"family": "llama", "outlier_tokens": TOKENS, "tied": True, "seed": 3},
    ),
)


@cache
def expected_logits(case: Case, directory: Path, quantised: bool) -> Tensor:
    """transformers' logits, float64 (rows, vocab), of the whole text in one pass."""
    load = dequantised_transformers_model if quantised else transformers_model
    return transformers_logits(load(directory), case.token_ids)


def case_logits(executor: Executor[Any, Any], case: Case) -> Tensor:
    """Logits (rows, vocab) of an executor whose logits are arrays, pass by pass, one cache."""
    kv_cache = executor.new_cache()
    ends = [0]
    for count in case.chunks:
        ends.append(ends[-1] + count)
    assert ends[-1] == len(case.token_ids), f"case {case.name} has chunks {case.chunks}"
    passes: list[Any] = [
        forward(executor, case.token_ids[first:last], kv_cache, logits_for="all")
        for first, last in pairwise(ends)
    ]
    assert kv_cache.length == len(case.token_ids)
    return torch.cat([torch.as_tensor(logits) for logits in passes])


def run_case(
    executor_factory: Callable[[Path], Executor[Any, Any]],
    case: Case,
    directory: Path,
    *,
    quantised: bool = True,
    tolerance: float = 1e-5,
) -> float:
    """Run one case and compare with transformers.

    Args:
        executor_factory: makes an executor of the checkpoint directory it is given.
        directory: the checkpoint, from the fixture ``case_directory``.
        quantised: whether the executor's weights are int8.
        tolerance: of the largest error of a logit, relative to the largest logit.

    Returns:
        The relative error.
    """
    got = case_logits(executor_factory(directory), case)
    want = expected_logits(case, directory, quantised)
    assert got.shape == want.shape, f"{case.name}: logits {got.shape}, expected {want.shape}"
    error = relative_error(got, want)
    assert error <= tolerance, f"{case.name}: relative error {error:.2e} over {tolerance:.0e}"
    return error
