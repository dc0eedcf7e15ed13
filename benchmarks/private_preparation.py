"""Preparation for private weights, map by map: what each side computes, slots per second.

    python benchmarks/private_preparation.py --shape 0.5b --slots 8192

Client and server take turns in one process, so the times of both add up; there is no network. A
map is cut to ``--inputs`` inputs and ``--outputs`` outputs where it is larger, and its times are
scaled up: uploads grow with n, products with n m, answers with m.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import harness
import numpy as np
import torch
from shapes import SHAPES, VOCABULARY

from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivatePacking, choose_packing
from otpipe.crypto.private_rlwe import decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.crypto.randomness import random_bytes
from otpipe.crypto.rlwe import BatchSecret

PARAMS = PRIVATE_PARAMS["private44"]
CHECKED_SLOTS = 4
STEPS = ("encrypt", "stage", "products", "answers", "decrypt")


def maps_of(shape: str) -> dict[str, tuple[int, int, int]]:
    """kind -> (n, m, how many of them); the embedding has two digits an output."""
    sizes = SHAPES[shape]
    hidden, mlp, layers = int(sizes["hidden"]), int(sizes["mlp"]), int(sizes["layers"])
    kv = hidden // int(sizes["heads"]) * int(sizes["kv"])
    return {
        "embed": (VOCABULARY[shape], 2 * hidden, 1),
        "qkv": (hidden, hidden + 2 * kv, layers),
        "o": (hidden, hidden, layers),
        "gate_up": (hidden, 2 * mlp, layers),
        "down": (mlp, hidden, layers),
        "lm_head": (hidden, VOCABULARY[shape], 1),
    }


class Clock:
    """Seconds by step, the device idle at both ends of each; a step inside another counts alone."""

    def __init__(self, device: str) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._device = device

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time added to ``step``."""

        def run(*args: Any) -> Any:
            self._wait()
            inside_s = sum(self.seconds.values())
            started_s = time.perf_counter()
            result = function(*args)
            self._wait()
            inside_s -= sum(self.seconds.values())
            self.seconds[step] += time.perf_counter() - started_s + inside_s
            return result

        return run

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def measure(n: int, m: int, packing: PrivatePacking, device: str) -> dict[str, float]:
    """Seconds of each step of one exchange; the results of a few slots are checked."""
    slots = packing.num_slots
    weight = torch.randint(-127, 128, (m, n), dtype=torch.int8)
    multipliers = torch.randint(1, 65, (m,))
    secret, a_key = BatchSecret.generate(PARAMS), os.urandom(32)
    masks = MaskStream(fresh_mask_key(), 0, m, PARAMS.log2_p)
    evaluator = PrivateEvaluator(
        weight.to(device), multipliers.to(device), packing, 0, a_key, masks
    )
    clock, backend = Clock(device), evaluator._backend
    for step, name in (("products", "accumulate"), ("answers", "finish")):
        setattr(backend, name, clock.timed(step, getattr(backend, name)))
    encrypt = clock.timed("encrypt", encrypt_block)
    stage = clock.timed("stage", evaluator.add_block)
    decrypt = clock.timed("decrypt", decrypt_block)

    stage(0, torch.from_numpy(encrypt_key(secret, a_key, 0)))
    want_Tm = -masks.rows(0, CHECKED_SLOTS).astype(np.uint64)
    scaled_nm = (weight.long() * multipliers[:, None]).t().numpy().astype(np.uint64)
    step = 64 * packing.inputs
    for first in range(0, n, step):
        count = min(step, n - first)
        r_Tn = random_bytes(8 * slots * count).view(np.uint64).reshape(slots, count)
        number = 1 + first // packing.inputs
        block = encrypt(secret, packing, a_key, 0, number, r_Tn)
        stage(number, torch.from_numpy(block))
        want_Tm += r_Tn[:CHECKED_SLOTS] @ scaled_nm[first : first + count]
    for first_answer, answers in evaluator.answers(1 << 25):
        at = first_answer * packing.outputs
        outputs = min(m - at, len(answers) * packing.outputs)
        got_mT = decrypt(secret, packing, answers.numpy(), outputs)
        wrong = got_mT[:, :CHECKED_SLOTS].T ^ want_Tm[:, at : at + outputs]
        if (wrong & np.uint64((1 << PARAMS.log2_p) - 1)).any():
            raise SystemExit(f"wrong results in outputs from {at}")
    return clock.seconds


def measure_map(
    kind: str, n: int, m: int, slots: int, device: str, limits: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Medians of one kind of map, scaled to its whole size."""
    packing = choose_packing(PARAMS, n, m, slots)
    cut_n = min(n, max(limits[0], packing.inputs))
    cut_m = min(m, max(limits[1], packing.outputs))
    runs = [measure(cut_n, cut_m, packing, device) for _ in range(repeats)]
    inputs = packing.num_polynomials(n) / packing.num_polynomials(cut_n)
    answers = packing.num_answers(m) / packing.num_answers(cut_m)
    products = n * m / (cut_n * cut_m)
    scale = dict(zip(STEPS, (inputs, inputs, products, answers, answers), strict=True))
    seconds = {step: scale[step] * statistics.median(run[step] for run in runs) for step in STEPS}
    return {
        "map": kind,
        "n": n,
        "m": m,
        "measured": [cut_n, cut_m],
        "inputs_packed": packing.inputs,
        "outputs_packed": packing.outputs,
        "seconds": seconds,
        "slots_per_s": slots / sum(seconds.values()),
        "up_bytes_per_slot": packing.upload_total(n) / slots,
        "down_bytes_per_slot": packing.download_total(m) / slots,
        "gmac_per_s": n * m * PARAMS.ring_degree * 32 / seconds["products"] / 1e9,
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--slots", type=int, default=PARAMS.ring_degree, help="Slots of the batch.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--inputs", type=int, default=1024, help="Most inputs measured of a map.")
@click.option("--outputs", type=int, default=1024, help="Most outputs measured of a map.")
@click.option("--repeats", type=int, default=3)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str, slots: int, device: str, inputs: int, outputs: int, repeats: int, out: Path | None
) -> None:
    """Measure every kind of map of one shape."""
    measure(64, 64, choose_packing(PARAMS, 64, 64, slots), device)  # compile and warm up
    rows, total_s = [], 0.0
    click.echo(f"{shape}, {slots} slots, {device}; seconds a batch and map")
    click.echo("| map | n x m | count | v | " + " | ".join(STEPS) + " | slots/s |")
    click.echo("|---" * (len(STEPS) + 5) + "|")
    for kind, (n, m, count) in maps_of(shape).items():
        row = measure_map(kind, n, m, slots, device, (inputs, outputs), repeats)
        rows.append({**row, "count": count})
        total_s += count * sum(row["seconds"].values())
        cells = " | ".join(f"{row['seconds'][step]:.2f}" for step in STEPS)
        click.echo(
            f"| {kind} | {n} x {m} | {count} | {row['inputs_packed']} | {cells} | "
            f"{row['slots_per_s']:.0f} |"
        )
    up, down = (
        sum(row["count"] * row[f"{way}_bytes_per_slot"] for row in rows) / 1e6
        for way in ("up", "down")
    )
    click.echo(f"whole model: {slots / total_s:.1f} slots/s, {up:.1f} MB up and {down:.1f} MB down")
    if out is not None:
        result = {
            "machine": harness.machine(),
            "shape": shape,
            "slots": slots,
            "device": device,
            "maps": rows,
            "slots_per_s": slots / total_s,
        }
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
