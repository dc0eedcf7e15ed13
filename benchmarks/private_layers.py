"""A token with private weights at full width: some decoder layers, both parties, every operation.

    python benchmarks/private_layers.py --shape 0.5b --out private-layers-0.5b-cpu.json
    python benchmarks/private_layers.py --shape 14b --device cuda

Client and server are two processes over loopback TCP. They run the product's program on slots
prepared by RLWE (``--slots dealt``: by an INSECURE dealer, for the figures online alone), its OT
stack, and attention's products prepared by RLWE; the weights are noise. Bytes and rounds of every
operation must be those that the code says. Every token is compared with plaintext. What is derived
for the whole model says so.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
from layer_costs import (
    PRODUCTS,
    attention_sizes,
    end_counts,
    layer_counts,
    model_counts,
)
from layer_material import PARAMS, description_of
from layer_meter import Figures
from layer_parties import Job, work
from secure_channel import both
from shapes import SHAPES

from otpipe.client.private_preparation import wire_bytes_a_slot
from otpipe.crypto.private_params import choose_packing
from otpipe.model.private_description import PrivateDescription
from otpipe.ot import DEFAULT_OT_PARAMS

RTT_S, LINK_BYTES_PER_S = 0.010, 1e9 / 8
"""Of the link that the derived figures are for."""
PARTIES = ("client", "server")
Row = dict[str, Any]


def row(runs: Sequence[tuple[Figures, Figures]], layers: int) -> Row:
    """Quartiles of what the two parties saw of one thing, a layer."""
    clients, servers = zip(*runs, strict=True)

    def of(seen: Sequence[Figures], value: Callable[[Figures], float]) -> dict[str, float]:
        return harness.quartiles([value(each) / layers for each in seen])

    busy: Callable[[Figures], float] = lambda each: each["seconds"] - each["waited_s"]  # noqa: E731
    result: Row = {"seconds": of(clients, lambda each: each["seconds"])}
    for who, seen in zip(PARTIES, (clients, servers), strict=True):
        result[f"{who}_busy_s"] = of(seen, busy)
        result[f"{who}_cpu_s"] = of(seen, lambda each: each["cpu_s"])
    last_client, last_server = runs[-1]
    result["up_bytes"] = last_client["sent_bytes"] / layers
    result["down_bytes"] = last_server["sent_bytes"] / layers
    result["rounds"] = last_client["rounds"] / layers
    return result


def online(
    job: Job, client: list[dict[str, Figures]], server: list[dict[str, Figures]]
) -> dict[str, Row]:
    """Every operation of a layer, and the ends, compared with the code.

    Raises:
        SystemExit: other bytes or rounds were counted than the code says.
    """
    description = description_of(job.shape)
    rows = {
        name: row(
            [(c[name], s[name]) for c, s in zip(client, server, strict=True)],
            1 if name in {"embed", "head"} else job.layers,
        )
        for name in client[0]
        if name != "layers"
    }
    counts = layer_counts(description, job.measured[0], job.positions)
    if job.ends:
        counts |= end_counts(description)
    # What is opened for the products travels in rounds of the attention.
    products, attention = rows[PRODUCTS], rows["attention"]
    for key, moved in asdict(counts[PRODUCTS]).items():
        name = {"to_server": "up_bytes", "to_client": "down_bytes"}.get(key, key)
        if name in attention:
            products[name] += moved
            attention[name] -= moved
    for name, count in counts.items():
        found = tuple(rows[name][key] for key in ("rounds", "up_bytes", "down_bytes"))
        if found != (count.rounds, count.to_server, count.to_client):
            raise SystemExit(f"{name}: rounds and bytes {found}, but the code says {count}")
        rows[name]["cots"] = count.cots
    rows["layer"] = {
        "seconds": harness.quartiles([each["layers"]["seconds"] / job.layers for each in client])
    }
    inside = [name for name in counts if name not in {"embed", "head"}]
    for key in ("rounds", "up_bytes", "down_bytes", "cots"):
        rows["layer"][key] = sum(rows[name][key] for name in inside)
    for who in PARTIES:
        for kind in ("busy", "cpu"):
            key = f"{who}_{kind}_s"
            medians = [rows[name][key]["median"] for name in inside]
            rows["layer"][key] = {"median": sum(medians)}
    return rows


def ahead(job: Job, client: dict[str, Any], server: dict[str, Any]) -> dict[str, Row]:
    """What a layer takes before the text: slots of a batch, products of all positions, COTs.

    Raises:
        SystemExit: other bytes were counted than the code says.
    """
    description = description_of(job.shape)
    rows = {
        f"slots: {kind}": row([(client["slots"][kind], server["slots"][kind])], job.layers)
        for kind in client["slots"]
    }
    rows[PRODUCTS] = row([(client["products"], server["products"])], job.layers)
    rows["COTs"] = row(list(zip(client["cots"], server["cots"], strict=True)), job.layers)
    up, down = attention_sizes(description).preparation_bytes(0, job.positions)
    due = {PRODUCTS: (up + 32 / job.layers, down)}
    for kind in client["slots"]:
        shape = description.maps[description.spec.map_index(kind, job.measured[0])]
        packing = choose_packing(PARAMS, shape.in_features, shape.out_features, job.num_slots)
        up, down = (
            packing.upload_total(shape.in_features),
            packing.download_total(shape.out_features),
        )
        due[f"slots: {kind}"] = (up + 32, down)
    for name, expected in due.items():
        found = (rows[name]["up_bytes"], rows[name]["down_bytes"])
        if found != expected:
            raise SystemExit(f"{name}: bytes {found}, but the code says {expected}")
    return rows


def errors(client: dict[str, Any], server: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of any token against plaintext, by part."""
    worst: dict[str, float] = {}
    for got, want in zip(client["results"], server["results"], strict=True):
        for name, expected in want.items():
            exact = expected.astype(np.float64)
            distance = np.linalg.norm(got[name] - exact) / np.linalg.norm(exact)
            worst[name] = max(worst.get(name, 0.0), float(distance))
    return worst


