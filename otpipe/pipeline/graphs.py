"""Masked linear maps on CUDA as one launch each: a recorded graph of copy, product and copy back.

A decode step is hundreds of small products one after the other, and launching their kernels one by
one takes longer than the GPU needs. So what the GPU is to do between pinned host buffers is
recorded before the first client comes, while no other thread uses the device, and then replayed.

For clients' connections they are also recorded on a few lines, each with its stream and its
buffers, so that several connections are served at once without Python: ``otpipe.server.row_server``
launches them by the addresses given here.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from otpipe.errors import OtpipeError
from otpipe.kernels.native_io import address_of, new_mutex
from otpipe.model.spec import LinearMap

RECORDED_ROWS = (1, 2, 4, 8, 16)
"""Numbers of rows that are recorded; others are padded to the next. Several clients that decode at
once make a few rows; more than these are worth their launches."""


NUM_LINES = 4
"""Products that may be under way at once: copying in, multiplying, copying out, and waiting for the
processor. On an H200 four lines do as much as eight."""

LINE_ROWS = (1, 4, 8, 16, 32, 64)
"""As RECORDED_ROWS, for lines. What a line is not recorded for goes through Python and in bulk."""

MAX_LINE_OUT_BYTES = 16 << 20
"""No line is recorded for larger results: lm_head of many rows, which is rarely asked for."""


def most_line_rows(linear_map: LinearMap) -> int:
    """Rows of one request that a line is recorded for, at most; 0 if for none."""
    row_bytes = linear_map.out_features * linear_map.ring_bytes
    return max((rows for rows in LINE_ROWS if rows * row_bytes <= MAX_LINE_OUT_BYTES), default=0)


@dataclass(frozen=True, eq=False)
class RowLine:
    """What a kernel needs to replay products. One at a time: hold ``mutex``.

    Attributes:
        launch, wait: addresses of C functions: ``launch(launches[map, i], stream)`` starts a
            product of ``rows[i]`` rows, ``wait(stream)`` returns when ``outputs`` holds the result.
            Both return 0 on success.
        rows: int64, rising.
        launches: int64 (maps of the model, sizes); 0 where nothing is recorded.
        stream: second argument of ``launch``.
        inputs, outputs: uint8, the payload of request and answer.
        mutex: for ``native_io``.
    """

    launch: int
    wait: int
    rows: np.ndarray
    launches: np.ndarray
    stream: int
    inputs: np.ndarray
    outputs: np.ndarray
    mutex: np.ndarray


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
        self._stream = torch.cuda.default_stream(device)
        self._kept: list[object] = []  # what the lines' addresses point into
        self.lines: list[RowLine] = []

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
        """Record every map for every number of rows, and ``lines``.

        Nobody else may use the device meanwhile.
        """
        pool = torch.cuda.graph_pool_handle()
        for rows in RECORDED_ROWS:
            self._buffers[rows] = self._new_buffers(rows)
            for index in self._indices:
                graph = self._record(index, rows, self._buffers[rows], pool, keep_graph=False)
                self._graphs[index, rows] = graph
        self.lines = [self._new_line() for _ in range(NUM_LINES)]

    def recorded(self, map_index: int, rows: int) -> bool:
        """Whether :meth:`linear` can do this."""
        return (map_index, 1 << (rows - 1).bit_length()) in self._graphs

    def _new_buffers(self, rows: int) -> _Buffers:
        return _Buffers(
            *(
                torch.zeros(rows * row_bytes, dtype=torch.uint8, pin_memory=True)
                for row_bytes in self._row_bytes
            )
        )

    def _new_line(self) -> RowLine:
        driver = _driver()
        stream = torch.cuda.Stream(self._device)
        # The lines run at once, so that each needs temporary memory of its own.
        pool = torch.cuda.graph_pool_handle()
        launches = np.zeros((len(self._linear_maps), len(LINE_ROWS)), np.int64)
        held = [
            (self._linear_maps[i], column)
            for i in self._indices
            for column in range(len(LINE_ROWS))
        ]
        recorded = [(m, column) for m, column in held if LINE_ROWS[column] <= most_line_rows(m)]
        buffers = _Buffers(
            *(
                torch.zeros(max(sizes, default=0), dtype=torch.uint8, pin_memory=True)
                for sizes in (
                    [LINE_ROWS[c] * m.in_features * m.ring_bytes for m, c in recorded],
                    [LINE_ROWS[c] * m.out_features * m.ring_bytes for m, c in recorded],
                )
            )
        )
        for linear_map, column in recorded:
            index = linear_map.index
            graph = self._record(index, LINE_ROWS[column], buffers, pool, keep_graph=True)
            launches[index, column] = _instantiated(driver, graph)
            self._kept.append(graph)
        self._kept.append(stream)
        return RowLine(
            address_of(driver.cuGraphLaunch),
            address_of(driver.cuStreamSynchronize),
            np.array(LINE_ROWS, np.int64),
            launches,
            stream.cuda_stream,
            buffers.inputs.numpy(),
            buffers.outputs.numpy(),
            new_mutex(),
        )

    def _record(
        self, map_index: int, rows: int, buffers: _Buffers, pool: Any, *, keep_graph: bool
    ) -> torch.cuda.CUDAGraph:
        """A graph whose temporary memory is in ``pool``, a ``graph_pool_handle``."""
        linear_map = self._linear_maps[map_index]
        inputs = buffers.inputs[: rows * linear_map.in_features * linear_map.ring_bytes]
        outputs = buffers.outputs[: rows * linear_map.out_features * linear_map.ring_bytes]

        def work() -> None:
            on_device = inputs.to(self._device, non_blocking=True)
            outputs.copy_(self._product(map_index, rows, on_device), non_blocking=True)

        work()  # compiles what is not yet compiled, which cannot be done while recording
        graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
        stream = torch.cuda.Stream(self._device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):
            # Graphs that run one after the other share a pool: none needs it after its replay.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph


def _driver() -> ctypes.CDLL:
    """The CUDA driver's library, which torch has loaded already."""
    return ctypes.CDLL("libcuda.so.1")


def _instantiated(driver: ctypes.CDLL, graph: torch.cuda.CUDAGraph) -> int:
    """Handle of a recorded graph that can be launched; it lives as long as the process."""
    handle = ctypes.c_void_p()
    result = driver.cuGraphInstantiateWithFlags(
        ctypes.byref(handle), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_ulonglong(0)
    )
    if result != 0 or not handle.value:
        raise OtpipeError(
            f"the CUDA driver could not prepare a recorded product (error {result}); use another "
            "driver, or --device cpu"
        )
    return handle.value
