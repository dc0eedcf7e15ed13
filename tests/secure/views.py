"""What a party learns, as numbers that must be uniform and independent; findings are sentences.

The same function judges the operations and operations with planted faults, so that a test which
finds nothing is known to be able to find something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIGMAS = 6.5
"""Limit of a statistic in standard deviations; chance exceeds it once in 10^9 or so."""
BIN_BITS = 5


def findings(view: Sequence[tuple[Tensor, int]]) -> list[str]:
    """What is not uniform in a view: each value, its neighbours' differences, pairs of one shape.

    Args:
        view: int64 tensors (n,) or (n, words) and the bits of their values, in order.
    """
    found = []
    for position, (values, bits) in enumerate(view):
        columns = values[:, None] if values.ndim == 1 else values
        for word, column in enumerate(columns.unbind(1)):
            name = f"result {position}, word {word}"
            found += _not_flat(column, bits, name)
            found += _not_flat(column[1:] - column[:-1], bits, f"neighbours of {name}")
    last: dict[tuple[int, int], int] = {}
    for position, (values, bits) in enumerate(view):
        if values.numel() != len(values):
            continue
        before = last.get((len(values), bits))
        last[len(values), bits] = position
        if before is not None:
            name = f"results {before} and {position} together"
            found += _not_flat(view[before][0].view(-1) - values.view(-1), bits, name)
    return found


def _not_flat(values: Tensor, bits: int, name: str) -> list[str]:
    """Chi-square of the lowest bits, of the highest but one, and of that one.

    Packing may leave the highest bit zero in all values: then there is nothing in it.
    """
    low_width = min(BIN_BITS, bits)
    windows = {"low": (0, low_width)}
    if bits > BIN_BITS + 1:
        windows["high"] = (bits - 1 - BIN_BITS, BIN_BITS)
        if bool(((values >> (bits - 1)) & 1).any()):
            windows["top"] = (bits - 1, 1)
    found = []
    for which, (lowest, width) in windows.items():
        counts = torch.bincount((values >> lowest) & ((1 << width) - 1), minlength=1 << width)
        expected = len(values) / (1 << width)
        if expected < 5:
            raise ValueError(f"{name}: {len(values)} values are too few for {1 << width} bins")
        statistic = float(((counts - expected) ** 2 / expected).sum())
        degrees = (1 << width) - 1
        # Wilson and Hilferty: the cube root is nearly normal, also with one degree of freedom.
        spread = 2 / (9 * degrees)
        score = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
        if score > SIGMAS:
            found.append(f"{which} bits of {name} are {score:.0f} sigmas from uniform")
    return found
