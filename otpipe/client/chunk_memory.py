"""Memory of one chunk of rows: the arrays of its layers.

Everything is taken once and used again by the next map and the next layer. Fresh memory for each
array would cost page faults, which the threads of a process take in turn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Workspace:
    """Arrays by name, kept for the next use of the same name."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of that shape; what was last taken under the name is overwritten."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < num_bytes:
            held = self._held[name] = np.empty(num_bytes, np.uint8)
        return held[:num_bytes].view(dtype).reshape(shape)