def model(job: Job, layer: dict[str, Row], before: dict[str, Row]) -> Row:
    """The whole model, from the measured layers; see the names for what is derived."""
    description = description_of(job.shape)
    layers = description.spec.num_layers
    counts = model_counts(description, job.positions)
    sizes = attention_sizes(description).preparation_bytes(0, job.positions)
    corrections = counts.cots * DEFAULT_OT_PARAMS.extension_bits / 8
    result: Row = {
        "layers": layers,
        "by_code": {
            "rounds": counts.rounds,
            "online_up_bytes": counts.to_server,
            "online_down_bytes": counts.to_client,
            "cots": counts.cots,
            "cots_up_bytes": corrections,
            "products_up_bytes_a_position": layers * sizes[0] / job.positions,
            "products_down_bytes_a_position": layers * sizes[1] / job.positions,
            "slot_bytes": {
                str(slots): wire_bytes_a_slot(description, slots)
                for slots in sorted({256, 2048, job.num_slots})
            },
        },
        "derived": {},
    }
    derived = result["derived"]
    derived["layers_online_s"] = layers * layer["layer"]["seconds"]["median"]
    derived["cots_s"] = layers * before["COTs"]["seconds"]["median"]
    if job.ends:
        # The COTs of the head are made with those of the layers.
        inside = layer["layer"]["cots"]
        derived["cots_s"] *= counts.cots / (layers * (inside + layer["head"]["cots"] / job.layers))
        ends_s = sum(layer[name]["seconds"]["median"] for name in ("embed", "head"))
        derived["online_s"] = derived["layers_online_s"] + ends_s
        link_s = counts.rounds * RTT_S + (counts.to_server + counts.to_client) / LINK_BYTES_PER_S
        derived["online_s_on_link"] = derived["online_s"] + link_s
    products = before[PRODUCTS]
    derived["products_s_a_position"] = layers * products["seconds"]["median"] / job.positions
    if job.source == "rlwe":
        derived["slot_s"] = slot_seconds(job, description, before)
    return result


def slot_seconds(job: Job, description: PrivateDescription, before: dict[str, Row]) -> float:
    """Derived: seconds a slot for all maps, one exchange after the other.

    The layers' as measured. Of embedding and head, the server's busy seconds grow with the
    products, n m, and the client's with its bytes, as in the layers; nothing overlaps.
    """
    spec, slots = description.spec, job.num_slots
    rows = [each for name, each in before.items() if name.startswith("slots: ")]

    def sizes(kinds: Sequence[Any], layer: int | None) -> tuple[float, float]:
        products = wire = 0.0
        for kind in kinds:
            shape = description.maps[spec.map_index(kind, layer)]
            n, m = shape.in_features, shape.out_features
            packing = choose_packing(PARAMS, n, m, slots)
            products += n * m
            wire += packing.upload_total(n) + packing.download_total(m)
        return products, wire

    kinds = [name.removeprefix("slots: ") for name in before if name.startswith("slots: ")]
    inside, ends = sizes(kinds, job.measured[0]), sizes(("embed", "lm_head"), None)
    server_s = sum(each["server_busy_s"]["median"] for each in rows)
    client_s = sum(each["client_busy_s"]["median"] for each in rows)
    layers_s = spec.num_layers * sum(each["seconds"]["median"] for each in rows)
    ends_s = server_s * ends[0] / inside[0] + client_s * ends[1] / inside[1]
    return (layers_s + ends_s) / slots


