"""What private weights cost in quality: sample model, greedy text, and planted outliers.

    python benchmarks/private_fidelity.py

Client and server run the private decoder program in two threads of this process. For the mass of
the tokens, oblivious transfers, preparation and attention's matrix products come from the tests'
INSECURE dealers (``tests/secure``), which hand out shares of the same results under fresh uniform
masks: the parties' arithmetic and every rounding are as with the cryptography, which is exact.
``--real-tokens`` tokens go through the real stack: RLWE preparation, and OTs for everything.
Compared with transformers on the checkpoint as it is (float32), with plaintext int8 of public mode,
and with the private mode's own integer weights in float32, which tells arithmetic from weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import harness
import torch
from fidelity import (
    SAMPLE,
    Logits,
    Score,
    reference_logits,
    table,
    transformers_logits,
    windows,
)
from torch import Tensor
from transformers import AutoTokenizer

from otpipe.model.private_description import PrivateDescription
from otpipe.model.private_weights import PrivateWeights
from otpipe.model.program import forward

sys.path[:0] = [str(harness.ROOT / "tests"), str(harness.ROOT / "tests" / "secure")]

from checkpoints import build_checkpoint, relative_error  # noqa: E402
from model_parties import PrivateModel, float_reference, load  # noqa: E402

OUTLIERS: Mapping[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1400,
    "num_heads": 8,
    "num_kv_heads": 2,
    "num_layers": 4,
    "vocab_size": 1000,
    "outlier_score": 300.0,
}
Weights = Mapping[int, PrivateWeights]


def private_logits(description: PrivateDescription, weights: Weights) -> Logits:
    """Two parties with ideal preparation, transfers and products; one pass for each text."""

    def logits(token_ids: Sequence[int]) -> Tensor:
        rows = PrivateModel(description, weights, len(token_ids), attention="ideal").forward(
            token_ids
        )
        assert rows is not None
        return rows

    return logits


def same_weights_logits(description: PrivateDescription, weights: Weights) -> Logits:
    """The private mode's integer weights in float32."""
    executor = float_reference(description, weights)

    def logits(token_ids: Sequence[int]) -> Tensor:
        rows = forward(executor, token_ids, executor.new_cache(), "all")
        assert rows is not None
        return rows

    return logits


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of positions with the same likeliest token."""
    return float((one.argmax(1) == other.argmax(1)).double().mean())


def heldout(
    ways: Mapping[str, Logits], token_ids: Sequence[int], window: int, say: Callable[[str], None]
) -> dict[str, Score]:
    """Scores over the windows of a text; errors are against the same weights in float32."""
    scores = {name: Score() for name in ways}
    done = 0
    for part in windows(token_ids, window):
        other = ways["private weights in float32"](part)
        for name, way in ways.items():
            scores[name].add(part, way(part), other)
        done += len(part)
        say(f"{done} tokens: perplexity {scores['otpipe private'].perplexity:.3f}")
    return scores


def greedy(ways: Mapping[str, Logits], prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Greedy text of the float32 checkpoint, given to the others token by token."""
    plain = ways["transformers float32"]
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(plain(text)[-1].argmax()))
    forced, chosen = text[:-1], torch.tensor(text[len(prompt) :])
    result: dict[str, Any] = {"tokens": num_tokens, "distinct": len(set(chosen.tolist()))}
    for name, way in ways.items():
        predicted = way(forced)[len(prompt) - 1 :].argmax(1)
        result[name] = float((predicted == chosen).double().mean())
    return result


