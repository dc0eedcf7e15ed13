"""Errors of the operations on shares over many calls: largest, relative, and outliers.

    python benchmarks/operation_errors.py [--cases silu,exp] [--calls 10000000] [--out errors.json]
    python benchmarks/operation_errors.py --ot real --calls 100000

Both parties run in two threads of one process (of each of ``--jobs``), on the cases of
``tests/secure/operation_cases.py``, with new values and new shares in every batch. ``--ot ideal``
takes the tests' INSECURE stand-in for oblivious transfer, which computes the same results faster.
``--out`` is updated: a case that it has is replaced.

An outlier is a result that is off by more than 1 % of the largest magnitude of its range.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from harness import ROOT, machine
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests" / "secure"))

from operation_cases import CASES, Case, case_of
from two_parties import TwoParties, connect, integers, new_values, real

from otpipe.secure import PlainOperations, Share

OUTLIER = 0.01
BATCH = 1 << 16
SMALL_BATCH = 1 << 12
"""Of reciprocals, which look up every octave of each number."""

#: what an operation should give, in real numbers; where missing, the reference's integers
EXACT: dict[str, Callable[..., Tensor]] = {
    "truncate": real,
    "truncate_and_extend": real,
    "shorten": real,
    "silu": lambda x: torch.nn.functional.silu(real(x)),
    "exp": lambda x: real(x).exp(),
    "reciprocal": lambda x: real(x).reciprocal(),
    "reciprocal_sqrt": lambda x: 71.5 * real(x).rsqrt(),
}
#: the results' part that a relative error is taken over: above so many units
RELATIVE_ABOVE = 1 << 8
MAX_RELATIVE = f"max_relative_error_above_{RELATIVE_ABOVE}_units"


def results_of(
    parties: TwoParties, case: Case, secrets: list[Share]
) -> list[tuple[Tensor, Tensor]]:
    """For each result: what it is in units, float64, and what it should be."""
    got = parties.compute(case.program, *secrets)
    got = got if isinstance(got, list) else [got]
    if case.name in EXACT:
        unit = 2.0 ** got[0].frac
        return [(integers(got[0]).double(), EXACT[case.name](*secrets) * unit)]
    plain = PlainOperations()
    want = plain.run(case.program(plain, *secrets))
    want = want if isinstance(want, list) else [want]
    # The difference is taken in the ring: float64 does not hold 60 bits.
    pairs = []
    for one, other in zip(got, want, strict=True):
        target = integers(other).double() if other.bits > 1 else other.data.double()
        apart = Share.of(one.data - other.data, one.bits)
        off = integers(apart).double() if one.bits > 1 else apart.data.double()
        pairs.append((target + off, target))
    return pairs


def measure(name: str, ot: str, calls: int, job: int) -> dict[str, Any]:
    """Run a case on so many elements, other ones in each job: its figures."""
    torch.set_num_threads(1)
    case = case_of(name)
    parties = connect(ot)
    started_s = time.perf_counter()
    done = results = outliers = batch = 0
    largest = worst_units = worst_relative = total = 0.0
    while done < calls:
        new_values(batch + (job << 32))
        size = SMALL_BATCH if case.name.startswith("reciprocal") else BATCH
        secrets = case.secrets(min(size, max(1 << 10, calls - done)))
        done += max(x.data.numel() for x in secrets)
        for got, want in results_of(parties, case, secrets):
            error = (got - want).abs()
            largest = max(largest, float(want.abs().max()))
            worst_units = max(worst_units, float(error.max()))
            total += float(error.sum())
            large = want.abs() >= RELATIVE_ABOVE
            if bool(large.any()):
                worst_relative = max(
                    worst_relative, float((error[large] / want[large].abs()).max())
                )
            results += error.numel()
            outliers += int((error > OUTLIER * max(1.0, float(want.abs().max()))).sum())
        batch += 1
        if parties.ideal is not None:
            parties.ideal.client_learned.clear()
    return {
        "calls": done,
        "results": results,
        "batches": batch,
        "outliers": outliers,
        "largest_result_units": largest,
        "max_error_units": worst_units,
        "sum_of_errors_units": total,
        MAX_RELATIVE: worst_relative,
        "seconds": time.perf_counter() - started_s,
    }


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several jobs as of one."""
    whole = {
        key: (max if key.startswith(("max", "largest", "seconds")) else sum)(
            row[key] for row in rows
        )
        for key in rows[0]
    }
    whole["mean_error_units"] = whole.pop("sum_of_errors_units") / whole["results"]
    whole["max_error_of_range"] = whole["max_error_units"] / max(whole["largest_result_units"], 1.0)
    return whole


@click.command()
@click.option("--cases", default=",".join(case.name for case in CASES))
@click.option("--calls", default=10_000_000, show_default=True, help="Elements of each case.")
@click.option("--ot", type=click.Choice(["ideal", "real"]), default="ideal", show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Processes that share the calls.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
def main(cases: str, calls: int, ot: str, jobs: int, out: Path | None) -> None:
    """Measure and print; see the module's text."""
    print("| operation | OT | calls | max error, units | of range | relative | outliers | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in cases.split(","):
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            share = -(-calls // jobs)
            work = functools.partial(measure, name, ot, share)
            row = merged(list(pool.map(work, range(jobs))))
        print(
            f"| {name} | {ot} | {row['calls']} | {row['max_error_units']:.3g} | "
            f"{row['max_error_of_range']:.2g} | {row[MAX_RELATIVE]:.2g} | {row['outliers']} | "
            f"{row['seconds']:.0f} |",
            flush=True,
        )
        if out is not None:
            result = json.loads(out.read_text()) if out.exists() else {"operations": {}}
            result["machine"] = machine() | {"link": "none: two threads of one process"}
            result["operations"].setdefault(name, {})[ot] = row | {"jobs": jobs}
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
