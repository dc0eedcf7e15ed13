"""Private logits are those of the plaintext model: the sample's text, and planted outliers.

Arithmetic and roundings of both parties, on INSECURE ideal transfers. The whole held-out text and
a subset on the real stack: ``benchmarks/private_fidelity.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import build_checkpoint, transformers_logits, transformers_model
from model_parties import PrivateModel, float_reference, load
from servers import SAMPLE
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from otpipe.model.program import forward

Report = Callable[[str, object], None]


def private_logits(directory: Path, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Of both parties, and of the same integer weights in float32."""
    description, weights = load(directory)
    got = PrivateModel(description, weights, len(token_ids), attention="ideal").forward(token_ids)
    reference = float_reference(description, weights)
    same = forward(reference, token_ids, reference.new_cache(), "all")
    assert got is not None and same is not None
    return got, same


def agreement(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(1) == other.argmax(1)).double().mean())


def test_text_of_the_sample_model(record_property: Report) -> None:
    """Perplexity within 1 %, and the same likeliest token under teacher forcing."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    text = (SAMPLE / "heldout.txt").read_text("utf-8")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:64]
    got, same = private_logits(SAMPLE, tokens)
    original = transformers_logits(transformers_model(SAMPLE), tokens)
    target = torch.tensor(tokens[1:])
    ours, plain = (
        math.exp(functional.cross_entropy(logits[:-1].double(), target))
        for logits in (got, original)
    )
    record_property("perplexity private, float32", (ours, plain))
    assert ours == pytest.approx(plain, rel=1e-2)
    assert agreement(got, original) >= 0.97 and agreement(got, same) >= 0.98
    error = float((got - same).norm() / same.norm())
    record_property("relative error of the arithmetic", error)
    assert error < 1e-3


def test_outliers_keep_the_likeliest_token(tmp_path: Path, record_property: Report) -> None:
    """Residual channels of 1e4, gates of 200, scores of 300; against the same integer weights.

    (Rounding such random weights to 8 bits moves a third of the likeliest tokens, in public mode
    as well: that is not what this is about.)
    """
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 400, (70,), generator=generator).tolist()
    build_checkpoint(
        tmp_path,
        hidden_size=256,
        intermediate_size=600,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=400,
        outlier_tokens=tokens,
        outlier_score=300.0,
    )
    got, same = private_logits(tmp_path, tokens)
    error = float((got - same).norm() / same.norm())
    record_property("relative error of the arithmetic", error)
    assert agreement(got, same) >= 0.97 and error < 2e-2
