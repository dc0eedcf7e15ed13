"""The table of docs/comparison.md: private weights here, from results, and in published systems.

    python benchmarks/comparison.py --doc docs/comparison.md --details benchmarks/README.md

Rows of otpipe come from ``results/private-layers-*.json`` (``private_layers.py``); those of the
others are quoted. ``--details`` writes the tables of each result, operation by operation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from private_layers import LINK_BYTES_PER_S, RTT_S, report
from throughput_report import rewrite_section

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = (
    "system",
    "parties, and who is trusted",
    "adversary",
    "model",
    "hardware",
    "link",
    "what is counted",
    "s a token",
    "MB a token",
    "round trips",
    "before the text is known",
    "amortised over",
)
UNKNOWN = "not at hand"
PUBLISHED = (
    (
        "BumbleBee (ePrint 2023/1678, NDSS 2025)",
        "two: data and model; no dealer, as otpipe",
        "semi-honest (2)",
        "LLaMA-7B",
        "CPUs (a)",
        UNKNOWN,
        "one token",
        "about 480 (a)",
        UNKNOWN,
        UNKNOWN,
        "nothing named",
        "one token",
    ),
    (
        "CryptoMoE (arXiv 2511.01197)",
        "two; no dealer, as otpipe",
        "semi-honest (2)",
        "mixtures of experts of 7 to 16 B parameters, of which a token uses a part",
        UNKNOWN,
        UNKNOWN,
        "a prefill, divided by its tokens",
        "22 to 46",
        "1300 to 2500",
        UNKNOWN,
        "nothing named",
        "a batch of 16",
    ),
    (
        "SIGMA (ePrint 2023/1269)",
        "two servers, and a dealer that is trusted by both and makes all keys",
        "semi-honest (2)",
        "Llama2-13B",
        "GPUs (a)",
        UNKNOWN,
        "one forward pass; the dealer's work is apart",
        "44 (a)",
        UNKNOWN,
        UNKNOWN,
        "the dealer's keys: hundreds of GB (2)",
        "one pass",
    ),
    (
        "PUMA / SPU (arXiv 2307.12533)",
        "three servers, of which no two may collude (honest majority)",
        "semi-honest (2)",
        "LLaMA-7B",
        UNKNOWN,
        UNKNOWN,
        "what one more token adds",
        "164",
        "2060",
        UNKNOWN,
        "nothing named",
        "one token",
    ),
    (
        "FHE on one GPU, several publications",
        "two: a client with the key, a server that computes; no dealer",
        UNKNOWN,
        "Llama-3-8B",
        "one GPU",
        UNKNOWN,
        "one token",
        "9.7 to 31 (a, 2)",
        UNKNOWN,
        UNKNOWN,
        "nothing named",
        "one token",
    ),
)


def table(results: list[dict[str, Any]]) -> str:
    """All systems."""
    rows = [HEAD, ("---",) * len(HEAD), *map(own_row, results), *PUBLISHED]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def own_row(result: dict[str, Any]) -> tuple[str, ...]:
    """One result of ``private_layers.py``."""
    machine, whole, repeats = result["machine"], result["model"], result["repeats"]
    code, derived = whole["by_code"], whole["derived"]
    kind = f"{machine['cores']} cores of {machine['cpu']}, client and server"
    if result["device"] == "cuda":
        kind = f"server on {machine['gpu']}, client on {machine['cores']} cores of {machine['cpu']}"
    online = code["online_up_bytes"] + code["online_down_bytes"]
    products = code["products_up_bytes_a_position"] + code["products_down_bytes_a_position"]
    slots = result["num_slots"]
    slot = sum(code["slot_bytes"][str(slots)])
    ahead = code["cots_up_bytes"] + products + slot
    seconds = {
        "COTs": derived["cots_s"],
        "attention's masks": derived["products_s_a_position"],
    }
    made = [f"{name} {value:.3g} s" for name, value in seconds.items()]
    everything = "not measured with its slots"
    if "slot_s" in derived:
        total = derived["online_s"] + sum(seconds.values()) + derived["slot_s"]
        made.append(f"a slot {derived['slot_s']:.3g} s")
        everything = f"{total:.3g}"
    layers = result["layers"]
    plural = "layer" if layers == 1 else "layers"
    return (
        f"**otpipe**, `--weights private`, commit {machine['commit']}",
        "two: client and server; no dealer",
        "semi-honest, both",
        f"Qwen2.5-{result['shape'].upper()} shape, noise as int8 weights",
        kind,
        f"loopback; derived: {LINK_BYTES_PER_S / 1.25e8:g} Gbit/s, {1e3 * RTT_S:.0f} ms "
        "a round trip",
        f"one decoded token after {result['positions'] - 1} others; {layers} whole {plural} of "
        f"{whole['layers']}, embedding and head measured ({repeats} tokens), the rest multiplied",
        f"online {derived['online_s']:.3g}; on the link {derived['online_s_on_link']:.3g}; "
        f"with all that is made before, on loopback: {everything}",
        f"online {online / 1e6:.0f}; before {ahead / 1e6:.0f}",
        f"{code['rounds']}",
        f"{', '.join(made)}; {code['cots_up_bytes'] / 1e6:.0f} + {products / 1e6:.0f} + "
        f"{slot / 1e6:.0f} MB",
        f"one token; masks over {result['positions']} positions, slots over a batch of {slots}",
    )


def details(results: list[dict[str, Any]]) -> str:
    """Every result, operation by operation."""
    parts = []
    for each in results:
        where = each["machine"]["gpu"] if each["device"] == "cuda" else "CPU"
        title = f"### A layer of the {each['shape'].upper()} shape, private weights, {where}"
        parts.append(f"{title}\n\n{report(each)}")
    return "\n\n".join(parts)


def found() -> list[dict[str, Any]]:
    """Results that have the ends, the smallest model first."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("private-layers-*.json")]
    whole = [each for each in results if each["ends"]]
    return sorted(whole, key=lambda each: (each["model"]["by_code"]["cots"], each["device"]))


@click.command()
@click.option("--doc", type=click.Path(exists=True, path_type=Path), help="Write it there.")
@click.option(
    "--details", "readme", type=click.Path(exists=True, path_type=Path), help="The results' tables."
)
def main(doc: Path | None, readme: Path | None) -> None:
    """Print the table, and write it into its page."""
    results = found()
    if not results:
        raise click.UsageError(f"no private-layers-*.json in {RESULTS}; run private_layers.py")
    text = table(results)
    click.echo(text)
    if doc is not None:
        rewrite_section(doc, "comparison", text)
    if readme is not None:
        rewrite_section(readme, "private_layers", details(results))


if __name__ == "__main__":
    main()
