"""docs/comparison.md and the tables of private_layers.py are those of the results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from comparison import details, found, table

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_made_from_the_results() -> None:
    assert f"\n\n{table(found())}\n\n" in (ROOT / "docs" / "comparison.md").read_text()


def test_the_details_are_made_from_the_results() -> None:
    assert details(found()) in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("result", found(), ids=lambda result: f"{result['shape']}")
def test_every_result_agrees_with_plaintext(result: dict[str, dict[str, float]]) -> None:
    assert max(result["relative_error"].values()) < 2e-3
