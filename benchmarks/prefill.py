"""Prefill of a published shape: time, bytes, and where each millisecond goes.

    python benchmarks/prefill.py --shape 0.5b --configs 2:gloo
    python benchmarks/prefill.py --shape 14b --device cuda --configs 1:nccl --tokens 56,512

As end_to_end.py does: random weights of the real shape, the real protocol with pads from the store,
client and server on this machine over loopback TCP, and transformers' plaintext ``generate`` in the
same run, before the server starts. Measured is the time from the first masked row to the first
token, lm_head and sampling included.
"""

from __future__ import annotations

import gc
import resource
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import harness
import torch
from end_to_end import prepare, prompt_of
from shapes import SHAPES, qwen_config, write_checkpoint
from step_timer import StepTimer
from transformers import AutoModelForCausalLM

from otpipe import Client
from otpipe.client.generation import GenerationStats
from otpipe.client.row_streams import plan_rows
from otpipe.crypto.randomness import random_bytes
from otpipe.kernels.ring_gemm import int8_matmul
from otpipe.model.spec import ModelSpec


def baseline(
    model_dir: Path, device: str, dtype: str, lengths: Sequence[int], repeats: int
) -> dict[int, dict[str, float]]:
    """Seconds of transformers' plaintext pass over a prompt and the first token, by length."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(device)
    model.generation_config.eos_token_id = None

    def generate(length: int) -> float:
        ids = torch.tensor([prompt_of(length, model.config.vocab_size)], device=device)
        options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return harness.timed(partial(model.generate, ids, attention_mask=mask, **options), device)

    measured = {}
    for length in lengths:
        generate(length)  # warm-up
        measured[length] = harness.quartiles([generate(length) for _ in range(repeats)])
    return measured


def prefill(client: Client, length: int) -> GenerationStats:
    """One pass over a prompt of ``length`` tokens, and the first token."""
    for _ in client.generate_ids(prompt_of(length, client.bundle.spec.vocab_size), 1):
        pass
    assert client.last is not None
    if client.last.stats.prepare_s:
        raise SystemExit("slots ran out inside a measurement; this is a bug of the benchmark")
    return client.last.stats


def cpu_seconds(pids: Sequence[int]) -> list[float]:
    """Processor time used so far by this process and by others."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return [own.ru_utime + own.ru_stime, *(harness.cpu_seconds(pid) for pid in pids)]


