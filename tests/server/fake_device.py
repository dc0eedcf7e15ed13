"""A device for the compiled loops of rows that is a function of the test's process."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import torch

from otpipe.kernels.native_io import address_of, new_mutex
from otpipe.pipeline.graphs import RowLine
from otpipe.pipeline.stage import Stage

_Launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_Wait = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)

STREAM = 77
SIZES = (1, 4)
OUT_OF_ORDER = 719


class FakeDevice:
    """One line whose launches are computed by a stage, and counted."""

    def __init__(self, stage: Stage, missing: tuple[int, ...] = ()) -> None:
        self.launched: list[int] = []
        self.broken = False
        self.at_once, self.most_at_once = 0, 0
        self._stage = stage
        self._maps = stage._linear_maps
        self._launch, self._wait = _Launch(self._on_launch), _Wait(self._on_wait)
        held = [m for m in self._maps if m.index in stage._maps and m.index not in missing]
        launches = np.zeros((len(self._maps), len(SIZES)), np.int64)
        for linear_map in held:
            for column, rows in enumerate(SIZES):
                launches[linear_map.index, column] = 1000 * rows + linear_map.index
        self.line = RowLine(
            address_of(self._launch),
            address_of(self._wait),
            np.array(SIZES, np.int64),
            launches,
            STREAM,
            np.zeros(SIZES[-1] * max(m.in_features * m.ring_bytes for m in held), np.uint8),
            np.zeros(SIZES[-1] * max(m.out_features * m.ring_bytes for m in held), np.uint8),
            new_mutex(),
        )

    def _on_launch(self, handle: int, stream: int) -> int:
        assert stream == STREAM
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        rows, index = divmod(handle, 1000)
        self.launched.append(index)
        time.sleep(0.001)  # lets another connection in, if it can get in
        if self.broken:
            return OUT_OF_ORDER
        linear_map = self._maps[index]
        payload = self.line.inputs[: rows * linear_map.in_features * linear_map.ring_bytes]
        result = self._stage.linear(index, rows, torch.from_numpy(payload.copy())).numpy()
        self.line.outputs[: result.size] = result
        return 0

    def _on_wait(self, stream: int) -> int:
        assert stream == STREAM
        self.at_once -= 1
        return 0
