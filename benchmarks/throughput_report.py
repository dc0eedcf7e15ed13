"""Table and chart of many_clients.py, and the section of a page that they go into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


def section(result: dict[str, Any]) -> str:
    """One result as Markdown: what was measured, table, chart, limits."""
    measured, whole = result["measured"], result["whole"]
    size = f"shortened to {measured['layers']} of {whole['layers']} layers"
    if not result["layers"]:
        size = "all layers"
    facts = ", ".join(f"{k}: {v}" for k, v in result["machine"].items())
    parts = [
        f"Qwen2.5-{result['shape']} shape, {size} ({measured['maps']} maps "
        f"with {measured['weights'] / 1e6:.0f} M weights a token), on {result['device']}; "
        f"{result['repeats']} runs of {result['tokens']} tokens a client after a warm-up; medians, "
        f"quartiles in brackets. {facts}",
        *(f"{name}: {'; '.join(c['ranks_hold'])}" for name, c in result["otpipe"].items()),
        table(result),
        chart(result),
        limits(result),
    ]
    return "\n\n".join(parts)


def whole_model(result: dict[str, Any], tokens_per_s: float) -> str:
    """Tokens/s that follow for the model with all its layers, from below and from above.

    Let a map cost a + b * weights, a and b not negative. Then the whole model takes longer than the
    short one by at most the ratio of the maps (b = 0) or of the weights (a = 0), whichever is
    larger, and by at least the other.
    """
    measured, whole = result["measured"], result["whole"]
    ends = sorted(tokens_per_s * measured[key] / whole[key] for key in ("maps", "weights"))
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def table(result: dict[str, Any]) -> str:
    """A row for every number of clients of every configuration, and for each baseline."""
    gpu = any(level["gpu_percent"] for c in result["otpipe"].values() for level in c["levels"])
    head = ["ranks, transport", "clients", "tokens/s", "ms a token, one client", "maps/s"]
    if result["layers"]:
        head.append(f"derived: tokens/s with {result['whole']['layers']} layers")
    head += ["MB/s up / down", "cores busy: each rank", "all clients"]
    if gpu:
        head.append("GPU busy, %")
    rows = [head, ["---"] * len(head)]
    for config in result["otpipe"].values():
        for level in config["levels"]:
            rate, token = level["tokens_per_s"], level["token_s"]
            row = [
                f"{config['ranks']}, {config['transport']}",
                str(level["clients"]),
                f"{rate['median']:.1f} [{rate['q1']:.1f}, {rate['q3']:.1f}]",
                f"{1e3 * token['median']:.1f} [{1e3 * token['q1']:.1f}, {1e3 * token['q3']:.1f}]",
                f"{level['maps_per_s']['median']:.0f}",
            ]
            if result["layers"]:
                row.append(whole_model(result, rate["median"]))
            row += [
                f"{level['bytes_up_per_s'] / 1e6:.1f} / {level['bytes_down_per_s'] / 1e6:.1f}",
                " + ".join(f"{cores:.2f}" for cores in level["rank_cores"]),
                f"{level['client_cores']:.2f}",
            ]
            if gpu:
                row.append(", ".join(f"{percent:.0f}" for percent in level["gpu_percent"]))
            rows.append(row)
    for dtype, rate in result["baseline"].items():
        row = [
            f"transformers {dtype}, plaintext",
            "1",
            f"{rate['median']:.1f} [{rate['q1']:.1f}, {rate['q3']:.1f}]",
            f"{1e3 / rate['median']:.1f}",
            "",
        ]
        if result["layers"]:
            row.append(whole_model(result, rate["median"]))
        rows.append([*row, *[""] * (len(head) - len(row))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def chart(result: dict[str, Any]) -> str:
    """Mermaid: tokens/s against clients, a line for each configuration and baseline.

    A configuration that was not measured with every number of clients is in the table alone.
    """
    first = next(iter(result["otpipe"].values()))["levels"]
    lines = {
        f"otpipe {c['ranks']} rank(s), {c['transport']}": [
            level["tokens_per_s"]["median"] for level in c["levels"]
        ]
        for c in result["otpipe"].values()
        if len(c["levels"]) == len(first)
    }
    for dtype, rate in result["baseline"].items():
        lines[f"transformers {dtype}, one client (flat)"] = [rate["median"]] * len(first)
    top = math.ceil(1.1 * max(max(line) for line in lines.values()))
    drawn = "\n".join(f"    line [{', '.join(f'{y:.1f}' for y in ys)}]" for ys in lines.values())
    size = f", {result['layers']} layers" if result["layers"] else ""
    # A chart of this kind has no legend.
    return f"""```mermaid
xychart-beta
    title "Qwen2.5-{result["shape"]} shape{size}, {result["device"]}: tokens/s of all clients"
    x-axis "clients" [{", ".join(str(level["clients"]) for level in first)}]
    y-axis "tokens/s" 0 --> {top}
{drawn}
```

Lines, in the order in which they are drawn: {"; ".join(lines)}."""


def limits(result: dict[str, Any]) -> str:
    """What bounds the throughput, and how long the stores took."""
    cores = int(result["machine"]["cores"])
    parts = []
    if "products_s" in result:
        taken_s = result["products_s"]
        how = "all cores"
        if result["device"] == "cuda":
            how = "one GPU, launched on all lines by one thread"
        parts.append(
            f"The products alone ({how}, no client): {1e3 * taken_s:.2f} ms a token, "
            f"{1 / taken_s:.0f} tokens/s."
        )
    for name, config in result["otpipe"].items():
        level = config["levels"][-1]
        rate = level["mean_tokens_per_s"]  # over the same time as the processor time
        cpu_s = (sum(level["rank_cores"]) + level["client_cores"]) / rate
        parts.append(
            f"Processor time with {name} and {level['clients']} client(s): {1e3 * cpu_s:.1f} ms a "
            f"token, {1e3 * level['client_cores'] / rate:.1f} of them the client's; "
            f"{cores} cores that did nothing else would give {cores / cpu_s:.0f} tokens/s."
        )
    preparation = result["preparation"]
    if preparation["slots"]:
        parts.append(
            f"Before: {preparation['stores']} stores, {preparation['slots']} slots, "
            f"{preparation['bytes'] / 1e9:.1f} GB, in {preparation['seconds']:.0f} s."
        )
    return "\n".join(f"- {part}" for part in parts)


def rewrite_section(page: Path, tag: str, text: str) -> None:
    """Put ``text`` between the two comments with that tag.

    Raises:
        click.UsageError: the page does not have them.
    """
    begin, end = f"<!-- {tag} -->", f"<!-- {tag} end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise click.UsageError(f"{page} has no section {tag!r}; put {begin} and {end} into it")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
