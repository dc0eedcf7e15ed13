"""Throughput against the number of clients, public weights.

    python benchmarks/many_clients.py --shape 0.5b --layers 2 --clients 1,2,4
    python benchmarks/many_clients.py --shape 14b --layers 12 --device cuda \
        --configs 1:nccl,2:gloo --clients 1,2,4,8,16 --out many.json --doc docs/throughput.md

Every client is a process with pads of its own, prepared before, on the server's machine over
loopback TCP. All begin to decode at the same moment; throughput is all their tokens over the time
until the last one is done. transformers' plaintext with one client is measured in the same run,
before the server starts. Prints a table and a chart and writes JSON; method and results are in
docs/throughput.md, of which ``--doc`` rewrites one section.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import harness
import rank_load
import torch
from client_process import ClientProcess
from end_to_end import baseline
from shapes import SHAPES, write_checkpoint
from throughput_report import rewrite_section, section

from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.stage import Stage

PREPARING_AT_ONCE = 5
"""Batches are bound by cores, memory and loopback, so more at once would only hold more memory."""

WARM_UP_TOKENS = 4
START_DELAY_S = 0.2
"""From the command to the common start: enough for every process to have read it."""

MAX_CONNECTIONS = 512
"""Of the server: every client that prepares opens several."""

LIMIT_TOKENS = 20


def sizes(model_dir: Path, whole_layers: int) -> dict[str, dict[str, int]]:
    """Maps and weights that a token goes through: of this checkpoint, and with all layers."""
    spec = Checkpoint.open(model_dir).spec
    a_layer = [m.in_features * m.out_features for m in spec.maps if m.layer == 0]
    ends = [m.in_features * m.out_features for m in spec.maps if m.layer is None]
    return {
        name: {
            "layers": layers,
            "maps": layers * len(a_layer) + len(ends),
            "weights": layers * sum(a_layer) + sum(ends),
        }
        for name, layers in (("measured", spec.num_layers), ("whole", whole_layers))
    }


def slots_needed(index: int, counts: Sequence[int], configs: int, tokens: int, repeats: int) -> int:
    """Slots that client ``index`` spends: it takes part wherever there are more clients than it."""
    levels = sum(index < count for count in counts)
    return configs * levels * (WARM_UP_TOKENS + repeats * tokens)


def prepare(clients: Sequence[ClientProcess], slots: Sequence[int], address: str) -> dict[str, Any]:
    """Fill every store. The first alone, so that what it compiles is compiled once."""
    started_s = time.perf_counter()
    answers = []
    wanted = iter(slots)
    for batch in (clients[:1], *_batches(clients[1:])):
        for client in batch:
            client.send("prepare", address=address, slots=next(wanted))
        answers += [client.answer() for client in batch]
    return {
        "stores": len(clients),
        "slots": sum(answer["slots"] for answer in answers),
        "bytes": sum(answer["bytes"] for answer in answers),
        "seconds": time.perf_counter() - started_s,
    }


def _batches(clients: Sequence[ClientProcess]) -> list[Sequence[ClientProcess]]:
    step = PREPARING_AT_ONCE
    return [clients[first : first + step] for first in range(0, len(clients), step)]


def run(clients: Sequence[ClientProcess], tokens: int, pids: Sequence[int]) -> dict[str, Any]:
    """All clients decode ``tokens`` tokens at once; processor time is of this run alone."""
    start_s = time.monotonic() + START_DELAY_S
    for client in clients:
        client.send("generate", tokens=tokens, start_s=start_s)
    time.sleep(max(0.0, start_s - time.monotonic()))
    before = [harness.cpu_seconds(pid) for pid in pids]
    answers = [client.answer() for client in clients]
    after = [harness.cpu_seconds(pid) for pid in pids]
    ended_s = max(answer["ended_s"] for answer in answers)
    return {
        "start_s": start_s,
        "wall_s": ended_s - start_s,
        "token_s": [s for answer in answers for s in answer["token_s"]],
        "ranks_cpu_s": [b - a for a, b in zip(before, after, strict=True)],
        "clients_cpu_s": sum(answer["cpu_s"] for answer in answers),
        **{
            key: sum(answer[key] for answer in answers)
            for key in ("bytes_up", "bytes_down", "round_trips")
        },
    }


def level(
    clients: Sequence[ClientProcess],
    tokens: int,
    repeats: int,
    monitor: rank_load.GpuMonitor | None,
) -> dict[str, Any]:
    """One number of clients: rates by run, loads over all runs."""
    pids = rank_load.ranks()
    run(clients, WARM_UP_TOKENS, pids)
    runs = [run(clients, tokens, pids) for _ in range(repeats)]
    wall_s = sum(r["wall_s"] for r in runs)
    gpu = []
    if monitor is not None:
        gpu = [monitor.mean_percent(r["start_s"], r["start_s"] + r["wall_s"]) for r in runs]
    return {
        "clients": len(clients),
        "tokens_per_s": harness.quartiles([len(clients) * tokens / r["wall_s"] for r in runs]),
        "maps_per_s": harness.quartiles([r["round_trips"] / r["wall_s"] for r in runs]),
        "token_s": harness.quartiles([s for r in runs for s in r["token_s"]]),
        "bytes_up_per_s": sum(r["bytes_up"] for r in runs) / wall_s,
        "bytes_down_per_s": sum(r["bytes_down"] for r in runs) / wall_s,
        "rank_cores": [
            sum(used) / wall_s for used in zip(*(r["ranks_cpu_s"] for r in runs), strict=True)
        ],
        "client_cores": sum(r["clients_cpu_s"] for r in runs) / wall_s,
        "mean_tokens_per_s": repeats * len(clients) * tokens / wall_s,
        "gpu_percent": [statistics.fmean(means) for means in zip(*filter(None, gpu), strict=True)],
    }


def products_s(model_dir: Path, device: str) -> float:
    """Seconds a token of single rows through all maps, by the server's code without a client.

    On CUDA the recorded products, copies to and from the host included, are launched on all lines
    of one GPU, as many clients would have them; on a CPU one product after the other has all cores.
    """
    checkpoint = Checkpoint.open(model_dir)
    maps = checkpoint.spec.maps
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    stage = Stage(checkpoint.load_maps(range(len(maps)), place), maps, place)
    stage.warm_up()
    rows = [torch.zeros(m.in_features * m.ring_bytes, dtype=torch.uint8) for m in maps]

    def on_cpu() -> None:
        for _ in range(LIMIT_TOKENS):
            for index, row in enumerate(rows):
                stage.linear(index, 1, row)

    def on_lines() -> None:
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
        lines = stage.row_lines
        for _ in range(LIMIT_TOKENS):
            for index in range(len(maps)):
                line = lines[index % len(lines)]
                if call(line.launch)(int(line.launches[index, 0]), line.stream):
                    raise SystemExit("the GPU refused a recorded product")
        torch.cuda.synchronize()

    work = on_lines if stage.row_lines else on_cpu
    work()
    return statistics.median(harness.timed(work, device) for _ in range(5)) / LIMIT_TOKENS


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=int, help="Shorten the model to so many layers.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--configs", default="1:gloo,2:gloo", help="RANKS:TRANSPORT[,...], in turn.")
@click.option("--clients", "clients_", default="1,2,4,8,16", help="Numbers of clients.")
@click.option("--tokens", type=click.IntRange(1), default=24, help="Of one run, a client.")
@click.option("--repeats", type=click.IntRange(1), default=5)
@click.option("--slots", type=int, help="Free ones per store at least [default: what is needed].")
@click.option("--dtypes", default="bfloat16", help="Of the baseline; empty: none.")
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints go.")
@click.option("--store", type=click.Path(path_type=Path), help="Where the stores go.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
@click.option("--doc", type=click.Path(path_type=Path), help="Rewrite a section of this page.")
@click.option("--section", "section_", help="Its name [default: the device].")
@click.option("--render", type=click.Path(path_type=Path), help="Measure nothing; use this JSON.")
def main(
    shape: str,
    layers: int | None,
    device: str,
    configs: str,
    clients_: str,
    tokens: int,
    repeats: int,
    slots: int | None,
    dtypes: str,
    checkpoints: Path | None,
    store: Path | None,
    out: Path | None,
    doc: Path | None,
    section_: str | None,
    render: Path | None,
) -> None:
    """Measure one shape on one machine."""
    if render is not None:
        result = json.loads(render.read_text())
    else:
        counts = sorted({int(count) for count in clients_.split(",")})
        wanted = [(int(c.split(":")[0]), c.split(":")[1]) for c in configs.split(",")]
        with tempfile.TemporaryDirectory() as temporary:
            model_dir = write_checkpoint(
                shape, (checkpoints or Path(temporary)) / f"{shape}-{layers}", device, layers
            )
            result = {
                "machine": harness.machine(),
                "shape": shape,
                "layers": layers,
                **sizes(model_dir, int(SHAPES[shape]["layers"])),
                "device": device,
                "tokens": tokens,
                "repeats": repeats,
                "baseline": {},
                "otpipe": {},
            }
            measure(
                result,
                model_dir,
                store or Path(temporary) / "stores",
                wanted,
                counts,
                slots or 0,
                [d for d in dtypes.split(",") if d],
                out,
            )
    text = section(result)
    if doc is not None:
        rewrite_section(doc, f"many_clients {section_ or result['device']}", text)
    click.echo(text)


def measure(
    result: dict[str, Any],
    model_dir: Path,
    stores: Path,
    configs: Sequence[tuple[int, str]],
    counts: Sequence[int],
    least_slots: int,
    dtypes: Sequence[str],
    out: Path | None,
) -> None:
    """Fill ``result`` in, and write it to ``out`` after every step."""
    device, tokens, repeats = result["device"], result["tokens"], result["repeats"]

    for dtype in dtypes:
        measured = baseline(model_dir, device, dtype, [], tokens, repeats)["decode_tokens_per_s"]
        gc.collect()  # the model, before the server takes its place
        torch.cuda.empty_cache()
        result["baseline"][dtype] = measured
        click.echo(f"baseline {dtype}: {json.dumps(measured)}", err=True)
    slots = [
        max(least_slots, slots_needed(i, counts, len(configs), tokens, repeats))
        for i in range(counts[-1])
    ]
    clients = [ClientProcess(stores / f"client-{i}") for i in range(counts[-1])]
    try:
        for ranks, transport in configs:
            arguments = [f"--transport={transport}", f"--max-clients={MAX_CONNECTIONS}"]
            if device == "cpu":  # each rank its share of the cores
                threads = max(1, len(os.sched_getaffinity(0)) // ranks)
                arguments.append(f"--threads={threads}")
            with (
                harness.server(model_dir, ranks, device, *arguments) as (address, log),
                rank_load.gpu_monitor(device) as monitor,
            ):
                if "preparation" not in result:  # the pads fit every server of these weights
                    result["preparation"] = prepare(clients, slots, address)
                    click.echo(json.dumps(result["preparation"]), err=True)
                levels: list[dict[str, Any]] = []
                result["otpipe"][f"{ranks}:{transport}"] = {
                    "ranks": ranks,
                    "transport": transport,
                    "ranks_hold": [line.strip() for line in log if " holds " in line],
                    "levels": levels,
                }
                for before, count in zip((0, *counts), counts, strict=False):
                    for client in clients[before:count]:
                        client.send("open", address=address)
                    for client in clients[before:count]:
                        client.answer()
                    levels.append(level(clients[:count], tokens, repeats, monitor))
                    click.echo(json.dumps(levels[-1]), err=True)
                    harness.save(result, out)
                for client in clients:
                    client.send("close")
                for client in clients:
                    client.answer()
    finally:
        for client in clients:
            client.end()
    result["products_s"] = products_s(model_dir, device)
    harness.save(result, out)


if __name__ == "__main__":
    main()
