"""Operations on shares: seconds, bytes and rounds of each, and of a decoder layer without its maps.

    python benchmarks/secure_operations.py [--device cuda] [--shapes 0.5b,14b] [--out secure.json]

Client and server are two processes over loopback TCP, on the real OT stack; the client computes on
the CPU. COTs are made before each measurement and timed apart ("ahead"): they need no input. A
party is "busy" while it does not wait for the other; its processor time is independent of what
else runs on the machine.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from harness import machine, quartiles
from secure_channel import Peer, both
from secure_works import Work, layer_parts, operations
from shapes import SHAPES

from otpipe.secure import Share
from otpipe.secure.shares import random_ring

CPU = torch.device("cpu")
PARTIES, KINDS = ("client", "server"), ("busy", "cpu")


def works(shapes: tuple[str, ...], positions: int, elements: int) -> dict[str, list[Work]]:
    """Everything to measure, by section."""
    sections = {"operations": operations(elements)}
    for name in shapes:
        sections[name] = layer_parts(SHAPES[name], positions)
    return sections


def measure(
    peer: Peer, shapes: tuple[str, ...], positions: int, elements: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Run everything as one of the two parties; what this one saw."""
    return {
        section: {work.name: _measured(peer, work, repeats) for work in members}
        for section, members in works(shapes, positions, elements).items()
    }


def _measured(peer: Peer, work: Work, repeats: int) -> dict[str, Any]:
    shares = [
        Share(random_ring(shape, bits, CPU).to(peer.device) >> 3, bits, frac)
        for shape, bits, frac in work.operands
    ]
    cots = work.cost.cots
    ahead_s, total_s, busy_s, cpu_s = [], [], [], []
    channel = peer.channel
    for _ in range(repeats + 1):
        peer.synchronize()
        started_s = time.perf_counter()
        peer.make_cots(cots)
        peer.synchronize()
        before, rounds, waited_s = dict(channel.sent_bytes), channel.rounds, channel.waited_s
        middle_s, middle_cpu_s = time.perf_counter(), time.process_time()
        peer.party.run(work.program(peer.party, *shares))
        if peer.device == "cuda":
            torch.cuda.synchronize()
        own_s = time.perf_counter() - middle_s
        cpu_s.append(time.process_time() - middle_cpu_s)
        peer.channel.meet()
        ahead_s.append(middle_s - started_s)
        total_s.append(time.perf_counter() - middle_s)
        busy_s.append(own_s - (channel.waited_s - waited_s))
    sent = {kind: size - before.get(kind, 0) for kind, size in channel.sent_bytes.items()}
    return {
        "ahead_s": quartiles(ahead_s[1:]),
        "total_s": quartiles(total_s[1:]),
        "busy_s": quartiles(busy_s[1:]),
        "cpu_s": quartiles(cpu_s[1:]),
        "sent_bytes": sum(sent.values()),
        "corrections": sent.get("ot.corrections", 0),
        "rounds": channel.rounds - rounds,
    }


def combined(work: Work, server: dict[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """The two parties' figures of one thing, and what it should cost.

    Raises:
        AssertionError: other bytes or rounds were counted than ``cost_of`` computes.
    """
    cost = work.cost
    assert client["corrections"] == 0, "COTs were made in the measured rounds"
    counted = (client["sent_bytes"], server["sent_bytes"], client["rounds"])
    assert counted == (cost.to_server, cost.to_client, cost.rounds), (work.name, counted, cost)
    return {
        "elements": work.elements,
        "rounds": cost.rounds,
        "cots": cost.cots,
        "extension_bytes": cost.extension_bytes,
        "to_server_bytes": cost.to_server,
        "to_client_bytes": cost.to_client,
        "bytes_an_element": cost.total_bytes / work.elements,
        "ahead_s": client["ahead_s"],
        "online_s": client["total_s"],
        "client_busy_s": client["busy_s"],
        "client_cpu_s": client["cpu_s"],
        "server_busy_s": server["busy_s"],
        "server_cpu_s": server["cpu_s"],
    }


def print_section(section: str, rows: dict[str, dict[str, Any]]) -> None:
    """One table."""
    print(f"\n{section}\n")
    print(
        "| | elements | rounds | bytes an element | MB ahead/up/down | ahead, ms | online, ms "
        "| client: busy, ms | CPU, ms | server: busy, ms | CPU, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        megabytes = "/".join(
            f"{row[key] / 1e6:.2f}"
            for key in ("extension_bytes", "to_server_bytes", "to_client_bytes")
        )
        times = " | ".join(
            f"{1e3 * row[key]['median']:.1f}"
            for key in (
                "ahead_s",
                "online_s",
                *(f"{who}_{kind}_s" for who in PARTIES for kind in KINDS),
            )
        )
        print(
            f"| {name} | {row['elements']} | {row['rounds']} | {row['bytes_an_element']:.0f} | "
            f"{megabytes} | {times} |"
        )


def token(rows: dict[str, dict[str, Any]], layers: int, products: bool) -> dict[str, float]:
    """Sums over all layers, with or without the products by OT; the final norm comes on top."""
    chosen = [row for name, row in rows.items() if products or not name.endswith("by OT")]
    last = rows["rms_norm"]

    def total(value: Callable[[dict[str, Any]], float]) -> float:
        return layers * sum(map(value, chosen)) + value(last)

    size = lambda row: row["bytes_an_element"] * row["elements"]  # noqa: E731
    return {
        "bytes": total(size),
        "rounds": total(lambda row: row["rounds"]),
        "ahead_s": total(lambda row: row["ahead_s"]["median"]),
        "online_s": total(lambda row: row["online_s"]["median"]),
    }


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Cores of each party.")
@click.option("--shapes", default="0.5b", show_default=True, help="Of layers; none: ''.")
@click.option("--positions", default=256, show_default=True)
@click.option("--elements", default=1 << 14, show_default=True, help="Of each operation.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
def main(
    device: str,
    threads: int,
    shapes: str,
    positions: int,
    elements: int,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure and print; see the module's text."""
    names = tuple(name for name in shapes.split(",") if name)
    job = functools.partial(
        measure, shapes=names, positions=positions, elements=elements, repeats=repeats
    )
    server, client = both(job, device, threads)
    result: dict[str, Any] = {
        "machine": machine(),
        "device": device,
        "threads": threads,
        "positions": positions,
        "repeats": repeats,
    }
    for section, members in works(names, positions, elements).items():
        result[section] = {
            work.name: combined(work, server[section][work.name], client[section][work.name])
            for work in members
        }
        print_section(section, result[section])
    for name in names:
        layers = int(SHAPES[name]["layers"])
        for products in (False, True):
            sums = token(result[name], layers, products)
            key = f"{name}, a token, {'with' if products else 'without'} products by OT"
            result[key] = sums
            print(
                f"\n{key}: {sums['bytes'] / 1e9:.2f} GB, {sums['rounds']:.0f} rounds, "
                f"{sums['ahead_s']:.1f} s ahead, {sums['online_s']:.1f} s online"
            )
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
