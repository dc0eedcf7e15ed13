"""Preprocessing alone: slots per second with the pads on disk, and what bounds them.

    python benchmarks/preparation.py --shape 0.5b --config 2:gloo
    python benchmarks/preparation.py --shape 14b --device cuda --config 1:nccl --out 14b.json
    python benchmarks/preparation.py --shape 14b --layers 6 --device cuda     # a rate a layer

Random weights of the real shape, the real protocol and the real pad store; client and server on
this machine over loopback TCP. After a warm-up on the first maps, whole batches are prepared, each
into an empty store. Reported: slots per second (median, quartiles), bytes, the client's time by
stage, processor time and peak memory of both sides, and three limits measured apart: processor
time over all cores, the rank's products one after the other, and the disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import harness
import psutil
import torch
from shapes import SHAPES, write_checkpoint

from otpipe import Client
from otpipe.client import preparation
from otpipe.client.preparation import PreparationReport
from otpipe.crypto.evaluate import LinearEvaluator
from otpipe.crypto.params import params_for_ring
from otpipe.protocol.messages import MAX_OLE_BLOCK_BYTES

SAMPLE_PERIOD_S = 0.05
MOST_SAMPLED_OUTPUTS = 8192
"""Of a map whose products are timed apart; the answers of wider ones are extrapolated."""

DISK_BYTES = 2 << 30
WARM_UP_LAYERS = 2


# -- what both sides use ---------------------------------------------------------------------------


def server_processes() -> list[psutil.Process]:
    """The ranks, without torchrun that started them."""
    found = []
    for child in psutil.Process().children(recursive=True):
        command = " ".join(child.cmdline())
        if "otpipe.serve" in command and "torch.distributed.run" not in command:
            found.append(child)
    return found


@dataclass
class Usage:
    """Filled in while a batch is prepared."""

    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    client_peak_extra_bytes: int = 0
    server_peak_extra_bytes: int = 0
    gpu_peak_extra_bytes: int = 0


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


def _resident(processes: list[psutil.Process]) -> int:
    return sum(p.memory_info().rss for p in processes)


def _gpu_used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@contextmanager
def measured(device: str) -> Iterator[Usage]:
    """Processor time and memory, sampled, of this process and of the ranks."""
    usage, stop = Usage(), threading.Event()
    client, ranks = [psutil.Process()], server_processes()
    cpu = _cpu_s(client), _cpu_s(ranks)
    memory = _resident(client), _resident(ranks), _gpu_used() if device == "cuda" else 0

    def sample() -> None:
        while not stop.wait(SAMPLE_PERIOD_S):
            client_extra, server_extra = _resident(client) - memory[0], _resident(ranks) - memory[1]
            usage.client_peak_extra_bytes = max(usage.client_peak_extra_bytes, client_extra)
            usage.server_peak_extra_bytes = max(usage.server_peak_extra_bytes, server_extra)
            if device == "cuda":
                extra = _gpu_used() - memory[2]
                usage.gpu_peak_extra_bytes = max(usage.gpu_peak_extra_bytes, extra)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield usage
    finally:
        stop.set()
        sampler.join()
        usage.client_cpu_s, usage.server_cpu_s = _cpu_s(client) - cpu[0], _cpu_s(ranks) - cpu[1]


# -- batches ---------------------------------------------------------------------------------------


def warm_up(client: Client, slots: int) -> None:
    """Exchange the maps of two layers, and throw the pads away: compiles, pins, fills caches."""
    plan = preparation._plan_within_budget(client.bundle, slots)
    layers = range(WARM_UP_LAYERS)
    chosen = tuple(p for p in plan.maps if p.linear_map.layer in layers)
    clock = preparation.StageClock()
    writer = client._store.begin_batch(plan.num_slots)
    try:
        batch = replace(plan, maps=chosen)
        preparation._Batch(
            batch, client.bundle, client._options, writer, lambda _: None, clock
        ).run()
    finally:
        writer.abort()


def one_batch(
    address: str, store: Path, slots: int, device: str
) -> tuple[PreparationReport, Usage]:
    """Prepare into an empty store."""
    shutil.rmtree(store, ignore_errors=True)
    with Client(address, store) as client, measured(device) as usage:
        report = client.prepare(slots)
    return report, usage


# -- limits ----------------------------------------------------------------------------------------


def disk_bytes_per_s(directory: Path) -> float:
    """Sequential writes with one synchronisation at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(16 << 20)
    path = directory / "probe"
    started_s = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(DISK_BYTES // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    taken_s = time.perf_counter() - started_s
    path.unlink()
    return DISK_BYTES / taken_s


def products_s(client: Client, slots: int, device: str) -> dict[str, float]:
    """Seconds that one rank's products take for a batch, map after map, by kind of map.

    Each kind is timed once on random weights and multiplied by how often it occurs.
    """
    plan = preparation._plan_within_budget(client.bundle, slots)
    seconds: dict[str, float] = {}
    times: dict[tuple[int, int, int], float] = {}
    for map_plan in plan.maps:
        linear_map, ub = map_plan.linear_map, map_plan.upload_bytes
        shape = linear_map.out_features, linear_map.in_features, ub
        if shape not in times:
            times[shape] = _product_s(linear_map.ring_bits, *shape, plan.num_slots, device)
        seconds[linear_map.kind] = seconds.get(linear_map.kind, 0.0) + times[shape]
    return seconds


def _product_s(bits: int, m: int, n: int, ub: int, slots: int, device: str) -> float:
    params = params_for_ring(bits)
    sampled_m, sampled_n = min(m, MOST_SAMPLED_OUTPUTS), min(n, MOST_SAMPLED_OUTPUTS)
    weight = torch.randint(-127, 128, (sampled_m, sampled_n), dtype=torch.int8, device=device)
    block = torch.randint(0, 256, (preparation.BLOCK_COORDINATES, params.ring_degree, ub))
    block = block.to(torch.uint8)
    if device == "cuda":
        block = block.pin_memory()
    taken: list[float] = []
    for _ in range(2):  # the first one warms up
        evaluator = LinearEvaluator(weight, params, 0, bytes(32), slots, ub)
        started_s = time.perf_counter()
        for first in range(0, sampled_n, len(block)):
            evaluator.add_block(first, block[: sampled_n - first])
        blocks_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        for _piece in evaluator.answers(MAX_OLE_BLOCK_BYTES):
            pass
        answers_s = time.perf_counter() - started_s
        taken.append(blocks_s * n / sampled_n + answers_s * m / sampled_m)
    return taken[-1]


# -- result ----------------------------------------------------------------------------------------


def summary(reports: list[PreparationReport], usages: list[Usage], cores: int) -> dict[str, Any]:
    """Medians and quartiles over the batches."""
    stages = {name for report in reports for name in report.stage_s}
    slots = reports[0].slots
    return {
        "slots": slots,
        "slots_per_s": harness.quartiles([r.slots / r.seconds for r in reports]),
        "seconds": harness.quartiles([r.seconds for r in reports]),
        "bytes_up_a_slot": reports[0].bytes_sent / slots,
        "bytes_down_a_slot": reports[0].bytes_received / slots,
        "stage_s": {s: statistics.median(r.stage_s.get(s, 0.0) for r in reports) for s in stages},
        "client_cpu_s": statistics.median(u.client_cpu_s for u in usages),
        "server_cpu_s": statistics.median(u.server_cpu_s for u in usages),
        "cores_busy": statistics.median(
            (u.client_cpu_s + u.server_cpu_s) / r.seconds
            for u, r in zip(usages, reports, strict=True)
        ),
        "cores": cores,
        "client_peak_extra_bytes": max(u.client_peak_extra_bytes for u in usages),
        "server_peak_extra_bytes": max(u.server_peak_extra_bytes for u in usages),
        "gpu_peak_extra_bytes": max(u.gpu_peak_extra_bytes for u in usages),
    }


def limits(
    measured_: dict[str, Any], products: dict[str, float], disk: float, store_bytes: int, ranks: int
) -> dict[str, float]:
    """Least seconds of a batch by each resource alone."""
    cpu_s = measured_["client_cpu_s"] + measured_["server_cpu_s"]
    return {
        "all cores": cpu_s / measured_["cores"],
        "products of a rank": sum(products.values()) / ranks,
        "disk": store_bytes / disk,
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=int, help="Shorten the model to so many layers.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--config", default="1:gloo", help="RANKS:TRANSPORT.")
@click.option("--slots", type=click.IntRange(64, 2048), default=2048, help="Of one batch.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Batches measured.")
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints go.")
@click.option("--store", type=click.Path(path_type=Path), help="Where pads go, and are erased.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    layers: int | None,
    device: str,
    config: str,
    slots: int,
    repeats: int,
    checkpoints: Path | None,
    store: Path | None,
    out: Path | None,
) -> None:
    """Measure the preparation of one shape on one machine."""
    ranks, transport = config.split(":")
    with tempfile.TemporaryDirectory() as temporary:
        pads = (store or Path(temporary)) / "preparation-benchmark"
        model_dir = write_checkpoint(
            shape, (checkpoints or Path(temporary)) / f"{shape}-{layers}", device, layers
        )
        reports, usages = [], []
        with harness.server(model_dir, int(ranks), device, f"--transport={transport}") as (
            address,
            _,
        ):
            with Client(address, pads) as client:
                store_bytes = int(str(client.info()["store_bytes_a_slot"]))
                warm_up(client, slots)
            for _ in range(repeats):
                report, usage = one_batch(address, pads, slots, device)
                click.echo(f"{report.slots / report.seconds:.2f} slots/s {usage}", err=True)
                reports.append(report)
                usages.append(usage)
        shutil.rmtree(pads, ignore_errors=True)
        result: dict[str, Any] = {
            "machine": harness.machine(),
            "shape": shape,
            "layers": layers,
            "device": device,
            "config": config,
            "repeats": repeats,
            "exchanges_at_once": preparation.EXCHANGES_AT_ONCE,
            **summary(reports, usages, int(str(harness.machine()["cores"]))),
        }
        products = products_s(client, slots, device)
        disk = disk_bytes_per_s(pads)
        shutil.rmtree(pads, ignore_errors=True)
        result["products_s"] = products
        result["disk_bytes_per_s"] = disk
        result["limits_s"] = limits(
            result, products, disk, store_bytes * result["slots"], int(ranks)
        )
    harness.save(result, out)
    click.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rate, seconds = result["slots_per_s"], result["seconds"]
    facts = ", ".join(f"{k}: {v}" for k, v in result["machine"].items())
    stages = sorted(result["stage_s"].items(), key=lambda item: -item[1])
    rows = [
        ("slots/s", f"{rate['median']:.1f} [{rate['q1']:.1f}, {rate['q3']:.1f}]"),
        ("s a batch", f"{seconds['median']:.1f} [{seconds['q1']:.1f}, {seconds['q3']:.1f}]"),
        (
            "MB up / down a slot",
            f"{result['bytes_up_a_slot'] / 1e6:.2f} / {result['bytes_down_a_slot'] / 1e6:.2f}",
        ),
        (
            "processor time, client / server, s",
            f"{result['client_cpu_s']:.0f} / {result['server_cpu_s']:.0f}",
        ),
        ("cores busy", f"{result['cores_busy']:.1f} of {result['cores']}"),
        (
            "extra memory, client / server / GPU, MB",
            " / ".join(
                f"{result[f'{side}_peak_extra_bytes'] / 1e6:.0f}"
                for side in ("client", "server", "gpu")
            ),
        ),
        *((f"client's exchanges in {name}, s", f"{taken:.1f}") for name, taken in stages),
        *((f"least s by {name}", f"{taken:.1f}") for name, taken in result["limits_s"].items()),
    ]
    return f"""Preparation, shape {result["shape"]}, layers {result["layers"] or "all"}, on \
{result["device"]} with {result["config"]}; {result["repeats"]} batches of {result["slots"]} slots \
after a warm-up, medians [quartiles]; {result["exchanges_at_once"]} exchanges at once. {facts}

| figure | |
| --- | --- |
{chr(10).join(f"| {name} | {value} |" for name, value in rows)}

The stages are added up over all exchanges at once. Disk: \
{result["disk_bytes_per_s"] / 1e9:.2f} GB/s."""


if __name__ == "__main__":
    main()
