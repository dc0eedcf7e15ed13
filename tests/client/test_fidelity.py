"""Private logits are those of the plaintext int8 model: the sample's text, and wide layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    build_checkpoint,
    dequantised_transformers_model,
    relative_error,
    transformers_logits,
    transformers_model,
)
from servers import SAMPLE, local_server
from torch import Tensor
from torch.nn import functional

from otpipe import Client
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor

NUM_TEXT_TOKENS = 400
NUM_GREEDY_TOKENS = 200

Report = Callable[[str, object], None]


@pytest.fixture(scope="module")
def sample_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with (
        local_server(SAMPLE, world_size=2) as server,
        Client(server.address, tmp_path_factory.mktemp("store")) as client,
    ):
        client.prepare(1024)
        yield client


@pytest.fixture(scope="module")
def sample_reference() -> PlaintextExecutor:
    return PlaintextExecutor.from_checkpoint(SAMPLE, quantised=True)


def plain_logits(executor: PlaintextExecutor, token_ids: Sequence[int]) -> Tensor:
    logits = forward(executor, token_ids, executor.new_cache(), "all")
    assert logits is not None
    return logits


def perplexity(logits_TV: Tensor, token_ids: Sequence[int]) -> float:
    target = torch.tensor(token_ids[1:])
    return math.exp(functional.cross_entropy(logits_TV[:-1].double(), target))


def test_heldout_perplexity_is_that_of_the_plaintext_model(
    sample_client: Client, sample_reference: PlaintextExecutor, record_property: Report
) -> None:
    text = (SAMPLE / "heldout.txt").read_text("utf-8")
    tokens = sample_client.encode(text, raw=True)[:NUM_TEXT_TOKENS]
    private = sample_client.forward(tokens)
    plain = plain_logits(sample_reference, tokens)
    with torch.no_grad():
        original = transformers_model(SAMPLE)(torch.tensor([tokens])).logits[0]
    ours, int8, floats = (perplexity(logits, tokens) for logits in (private, plain, original))
    record_property("perplexity otpipe, int8, float32", (ours, int8, floats))
    assert ours == pytest.approx(int8, rel=1e-3)
    assert ours == pytest.approx(floats, rel=1e-2)
    assert floats < 100  # the text is the model's language
    error = relative_error(private, plain)
    record_property("relative error of logits", error)
    assert error < 1e-3
    assert float((private.argmax(1) == plain.argmax(1)).float().mean()) > 0.99


def test_greedy_text_is_that_of_the_plaintext_model(
    sample_client: Client, sample_reference: PlaintextExecutor
) -> None:
    """Every one of 200 tokens; the text goes on where the held-out text begins."""
    text = (SAMPLE / "heldout.txt").read_text("utf-8")
    prompt = sample_client.encode(text, raw=True)[:24]
    private = list(sample_client.generate_ids(prompt, NUM_GREEDY_TOKENS))
    cache, pending = sample_reference.new_cache(), prompt
    plain: list[int] = []
    for _ in range(NUM_GREEDY_TOKENS):
        logits = forward(sample_reference, pending, cache)
        assert logits is not None
        plain.append(int(logits[0].argmax()))
        pending = plain[-1:]
    assert len(set(plain)) > 20, "a text that repeats itself would prove little"
    assert private == plain


WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3000,
    "num_heads": 16,
    "num_kv_heads": 4,
    "vocab_size": 2000,
}
WIDE_TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 2000, 40)]


@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
def test_wide_layers(outliers: bool, tmp_path: Path, record_property: Report) -> None:
    """Rows of 3000 products; with outliers, activations of 1e4 and gates of 200 beside small ones.

    One pass for most of the text, then single tokens.
    """
    directory = build_checkpoint(
        tmp_path / "model", outlier_tokens=WIDE_TOKENS if outliers else None, **WIDE
    )
    with local_server(directory) as server, Client(server.address, tmp_path / "pads") as client:
        client.prepare(64)
        cache = client.mode.executor.new_cache()
        passes = [WIDE_TOKENS[:32], *([token] for token in WIDE_TOKENS[32:])]
        parts = [forward(client.mode.executor, tokens, cache, "all") for tokens in passes]
    got = torch.cat([part for part in parts if part is not None])
    model = dequantised_transformers_model(directory)
    with torch.no_grad():
        float32 = model(torch.tensor([WIDE_TOKENS])).logits[0]
    error = relative_error(got, float32)
    exact = transformers_logits(model, WIDE_TOKENS)  # the same model in float64
    record_property("relative error of logits", error)
    record_property("against float64", relative_error(got, exact))
    record_property("transformers float32 against float64", relative_error(float32, exact))
    assert error <= 1e-3