def table(rows: dict[str, Row]) -> str:
    """One line a thing: rounds, MB, seconds."""
    lines = [
        "| a layer | rounds | MB up | MB down | COTs, thousands | ms | client: busy, ms | CPU, ms "
        "| server: busy, ms | CPU, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in rows.items():
        seconds = each["seconds"]
        spread = f" [{1e3 * seconds['q1']:.1f}, {1e3 * seconds['q3']:.1f}]"
        times = " | ".join(
            f"{1e3 * each[f'{who}_{kind}_s']['median']:.1f}"
            for who in PARTIES
            for kind in ("busy", "cpu")
        )
        lines.append(
            f"| {name} | {each['rounds']:.0f} | {each['up_bytes'] / 1e6:.3f} | "
            f"{each['down_bytes'] / 1e6:.3f} | {each.get('cots', 0) / 1e3:.0f} | "
            f"{1e3 * seconds['median']:.1f}{spread} | {times} |"
        )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """The whole model in words."""
    whole = result["model"]
    code, derived = whole["by_code"], whole["derived"]
    slots = result["num_slots"]
    slot = sum(code["slot_bytes"][str(slots)]) / 1e6
    products = code["products_up_bytes_a_position"] + code["products_down_bytes_a_position"]
    moved = code["online_up_bytes"] + code["online_down_bytes"]
    lines = [
        f"{result['shape']}, all {whole['layers']} layers with embedding and head, by code: "
        f"{moved / 1e6:.0f} MB online in {code['rounds']} rounds, "
        f"{code['cots_up_bytes'] / 1e6:.0f} MB of COTs ahead, {products / 1e6:.0f} MB a position "
        f"and {slot:.0f} MB a slot of a batch of {slots} ahead.",
        "Derived: " + ", ".join(f"{name} {value:.3g}" for name, value in derived.items()),
        "Relative error against plaintext: "
        + ", ".join(f"{name} {value:.1e}" for name, value in result["relative_error"].items()),
    ]
    return "\n".join(f"- {line}" for line in lines)


def report(result: dict[str, Any]) -> str:
    """A result as text: tables and sums."""
    machine, layers = result["machine"], result["layers"]
    facts = ", ".join(f"{name}: {value}" for name, value in machine.items())
    slots = f"slots of a batch of {result['num_slots']}"
    if result["source"] == "dealt":
        slots = "slots from an INSECURE dealer"
    peaks = ", ".join(
        f"{who} {sizes['peak_bytes'] / 1e9:.1f} GB"
        + (f" and {sizes['peak_device_bytes'] / 1e9:.1f} GB on the device" if on_device else "")
        for who, sizes in result["memory"].items()
        for on_device in [sizes["peak_device_bytes"] > 0]
    )
    return "\n\n".join(
        (
            f"{result['shape']}, server on {result['device']}, {layers} of "
            f"{result['model']['layers']} layers, {result['positions']} positions, {slots}; "
            f"{result['repeats']} tokens after a warm-up, {result['threads']} threads each online, "
            f"all cores ahead. Medians, quartiles in brackets. {facts}. Most memory: {peaks}.",
            f"Online, {'a layer' if layers == 1 else 'a mean layer'}, embedding and head:",
            table(result["online"]),
            f"Ahead, a layer: {slots}, products of {result['positions']} positions (one run each), "
            "COTs of a token with its head:",
            table(result["ahead"]),
            summary(result),
        )
    )


def run(job: Job, device: str) -> dict[str, Any]:
    """Measure one job."""
    server, client = both(functools.partial(work, job=job), device, job.threads)
    layer = online(job, client["tokens"], server["tokens"])
    before = ahead(job, client, server)
    peaks = ("peak_bytes", "peak_device_bytes")
    return {
        "machine": harness.machine(),
        "device": device,
        **asdict(job),
        "repeats": job.tokens - 1,
        "online": layer,
        "ahead": before,
        "model": model(job, layer, before),
        "relative_error": errors(client, server),
        "memory": {
            who: {key: seen[key] for key in peaks}
            for who, seen in zip(PARTIES, (client, server), strict=True)
        },
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=click.IntRange(1), default=1, help="Measured.")
@click.option("--positions", type=click.IntRange(8), default=256, help="With the last token.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="The server's.")
@click.option("--threads", type=click.IntRange(1), help="Of each party online; half the cores.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Tokens after a warm-up.")
@click.option("--batch", type=int, default=2048, help="Slots of the batch, a power of two.")
@click.option("--slots", type=click.Choice(["rlwe", "dealt"]), default="rlwe", help="Their source.")
@click.option("--ends/--no-ends", default=True, help="Embedding and head as well.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
def main(
    shape: str,
    layers: int,
    positions: int,
    device: str,
    threads: int | None,
    repeats: int,
    batch: int,
    slots: Any,
    ends: bool,
    out: Path | None,
) -> None:
    """Measure and print; see the module's text."""
    if layers >= int(SHAPES[shape]["layers"]):
        raise click.UsageError(f"at most {int(SHAPES[shape]['layers']) - 1} layers, not {layers}")
    if positions <= repeats + 1:
        raise click.UsageError(f"{repeats} repeats need more than {repeats + 1} positions")
    threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    job = Job(shape, layers, positions, repeats + 1, batch, slots, ends, threads)
    result = run(job, device)
    click.echo(report(result))
    harness.save(result, out)


if __name__ == "__main__":
    main()
