"""What privacy costs in quality: the sample model on its whole held-out text, three ways.

    python benchmarks/fidelity.py

The same windows of the text go through transformers with the checkpoint as it is, through the
plaintext int8 reference, and through the private protocol (real server, real pads, loopback TCP).
Prints one table: perplexities, and how far the logits are from the plaintext int8 ones.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import harness
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from otpipe import Client
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor

SAMPLE = harness.ROOT / "otpipe" / "sample"
Logits = Callable[[Sequence[int]], Tensor]
"""Logits (T, vocab) of all positions of one window."""


class Score:
    """Perplexity over windows, and the distance of the logits from other ones."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._tokens = 0
        self._difference = self._size = 0.0
        self._same = self._rows = 0
        self.largest_error = 0.0

    def add(self, window: Sequence[int], logits_TV: Tensor, other_TV: Tensor) -> None:
        """Count one window; the prediction of the first token of a window is not asked for."""
        logits_TV, other_TV = logits_TV.double(), other_TV.double()
        target = torch.tensor(window[1:])
        self._nats += float(functional.cross_entropy(logits_TV[:-1], target, reduction="sum"))
        self._tokens += len(target)
        difference = logits_TV - other_TV
        self._difference += float(difference.square().sum())
        self._size += float(other_TV.square().sum())
        self.largest_error = max(
            self.largest_error, float(difference.abs().max() / other_TV.abs().max())
        )
        self._same += int((logits_TV.argmax(1) == other_TV.argmax(1)).sum())
        self._rows += len(window)

    @property
    def perplexity(self) -> float:
        return math.exp(self._nats / self._tokens)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the other logits."""
        return math.sqrt(self._difference / self._size)

    @property
    def agreement(self) -> float:
        """Share of positions with the same likeliest token."""
        return self._same / self._rows

    def to_dict(self) -> dict[str, float]:
        return {
            "perplexity": self.perplexity,
            "relative_error": self.relative_error,
            "largest_error": self.largest_error,
            "top1_agreement": self.agreement,
        }


def windows(token_ids: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """Disjoint windows; a rest of one token predicts nothing and is left out."""
    for first in range(0, len(token_ids), length):
        window = token_ids[first : first + length]
        if len(window) > 1:
            yield window


def reference_logits(model: Path, *, quantised: bool) -> Logits:
    """The plaintext executor of this package, float32."""
    executor = PlaintextExecutor.from_checkpoint(model, quantised=quantised)

    def logits(token_ids: Sequence[int]) -> Tensor:
        rows = forward(executor, token_ids, executor.new_cache(), "all")
        assert rows is not None
        return rows

    return logits


def transformers_logits(model: Path) -> Logits:
    """transformers with the checkpoint's own weights, float32."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logits(token_ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return module(torch.tensor([list(token_ids)])).logits[0]

    return logits


def table(scores: dict[str, Score], num_tokens: int, length: int) -> str:
    """Markdown: one row a way of computing."""
    lines = [
        "| logits of | perplexity | relative error | largest error | same likeliest token |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {score.perplexity:.4f} | {score.relative_error:.2e} | "
        f"{score.largest_error:.2e} | {100 * score.agreement:.2f} % |"
        for name, score in scores.items()
    ]
    facts = ", ".join(f"{key}: {value}" for key, value in harness.machine().items())
    head = (
        f"{num_tokens} held-out tokens in windows of {length}; errors and agreement against "
        f"plaintext int8. {facts}"
    )
    return head + "\n\n" + "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=SAMPLE)
@click.option(
    "--text", type=click.Path(exists=True, path_type=Path), default=SAMPLE / "heldout.txt"
)
@click.option("--window", type=click.IntRange(2), default=512, help="Tokens of one window.")
@click.option("--max-tokens", type=click.IntRange(2), help="Of the text [default: all].")
@click.option("--ranks", type=int, default=2)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    model: Path,
    text: Path,
    window: int,
    max_tokens: int | None,
    ranks: int,
    device: str,
    out: Path | None,
) -> None:
    """Measure the loss of quality, of int8 weights and of the protocol."""
    scores = {name: Score() for name in ("transformers float32", "plaintext int8", "otpipe")}
    with (
        tempfile.TemporaryDirectory() as store,
        harness.server(model, ranks, device) as (address, _),
        Client(address, store) as client,
    ):
        token_ids = client.encode(text.read_text("utf-8"), raw=True)[:max_tokens]
        plain = reference_logits(model, quantised=True)
        ways = (transformers_logits(model), plain, client.forward)
        for part in windows(token_ids, window):
            other = plain(part)
            for score, way in zip(scores.values(), ways, strict=True):
                score.add(part, way(part), other)
    result = {
        "machine": harness.machine(),
        "model": model.name,
        "tokens": len(token_ids),
        "window": window,
        "ranks": ranks,
        "device": device,
        "scores": {name: score.to_dict() for name, score in scores.items()},
    }
    harness.save(result, out)
    click.echo(table(scores, len(token_ids), window))


if __name__ == "__main__":
    main()