def outliers(num_tokens: int) -> dict[str, Any]:
    """A model with the extremes of large ones: residuals 1e4, gates 200, scores 300."""
    generator = torch.Generator().manual_seed(11)
    token_ids = torch.randint(0, OUTLIERS["vocab_size"], (num_tokens,), generator=generator)
    with tempfile.TemporaryDirectory() as name:
        directory = build_checkpoint(Path(name), outlier_tokens=token_ids.tolist(), **OUTLIERS)
        description, weights = load(directory)
        ways = {
            "float32": transformers_logits(directory),
            "int8": reference_logits(directory, quantised=True),
            "same": same_weights_logits(description, weights),
            "private": private_logits(description, weights),
        }
        got = {key: way(token_ids.tolist()) for key, way in ways.items()}
    return {
        "tokens": num_tokens,
        "model": dict(OUTLIERS),
        "same_top_token_as_its_weights_in_float32": agreement(got["private"], got["same"]),
        "largest_error": relative_error(got["private"], got["same"]),
        "same_top_token_as_float32": agreement(got["private"], got["float32"]),
        "public_int8_same_top_token_as_float32": agreement(got["int8"], got["float32"]),
    }


def real(
    description: PrivateDescription,
    weights: Weights,
    token_ids: Sequence[int],
    same: Logits,
    prompt: int,
) -> dict[str, Any]:
    """The whole cryptography: a prompt in one pass, then single tokens."""
    started_s = time.perf_counter()
    model = PrivateModel(
        description, weights, len(token_ids), transfers="real", preparation="real", world_size=2
    )
    prepared_s = time.perf_counter() - started_s
    parts = [model.forward(token_ids[:prompt])]
    parts += [model.forward([token]) for token in token_ids[prompt:]]
    got = torch.cat([part for part in parts if part is not None])
    want = same(token_ids)
    return {
        "tokens": len(token_ids),
        "in_the_first_pass": prompt,
        "ranks": 2,
        "preparation_s": prepared_s,
        "seconds": time.perf_counter() - started_s - prepared_s,
        "relative_error": float((got - want).norm() / want.norm()),
        "same_top_token_as_its_weights_in_float32": agreement(got, want),
    }


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=SAMPLE)
@click.option(
    "--text", type=click.Path(exists=True, path_type=Path), default=SAMPLE / "heldout.txt"
)
@click.option("--window", type=click.IntRange(2), default=64, help="Tokens of one window.")
@click.option("--max-tokens", type=click.IntRange(2), default=2048, help="Of the text.")
@click.option("--greedy-tokens", type=click.IntRange(1), default=100)
@click.option("--outlier-tokens", type=click.IntRange(8), default=200)
@click.option("--real-tokens", type=click.IntRange(8, 64), default=16, help="A power of two.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    model: Path,
    text: Path,
    window: int,
    max_tokens: int,
    greedy_tokens: int,
    outlier_tokens: int,
    real_tokens: int,
    out: Path | None,
) -> None:
    """Measure the loss of quality of private weights, and of the secure arithmetic."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    token_ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    token_ids = token_ids[:max_tokens]
    description, weights = load(model)
    ways = {
        "transformers float32": transformers_logits(model),
        "plaintext int8": reference_logits(model, quantised=True),
        "private weights in float32": same_weights_logits(description, weights),
        "otpipe private": private_logits(description, weights),
    }

    def say(line: str) -> None:
        click.echo(line, err=True)

    same = ways["private weights in float32"]
    result: dict[str, Any] = {
        "machine": harness.machine() | {"link": "none: both parties in one process"},
        "model": model.name,
        "tokens": len(token_ids),
        "window": window,
    }
    result["real"] = real(description, weights, token_ids[:real_tokens], same, real_tokens // 2)
    say(f"real stack: {result['real']}")
    result["outliers"] = outliers(outlier_tokens)
    say(f"outliers: {result['outliers']}")
    result["greedy"] = greedy(ways, token_ids[:24], greedy_tokens)
    say(f"greedy: {result['greedy']}")
    scores = heldout(ways, token_ids, window, say)
    result["scores"] = {name: score.to_dict() for name, score in scores.items()}
    plain = scores["transformers float32"].perplexity
    result["perplexity_ratio"] = scores["otpipe private"].perplexity / plain
    harness.save(result, out)
    click.echo(
        table(scores, len(token_ids), window)
        .replace("against plaintext int8", "against the private weights in float32")
        .replace("loopback TCP, client and server on this machine", result["machine"]["link"])
    )
    click.echo(json.dumps({key: result[key] for key in ("greedy", "outliers", "real")}, indent=1))


if __name__ == "__main__":
    main()
