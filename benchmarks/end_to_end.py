"""Decode, prefill and preprocessing of a published shape, beside transformers in the same run.

    python benchmarks/end_to_end.py --shape 0.5b --configs 2:gloo
    python benchmarks/end_to_end.py --shape 14b --device cuda --configs 1:nccl,2:gloo

Random weights of the real shape, the real protocol with pads from the store, client and server on
this machine over loopback TCP. The baseline is transformers' plaintext ``generate`` on the same
cores or GPU, in every dtype asked for; the faster one counts. Prints one table and writes JSON.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import torch
from shapes import SHAPES, qwen_config, write_checkpoint, write_outline
from transformers import AutoModelForCausalLM

from otpipe import Client
from otpipe.client.generation import GenerationStats
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor

DECODE_PROMPT_TOKENS = 8
CHECK_TOKENS = 8


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
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        mask = torch.ones_like(ids)
        generate = partial(model.generate, ids, attention_mask=mask, pad_token_id=0, **options)
        return harness.timed(generate, device)

    generate(DECODE_PROMPT_TOKENS, 4)  # warm-up
    rates = []
    for _ in range(repeats):
        first = generate(DECODE_PROMPT_TOKENS, 1)
        rates.append((tokens - 1) / (generate(DECODE_PROMPT_TOKENS, tokens) - first))
    return {
        "decode_tokens_per_s": harness.quartiles(rates),
        "prefill_s": {
            n: harness.quartiles([generate(n, 1) for _ in range(repeats)]) for n in prefill
        },
    }


def prepare(client: Client, slots: int) -> dict[str, float]:
    """Prepare the pads of all that is measured."""
    report = client.prepare(slots)
    return {
        "slots": report.slots,
        "seconds": report.seconds,
        "slots_per_s": report.slots / report.seconds,
        "bytes_up_a_slot": report.bytes_sent / report.slots,
        "bytes_down_a_slot": report.bytes_received / report.slots,
    }


def slots_needed(prefill: Sequence[int], tokens: int, repeats: int, prefill_repeats: int) -> int:
    """Slots that :func:`ours` spends, and the comparison with plaintext."""
    decode = (repeats + 1) * (DECODE_PROMPT_TOKENS + tokens)
    return decode + sum(prefill[:1]) + prefill_repeats * sum(prefill) + CHECK_TOKENS


def ours(
    client: Client, prefill: Sequence[int], tokens: int, repeats: int, prefill_repeats: int
) -> dict[str, Any]:
    """The same generations through otpipe, with pads prepared before."""
    vocabulary = client.bundle.spec.vocab_size

    def generate(prompt: int, new: int) -> GenerationStats:
        for _ in client.generate_ids(prompt_of(prompt, vocabulary), new):
            pass
        assert client.last is not None
        if client.last.stats.prepare_s:
            raise SystemExit("slots ran out inside a measurement; this is a bug of the benchmark")
        return client.last.stats

    generate(DECODE_PROMPT_TOKENS, 4)  # warm-up
    runs = [generate(DECODE_PROMPT_TOKENS, tokens) for _ in range(repeats)]
    prefill_s = {}
    for n in prefill[:1]:
        generate(n, 1)  # warm-up
    for n in prefill:
        samples = [generate(n, 1).prefill_s for _ in range(prefill_repeats)]
        prefill_s[n] = harness.quartiles(samples)
    return {
        "decode_tokens_per_s": harness.quartiles([run.tokens_per_s for run in runs]),
        "prefill_s": prefill_s,
        "round_trips_a_token": runs[0].round_trips / tokens,
        "bytes_up_a_token": runs[0].bytes_sent / (DECODE_PROMPT_TOKENS + tokens - 1),
        # The prompt's rows bring everything back but logits, which only its last row asks for.
        "bytes_down_a_token": runs[0].bytes_received / (DECODE_PROMPT_TOKENS + tokens - 1),
    }


def error_against_plaintext(client: Client, model_dir: Path) -> float:
    """Relative error of the logits of eight positions against the plaintext reference, float32."""
    tokens = prompt_of(CHECK_TOKENS, client.bundle.spec.vocab_size)
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
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--configs", default="2:gloo", help="RANKS:TRANSPORT[,...], measured in turn.")
@click.option("--tokens", type=int, default=24, help="Tokens of one decode run.")
@click.option("--repeats", type=int, default=5)
@click.option("--prefill", default="56,128,512", help="Prompt lengths.")
@click.option("--prefill-repeats", type=int, default=3)
@click.option("--dtypes", default="bfloat16,float32", help="Of the baseline; empty: none.")
@click.option("--check/--no-check", default=True, help="Compare logits with plaintext.")
@click.option(
    "--noise", is_flag=True, help="Make the weights on the device; no baseline, no check."
)
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints go.")
@click.option("--store", type=click.Path(path_type=Path), help="Where pads go.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    layers: int | None,
    device: str,
    configs: str,
    tokens: int,
    repeats: int,
    prefill: str,
    prefill_repeats: int,
    dtypes: str,
    check: bool,
    noise: bool,
    checkpoints: Path | None,
    store: Path | None,
    out: Path | None,
) -> None:
    """Measure one shape on one machine."""
    lengths = [int(n) for n in prefill.split(",") if n]
    wanted = [(int(c.split(":")[0]), c.split(":")[1]) for c in configs.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = (checkpoints or Path(temporary)) / f"{shape}-{layers}"
        if noise:  # there are no files that anybody else could read
            write_outline(shape, model_dir, layers)
            dtypes, check = "", False
        else:
            write_checkpoint(shape, model_dir, device, layers)
        pads = store or Path(temporary) / "store"
        result: dict[str, Any] = {
            "machine": harness.machine(),
            "shape": shape,
            "layers": layers,
            "noise": noise,
            "device": device,
            "repeats": repeats,
            "prefill_repeats": prefill_repeats,
            "baseline": {},
            "otpipe": {},
        }

        for dtype in filter(None, dtypes.split(",")):
            result["baseline"][dtype] = baseline(model_dir, device, dtype, lengths, tokens, repeats)
            gc.collect()  # the model, before the next one or the server takes its place
            torch.cuda.empty_cache()
            click.echo(f"baseline {dtype}: {json.dumps(result['baseline'][dtype])}", err=True)
        slots = len(wanted) * slots_needed(lengths, tokens, repeats, prefill_repeats)
        for ranks, transport in wanted:
            started_s = time.perf_counter()
            with (
                harness.server(
                    model_dir, ranks, device, f"--transport={transport}", noise=noise
                ) as (address, log),
                Client(address, pads) as client,
            ):
                load_s = time.perf_counter() - started_s
                if "preparation" not in result:  # the pads fit every server of these weights
                    result["preparation"] = prepare(client, slots)
                    click.echo(json.dumps(result["preparation"]), err=True)
                    harness.save(result, out)
                measured = ours(client, lengths, tokens, repeats, prefill_repeats)
                measured["load_s"] = load_s
                measured["ranks_hold"] = [line.strip() for line in log if " holds " in line]
                if check:
                    measured["logits_relative_error"] = error_against_plaintext(client, model_dir)
            result["otpipe"][f"{ranks} rank(s), {transport}"] = measured
            click.echo(json.dumps(measured), err=True)
            harness.save(result, out)
        result["limits"] = limits(shape, layers, device, measured["round_trips_a_token"])
        harness.save(result, out)
    click.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table: medians, quartiles in brackets."""

    def cell(q: dict[str, float], unit: float = 1.0) -> str:
        return f"{q['median'] * unit:.3g} [{q['q1'] * unit:.3g}, {q['q3'] * unit:.3g}]"

    ours_by_config, base, limit = result["otpipe"], result["baseline"], result["limits"]
    names = [f"otpipe, {name}" for name in ours_by_config]
    names += [f"transformers {dtype}" for dtype in base]
    columns = [*ours_by_config.values(), *base.values()]

    def mine(figure: Callable[[dict[str, Any]], str]) -> list[str]:
        return [*(figure(c) for c in ours_by_config.values()), *[""] * len(base)]

    preparation = result["preparation"]
    rows = [
        ["figure", *names],
        ["---"] * (len(names) + 1),
        ["decode, tokens/s", *(cell(c["decode_tokens_per_s"]) for c in columns)],
    ]
    for n in next(iter(ours_by_config.values()))["prefill_s"]:
        rows.append([f"prefill {n} tokens, ms", *(cell(c["prefill_s"][n], 1e3) for c in columns)])
    rows += [
        ["round trips a token", *mine(lambda c: f"{c['round_trips_a_token']:.0f}")],
        [
            "MB up / down a token",
            *mine(
                lambda c: f"{c['bytes_up_a_token'] / 1e6:.2f} / {c['bytes_down_a_token'] / 1e6:.2f}"
            ),
        ],
        ["start and load, s", *mine(lambda c: f"{c['load_s']:.1f}")],
    ]
    if all("logits_relative_error" in c for c in ours_by_config.values()):
        rows.append(
            ["relative error of logits", *mine(lambda c: f"{c['logits_relative_error']:.1e}")]
        )
    facts = ", ".join(f"{k}: {v}" for k, v in result["machine"].items())
    holds = "\n".join(line for c in ours_by_config.values() for line in c["ranks_hold"])
    return f"""Shape {result["shape"]} on {result["device"]}; {result["repeats"]} decode and
{result["prefill_repeats"]} prefill repeats after a warm-up, medians [quartiles]. {facts}

{holds}

{chr(10).join("| " + " | ".join(row) + " |" for row in rows)}

Preparation: {preparation["slots"]} slots in {preparation["seconds"]:.1f} s, \
{preparation["slots_per_s"]:.1f} slots/s, {preparation["bytes_up_a_slot"] / 1e6:.2f} MB up and \
{preparation["bytes_down_a_slot"] / 1e6:.2f} MB down a slot.
Limit of a decode step: {limit["weights_s"] * 1e3:.1f} ms to read \
{limit["weight_bytes"] / 1e9:.2f} GB of weights at \
{limit["copy_bandwidth_bytes_per_s"] / 1e9:.0f} GB/s, \
{limit["round_trips_s_at_40_us"] * 1e3:.1f} ms for the round trips at 40 us each."""


if __name__ == "__main__":
    main()
