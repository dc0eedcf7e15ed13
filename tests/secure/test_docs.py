"""The tables of docs/secure_operations.md against the code; run this file to print them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from secure_works import layer_parts, operations

from otpipe.secure import DecoderFormats

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "0.5B": {"hidden": 896, "heads": 14, "kv": 2, "mlp": 4864, "layers": 24},
    "14B": {"hidden": 5120, "heads": 40, "kv": 8, "mlp": 13824, "layers": 48},
}
POSITIONS = 256


def operation_rows() -> list[str]:
    """Section 4."""
    rows = []
    for work in operations(1 << 14):
        cost, n = work.cost, work.elements
        each = (cost.extension_bytes, cost.to_server, cost.to_client)
        figures = " | ".join(f"{size / n:.1f}" for size in each)
        rows.append(
            f"| {work.name} | {cost.rounds} | {cost.cots / n:.1f} | {figures} | "
            f"{cost.total_bytes / n:.0f} |"
        )
    return rows


def format_rows() -> list[str]:
    """Section 6."""
    return [
        f"| `{name}` | {form.bits} | 2^-{form.frac} | {form.limit:g} | {form.reason} |"
        for name, form in DecoderFormats().formats().items()
    ]


def layer_rows() -> list[str]:
    """Section 8: the parts of a layer, then of a token."""
    rows = []
    for name, shape in LAYERS.items():
        apart = {True: 0, False: 0}
        for work in layer_parts(shape, POSITIONS):
            cost = work.cost
            apart[work.name.endswith("by OT")] += cost.total_bytes
            rows.append(
                f"| {name} | {work.name} | {work.elements} | {cost.rounds} | "
                f"{cost.total_bytes / work.elements:.0f} | {cost.total_bytes / 1e6:.2f} |"
            )
        layers = shape["layers"]
        rows.append(
            f"| {name} | a token: {layers} layers without the products | | | | "
            f"{layers * apart[False] / 1e6:.0f} |"
        )
        rows.append(
            f"| {name} | a token: both products by OT | | | | {layers * apart[True] / 1e6:.0f} |"
        )
    return rows


def error_rows() -> list[str]:
    """Section 10, from what was measured."""
    path = ROOT / "benchmarks" / "results" / "operation-errors-cpu.json"
    rows = []
    for name, figures in json.loads(path.read_text())["operations"].items():
        kinds = {kind: figures.get(kind, {}) for kind in ("ideal", "real")}
        calls = " | ".join(f"{kind.get('calls', 0):,}" for kind in kinds.values())
        worst = max(figure["max_error_units"] for figure in figures.values())
        share = max(figure["max_error_of_range"] for figure in figures.values())
        outliers = sum(figure["outliers"] for figure in figures.values())
        rows.append(f"| `{name}` | {calls} | {worst:.2f} | {share:.1e} | {outliers} |")
    return rows


TABLES = (operation_rows, format_rows, layer_rows, error_rows)


@pytest.mark.parametrize("rows", TABLES)
def test_the_tables_are_those_of_the_code(rows: Callable[[], list[str]]) -> None:
    text = (ROOT / "docs" / "secure_operations.md").read_text().splitlines()
    for row in rows():
        assert row in text


if __name__ == "__main__":
    for table in TABLES:
        print("\n".join(table()), end="\n\n")
