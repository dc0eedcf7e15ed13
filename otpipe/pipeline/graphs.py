"""Masked linear maps on CUDA as one launch each: a recorded graph of copy, product and copy back.

A decode step is hundreds of small products one after the other, and launching their kernels one by
one takes longer than the GPU needs. So what the GPU is to do between pinned host buffers is
recorded before the first client comes, while no other thread uses the device, and then replayed.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from otpipe.model.spec import LinearMap

RECORDED_ROWS = (1, 2, 4, 8, 16)
"""Numbers of rows that are recorded; others are padded to the next. Several clients that decode at
once make a few rows; more than these are worth their launches."""


class _Buffers(NamedTuple):
    """Pinned host memory for one number of rows, uint8; shared by all maps."""

    inputs: Tensor
    outputs: Tensor


class GraphedMaps:
    """Replays products of few rows. Not thread-safe: one at a time.

    Args:
        product: W (x - r) of ``(map_index, rows, payload)`` on the device, uint8 in and out; what
            it does on the GPU is recorded.
        linear_maps: the whole model's table, indexed by map.
        indices: the maps that this rank holds.
        device: the CUDA device.
    """

    def __init__(
        self,
        product: Callable[[int, int, Tensor], Tensor],
        linear_maps: tuple[LinearMap, ...],
        indices: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._product = product
        self._linear_maps = linear_maps
        self._device = device
        self._indices = indices
        held = [linear_maps[index] for index in indices]
        self._row_bytes = (
            max((m.in_features * m.ring_bytes for m in held), default=0),
            max((m.out_features * m.ring_bytes for m in held), default=0),
        )
        self._buffers: dict[int, _Buffers] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.default_stream(device)

    def linear(self, map_index: int, rows: int, payload: np.ndarray) -> np.ndarray:
        """W (x - r) of a number of rows that is :meth:`recorded`.

        Args:
            payload: uint8 (T * n * ring_bytes,).

        Returns:
            uint8 (T * m * ring_bytes,), the caller's own.
        """
        padded = 1 << (rows - 1).bit_length()
        inputs, outputs = self._buffers[padded]
        inputs.numpy()[: payload.size] = payload
        self._graphs[map_index, padded].replay()
        self._stream.synchronize()
        linear_map = self._linear_maps[map_index]
        return outputs.numpy()[: rows * linear_map.out_features * linear_map.ring_bytes].copy()

    def record(self) -> None:
        """Record every map for every number of rows. Nobody else may use the device meanwhile."""
        for rows in RECORDED_ROWS:
            for index in self._indices:
                self._record(index, rows)

    def recorded(self, map_index: int, rows: int) -> bool:
        """Whether :meth:`linear` can do this."""
        return (map_index, 1 << (rows - 1).bit_length()) in self._graphs

    def _record(self, map_index: int, rows: int) -> None:
        linear_map = self._linear_maps[map_index]
        if rows not in self._buffers:
            self._buffers[rows] = _Buffers(
                *(
                    torch.zeros(rows * row_bytes, dtype=torch.uint8, pin_memory=True)
                    for row_bytes in self._row_bytes
                )
            )
        inputs, outputs = self._buffers[rows]
        inputs = inputs[: rows * linear_map.in_features * linear_map.ring_bytes]
        outputs = outputs[: rows * linear_map.out_features * linear_map.ring_bytes]

        def work() -> None:
            on_device = inputs.to(self._device, non_blocking=True)
            outputs.copy_(self._product(map_index, rows, on_device), non_blocking=True)

        work()  # compiles what is not yet compiled, which cannot be done while recording
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):
            # All graphs take their temporary memory from one pool: none needs it after its replay.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        self._graphs[map_index, rows] = graph
