"""Decode, prefill and preprocessing of a published shape, beside transformers in the same run.

    python benchmarks/end_to_end.py --shape 0.5b --ranks 2

Random weights of the real shape, the real protocol with pads from the store, client and server on
this machine over loopback TCP. The baseline is transformers' plaintext ``generate`` on the same
cores or GPU, in every dtype asked for; the faster one counts. Prints one table and writes JSON.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import harness
import torch
from shapes import SHAPES, qwen_config, write_checkpoint
from transformers import AutoModelForCausalLM

from otpipe import Client

DECODE_PROMPT_TOKENS = 8


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Token ids spread over the vocabulary; random weights do not care which."""
    return [(7919 * (i + 1)) % vocabulary for i in range(length)]


def baseline(
    model_dir: Path, device: str, dtype: str, prefill: Sequence[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """transformers' plaintext generate: greedy, batch 1, key/value cache, no stop token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(device)
    model.generation_config.eos_token_id = None
    vocabulary = model.config.vocab_size

    def generate(prompt: int, new: int) -> float:
        ids = torch.tensor([prompt_of(prompt, vocabulary)], device=device)
        return harness.timed(
            lambda: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            ),
            device,
        )

    generate(DECODE_PROMPT_TOKENS, 4)  # warm-up
    rates = []
    for _ in range(repeats):
        first = generate(DECODE_PROMPT_TOKENS, 1)
        rates.append((tokens - 1) / (generate(DECODE_PROMPT_TOKENS, tokens) - first))
    result = {
        "decode_tokens_per_s": harness.quartiles(rates),
        "prefill_s": {
            n: harness.quartiles([generate(n, 1) for _ in range(repeats)]) for n in prefill
        },
    }
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def ours(
    address: str,
    store: Path,
    slots: int,
    prefill: Sequence[int],
    tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """The same generations through otpipe."""
    with Client(address, store) as client:
        vocabulary = client.bundle.spec.vocab_size
        report = client.prepare(slots)

        def generate(prompt: int, new: int) -> Any:
            for _ in client.generate_ids(prompt_of(prompt, vocabulary), new):
                pass
            assert client.last is not None
            if client.last.stats.prepare_s:
                raise SystemExit("slots ran out inside a measurement; raise --slots")
            return client.last.stats

        generate(DECODE_PROMPT_TOKENS, 4)  # warm-up
        runs = [generate(DECODE_PROMPT_TOKENS, tokens) for _ in range(repeats)]
        prefill_s = {}
        for n in prefill:
            generate(n, 1)  # warm-up of this shape
            prefill_s[n] = harness.quartiles([generate(n, 1).prefill_s for _ in range(repeats)])
        passes = DECODE_PROMPT_TOKENS + tokens - 1
        return {
            "preparation": {
                "slots": report.slots,
                "seconds": report.seconds,
                "slots_per_s": report.slots / report.seconds,
                "bytes_up_a_slot": report.bytes_sent / report.slots,
                "bytes_down_a_slot": report.bytes_received / report.slots,
            },
            "decode_tokens_per_s": harness.quartiles([run.tokens_per_s for run in runs]),
            "prefill_s": prefill_s,
            "round_trips_a_token": runs[0].round_trips / tokens,
            "bytes_up_a_token": runs[0].bytes_sent / passes,
            "bytes_down_a_token": runs[0].bytes_received / tokens,
        }


def error_against_plaintext(address: str, store: Path, model_dir: Path) -> float:
    """Relative error of the logits of eight positions against the plaintext reference, float32."""
    from otpipe.model.program import forward
    from otpipe.model.reference import PlaintextExecutor

    with Client(address, store) as client:
        tokens = prompt_of(8, client.bundle.spec.vocab_size)
        private = client.forward(tokens)
    reference = PlaintextExecutor.from_checkpoint(model_dir, quantised=True)
    plain = forward(reference, tokens, reference.new_cache(), "all")
    assert plain is not None
    return float((private - plain).norm() / plain.norm())


def limits(shape: str, num_layers: int | None, device: str, round_trips: float) -> dict[str, float]:
    """The two bounds of a decode step: reading the int8 weights once, and the round trips."""
    config = qwen_config(shape, num_layers)
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * mlp
    weights = layer * config.num_hidden_layers + 2 * hidden * config.vocab_size
    bandwidth = harness.copy_bandwidth(device)
    return {
        "weight_bytes": float(weights),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "weights_s": weights / bandwidth,
        "round_trips_s_at_40_us": round_trips * 40e-6,
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=int, help="Shorten the model to so many layers.")
@click.option("--ranks", type=int, default=2)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--transport", default="auto")
@click.option("--slots", type=int, default=2048)
@click.option("--tokens", type=int, default=24, help="Tokens of one decode run.")
@click.option("--repeats", type=int, default=5)
@click.option("--prefill", default="56,128,512", help="Prompt lengths.")
@click.option("--dtypes", default="bfloat16,float32", help="Of the baseline; empty: none.")
@click.option("--check/--no-check", default=True, help="Compare logits with plaintext.")
@click.option("--work", type=click.Path(path_type=Path), help="Where checkpoint and pads go.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    layers: int | None,
    ranks: int,
    device: str,
    transport: str,
    slots: int,
    tokens: int,
    repeats: int,
    prefill: str,
    dtypes: str,
    check: bool,
    work: Path | None,
    out: Path | None,
) -> None:
    """Measure one shape on one machine."""
    lengths = [int(n) for n in prefill.split(",") if n]
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        model_dir = write_checkpoint(shape, work / f"checkpoint-{shape}-{layers}", device, layers)
        result: dict[str, Any] = {
            "machine": harness.machine(),
            "shape": shape,
            "layers": layers,
            "ranks": ranks,
            "device": device,
            "transport": transport,
            "repeats": repeats,
            "baseline": {},
        }
        for dtype in filter(None, dtypes.split(",")):
            result["baseline"][dtype] = baseline(model_dir, device, dtype, lengths, tokens, repeats)
            click.echo(f"baseline {dtype}: {json.dumps(result['baseline'][dtype])}", err=True)
        started_s = time.perf_counter()
        with (
            tempfile.TemporaryDirectory(dir=work) as store,
            harness.server(model_dir, ranks, device, f"--transport={transport}") as (address, log),
        ):
            result["load_s"] = time.perf_counter() - started_s
            result["ranks_hold"] = [line.strip() for line in log if " holds " in line]
            result["otpipe"] = ours(address, Path(store), slots, lengths, tokens, repeats)
            if check:
                result["logits_relative_error"] = error_against_plaintext(
                    address, Path(store), model_dir
                )
        round_trips = result["otpipe"]["round_trips_a_token"]
        result["limits"] = limits(shape, layers, device, round_trips)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table: medians, quartiles in brackets."""

    def cell(q: dict[str, float], unit: float = 1.0) -> str:
        return f"{q['median'] * unit:.3g} [{q['q1'] * unit:.3g}, {q['q3'] * unit:.3g}]"

    mine, base, limit = result["otpipe"], result["baseline"], result["limits"]
    names = ["otpipe", *(f"transformers {dtype}" for dtype in base)]
    columns = [mine, *base.values()]
    preparation = mine["preparation"]
    rows = [
        ["figure", *names],
        ["---"] * (len(names) + 1),
        ["decode, tokens/s", *(cell(c["decode_tokens_per_s"]) for c in columns)],
        *(
            [f"prefill {n} tokens, ms", *(cell(c["prefill_s"][n], 1e3) for c in columns)]
            for n in mine["prefill_s"]
        ),
        [
            "preparation, slots/s",
            f"{preparation['slots_per_s']:.1f} ({preparation['slots']} slots, "
            f"{preparation['bytes_up_a_slot'] / 1e6:.2f} MB up and "
            f"{preparation['bytes_down_a_slot'] / 1e6:.2f} MB down a slot)",
            *[""] * len(base),
        ],
        ["round trips a token", f"{mine['round_trips_a_token']:.0f}", *[""] * len(base)],
        [
            "MB up / down a token",
            f"{mine['bytes_up_a_token'] / 1e6:.2f} / {mine['bytes_down_a_token'] / 1e6:.2f}",
            *[""] * len(base),
        ],
        [
            "limit of a decode step",
            f"{limit['weights_s'] * 1e3:.1f} ms to read {limit['weight_bytes'] / 1e9:.2f} GB, "
            f"{limit['round_trips_s_at_40_us'] * 1e3:.1f} ms of round trips at 40 us",
            *[""] * len(base),
        ],
    ]
    if "logits_relative_error" in result:
        error = f"{result['logits_relative_error']:.2e}"
        rows.append(["relative error of logits", error, *[""] * len(base)])
    facts = ", ".join(f"{k}: {v}" for k, v in result["machine"].items())
    head = (
        f"Shape {result['shape']}, {result['ranks']} rank(s) on {result['device']}, "
        f"{result['repeats']} repeats. {facts}\n" + "\n".join(result["ranks_hold"])
    )
    return head + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