def ours(
    client: Client, lengths: Sequence[int], repeats: int, pids: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """The same passes through otpipe, and one more of each length under a profile."""
    measured = {}
    for length in lengths:
        prefill(client, length)  # warm-up
        before = cpu_seconds(pids)
        runs = [prefill(client, length) for _ in range(repeats)]
        used = [(b - a) / repeats for a, b in zip(before, cpu_seconds(pids), strict=True)]
        with StepTimer().running() as timer:
            profiled = prefill(client, length)
        plan = plan_rows(client.bundle.spec, length, torch.get_num_threads())
        threads = plan.num_streams
        measured[length] = {
            "prefill_s": harness.quartiles([run.prefill_s for run in runs]),
            "bytes_up": runs[0].bytes_sent,
            "bytes_down": runs[0].bytes_received,
            "requests": runs[0].round_trips,
            "streams": threads,
            "rows_a_chunk": -(-length // len(plan.chunks)),
            "client_cpu_s": used[0],
            "server_cpu_s": used[1:],
            "profiled_s": profiled.prefill_s,
            "thread_ms": {name: 1e3 * s / threads for name, s in timer.wall_s.items()},
            "thread_cpu_ms": {name: 1e3 * s / threads for name, s in timer.cpu_s.items()},
        }
    return measured


def limits(spec: ModelSpec, length: int, device: str) -> dict[str, float]:
    """Seconds that parts of a pass need for themselves on the whole machine.

    products: the int8 products of all digit planes at the rate of one large product.
    pads: expanding the pads on all cores.
    """
    rows = {m.index: 1 if m.kind == "lm_head" else length for m in spec.maps}
    macs = sum(m.in_features * m.out_features * m.ring_bytes * rows[m.index] for m in spec.maps)
    pad_bytes = sum(m.in_features * m.ring_bytes * rows[m.index] for m in spec.maps)
    size = 8192 if device == "cuda" else 1024
    a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    int8_matmul(a, a.t())
    product_s = min(harness.timed(partial(int8_matmul, a, a.t()), device) for _ in range(5))
    random_bytes(1 << 26)
    pads_s = min(harness.timed(partial(random_bytes, 1 << 26)) for _ in range(3))
    return {
        "int8_macs": float(macs),
        "products_s": macs * product_s / size**3,
        "pads_s": pad_bytes * pads_s / (1 << 26),
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=int, help="Shorten the model to so many layers.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--configs", default="2:gloo", help="RANKS:TRANSPORT[,...], measured in turn.")
@click.option("--tokens", default="56,128,512", help="Prompt lengths.")
@click.option("--repeats", type=int, default=3)
@click.option("--dtypes", default="bfloat16,float32", help="Of the baseline; empty: none.")
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints go.")
@click.option("--store", type=click.Path(path_type=Path), help="Where pads go.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    layers: int | None,
    device: str,
    configs: str,
    tokens: str,
    repeats: int,
    dtypes: str,
    checkpoints: Path | None,
    store: Path | None,
    out: Path | None,
) -> None:
    """Measure the prefill of one shape on one machine."""
    lengths = [int(n) for n in tokens.split(",")]
    wanted = [(int(c.split(":")[0]), c.split(":")[1]) for c in configs.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = write_checkpoint(
            shape, (checkpoints or Path(temporary)) / f"{shape}-{layers}", device, layers
        )
        result: dict[str, Any] = {
            "machine": harness.machine(),
            "shape": shape,
            "layers": layers,
            "device": device,
            "repeats": repeats,
            "baseline": {},
            "otpipe": {},
        }

        for dtype in filter(None, dtypes.split(",")):
            result["baseline"][dtype] = baseline(model_dir, device, dtype, lengths, repeats)
            gc.collect()  # the model, before the next one or the server takes its place
            torch.cuda.empty_cache()
        # A warm-up, the runs and a profiled run of every length; a prompt of two warms up the link.
        slots = len(wanted) * (2 + (repeats + 2) * sum(lengths))
        spec = None
        for ranks, transport in wanted:
            with (
                harness.server(model_dir, ranks, device, f"--transport={transport}") as (
                    address,
                    _,
                ),
                Client(address, store or Path(temporary) / "store") as client,
            ):
                if client.free_slots < slots and "preparation" not in result:
                    started_s = time.perf_counter()
                    result["preparation"] = prepare(client, slots - client.free_slots)
                    click.echo(f"prepared in {time.perf_counter() - started_s:.0f} s", err=True)
                spec = client.bundle.spec
                prefill(client, 2)
                pids = harness.rank_pids()
                result["otpipe"][f"{ranks} rank(s), {transport}"] = ours(
                    client, lengths, repeats, pids
                )
            harness.save(result, out)
        assert spec is not None
        result["limits"] = {length: limits(spec, length, device) for length in lengths}
        harness.save(result, out)
    click.echo(table(result, qwen_config(shape, layers).num_hidden_layers))


def between_steps(measured: dict[str, Any]) -> float:
    """Milliseconds of a client thread that no step accounts for."""
    return float(1e3 * measured["profiled_s"] - sum(measured["thread_ms"].values()))


def table(result: dict[str, Any], num_layers: int) -> str:
    """The result as Markdown tables: medians, quartiles in brackets."""

    def cell(q: dict[str, float]) -> str:
        return f"{q['median']:.3g} [{q['q1']:.3g}, {q['q3']:.3g}]"

    ours_by_config, base = result["otpipe"], result["baseline"]
    lengths = list(next(iter(ours_by_config.values())))
    rows = [["prefill, s", *(f"{n} tokens" for n in lengths)], ["---"] * (len(lengths) + 1)]
    for name, by_length in ours_by_config.items():
        rows.append([f"otpipe, {name}", *(cell(by_length[n]["prefill_s"]) for n in lengths)])
        rows.append(
            [
                "processor time, client + server, s",
                *(
                    f"{by_length[n]['client_cpu_s']:.2f} + {sum(by_length[n]['server_cpu_s']):.2f}"
                    for n in lengths
                ),
            ]
        )
    for dtype, by_length in base.items():
        rows.append([f"transformers {dtype}", *(cell(by_length[n]) for n in lengths)])
    one = next(iter(ours_by_config.values()))
    rows += [
        [
            "MB up / down",
            *(
                f"{one[n]['bytes_up'] / 1e6:.0f} / {one[n]['bytes_down'] / 1e6:.0f}"
                for n in lengths
            ),
        ],
        [
            "connections, rows a chunk, requests",
            *(
                f"{one[n]['streams']}, {one[n]['rows_a_chunk']}, {one[n]['requests']}"
                for n in lengths
            ),
        ],
        ["limit: int8 products, s", *(f"{result['limits'][n]['products_s']:.3g}" for n in lengths)],
        ["limit: pads, s", *(f"{result['limits'][n]['pads_s']:.3g}" for n in lengths)],
    ]
    steps = []
    for name, by_length in ours_by_config.items():
        steps += ["", f"Milliseconds of a client thread, otpipe, {name}:", ""]
        names = sorted(by_length[lengths[-1]]["thread_ms"].items(), key=lambda item: -item[1])
        lines = [["step", *(f"{n} tokens" for n in lengths)], ["---"] * (len(lengths) + 1)]
        for step, _ in names:
            lines.append(
                [step, *(f"{by_length[n]['thread_ms'].get(step, 0.0):.1f}" for n in lengths)]
            )
        lines.append(
            [
                "between the steps",
                *(f"{between_steps(by_length[n]):.1f}" for n in lengths),
            ]
        )
        steps += ["| " + " | ".join(line) + " |" for line in lines]
    facts = ", ".join(f"{k}: {v}" for k, v in result["machine"].items())
    return "\n".join(
        [
            f"Shape {result['shape']}, {num_layers} layers, on {result['device']}; "
            f"{result['repeats']} runs after a warm-up, medians [quartiles]. {facts}",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            *steps,
        ]
    )


if __name__ == "__main__":
    main()
