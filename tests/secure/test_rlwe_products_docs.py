"""The cost tables of docs/attention_products.md against the code; run this file to print them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from secure_works import layer_parts

from otpipe.crypto.private_matmul import MATMUL_PARAMS, ProductPlan
from otpipe.crypto.private_matmul_noise import log2_distance
from otpipe.crypto.private_noise import MAX_LOG2_DISTANCE
from otpipe.model.private_description import FORMATS
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.product_blocks import ProductBlocks
from otpipe.secure.rlwe_products import AttentionSizes

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "0.5B": {"hidden": 896, "heads": 14, "kv": 2, "mlp": 4864, "layers": 24},
    "14B": {"hidden": 5120, "heads": 40, "kv": 8, "mlp": 13824, "layers": 48},
}
SHAPE_72B = {"hidden": 8192, "heads": 64, "kv": 8, "mlp": 29568, "layers": 80}
TEXTS = ((64,) * 4, (256,), (256,) * 4, (1024,))
EVALUATED_PARTS = 2


def parameter_rows() -> list[str]:
    """Section 4."""
    return [
        f"| `{p.name}` | {p.log2_p} | {p.num_digits} of {p.digit_bits} | {p.num_levels} | "
        f"{p.first_bits}, {p.second_bits} | {64 + p.flood_shift} |"
        for p in MATMUL_PARAMS
    ]


def session_rows() -> list[str]:
    """Section 4: what the distance of one session allows."""
    rows = []
    for name, shape in (*LAYERS.items(), ("72B", SHAPE_72B)):
        size = shape["hidden"] // shape["heads"]
        sizes = AttentionSizes(HeadShapes(shape["heads"], shape["kv"], size), 40, 51)
        blocks = ProductBlocks(sizes, shape["layers"], FORMATS.max_positions)
        texts = 2.0 ** (2 * MAX_LOG2_DISTANCE) // blocks.text_distance(0, 256)
        rows.append(f"| {name} | {blocks.max_text} | {texts:.0f} |")
    return rows


def cost_rows() -> list[str]:
    """Section 5: MB a position or token, all layers."""
    rows = []
    for name, shape in LAYERS.items():
        size = shape["hidden"] // shape["heads"]
        sizes = AttentionSizes(HeadShapes(shape["heads"], shape["kv"], size), 40, 51)
        layers = shape["layers"]
        for blocks in TEXTS:
            total = up = down = last = macs = 0
            distances = []
            for count in blocks:
                plans = sizes.plans(total, total + count)
                made = sizes.preparation_bytes(total, total + count)
                up, down, last = up + made[0], down + made[1], sum(made)
                distances.append(log2_distance((plan, layers * shape["kv"]) for plan in plans))
                macs += shape["kv"] * sum(
                    plan.rows * plan.inputs * plan.params.num_levels * len(plan.pieces)
                    for plan in plans
                )
                total += count
            macs *= layers * EVALUATED_PARTS * 16 * MATMUL_PARAMS[0].ring_degree
            online = 2 * layers * sizes.online_bytes(total - 1, 1)
            by_ot = layers * sum(
                work.cost.total_bytes
                for work in layer_parts(shape, total)
                if work.name.endswith("by OT")
            )
            rows.append(
                f"| {name} | {len(blocks)} x {blocks[0]} | {layers * up / total / 1e6:.1f} | "
                f"{layers * down / total / 1e6:.1f} | {layers * last / blocks[-1] / 1e6:.0f} | "
                f"{online / 1e6:.2f} | {by_ot / 1e6:.0f} | {max(distances):.1f} | "
                f"{macs / 1e12:.0f} |"
            )
    return rows


def measured_row() -> list[str]:
    """Section 5, from what was measured."""
    path = ROOT / "benchmarks" / "results" / "attention-products-0.5b-cpu.json"
    found = json.loads(path.read_text())
    (block,), (seconds,) = found["blocks"], found["prepare_s_per_layer"]
    low, median, high = (f"{cut:.0f}" for cut in seconds)
    return [
        f"| {block} | {found['prepare_bytes_per_layer'] / 1e6:.0f} | {median} ({low} to {high}) | "
        f"{found['decode_bytes_per_layer'] / 1e3:.0f} | {1e3 * found['decode_s']:.0f} |"
    ]


def direct_rows() -> list[str]:
    """Section 6: MB a token for the two cross terms whose client's factor is new in every token."""
    scores, context = MATMUL_PARAMS
    rows = []
    for name, shape in LAYERS.items():
        size, group = shape["hidden"] // shape["heads"], shape["heads"] // shape["kv"]
        figures = []
        for positions in (256, 1024):
            plans = (
                ProductPlan(scores, positions, size, group),
                ProductPlan(context, size, positions, group),
            )
            bytes_a_head = sum(plan.upload_bytes + plan.download_bytes for plan in plans)
            figures.append(f"{shape['layers'] * shape['kv'] * bytes_a_head / 1e6:.0f}")
        rows.append(f"| {name} | {' | '.join(figures)} |")
    return rows


TABLES = (parameter_rows, session_rows, cost_rows, measured_row, direct_rows)


@pytest.mark.parametrize("rows", TABLES)
def test_the_tables_are_those_of_the_code(rows: Callable[[], list[str]]) -> None:
    text = (ROOT / "docs" / "attention_products.md").read_text().splitlines()
    for row in rows():
        assert row in text


if __name__ == "__main__":
    for table in TABLES:
        print("\n".join(table()), end="\n\n")
