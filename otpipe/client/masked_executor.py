"""The client's executor in public mode: non-linear parts here, linear maps masked on the server.

For every linear map and token the client sends x - r under a fresh one-time pad r and adds the
prepared c = W·r to what comes back (docs/protocol.md, "Masked linear maps"). The server receives
uniform ring elements, whatever x is.

Shapes: T rows, n in_features, m out_features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from otpipe.client.link import ServerLink
from otpipe.client.store import PadStore
from otpipe.client.store_lease import SlotLease
from otpipe.errors import ProtocolError
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import ClearExecutor
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import dequantize_outputs, quantize_activations
from otpipe.protocol.messages import Linear, MessageType, Result, max_linear_rows
from otpipe.protocol.wire import Header

_Masking = Callable[[int, int, np.ndarray], np.ndarray]
"""Rows first to last of the message, given their pads."""


class MaskedExecutor(ClearExecutor):
    """Runs the decoder with pads from ``store`` and linear maps from the server behind ``link``.

    Attributes:
        slots_used: slots drawn so far; one a token position.
    """

    def __init__(self, bundle: ModelBundle, store: PadStore, link: ServerLink) -> None:
        super().__init__(bundle.spec, bundle.norms)
        self._bundle = bundle
        self._store = store
        self._link = link
        self._lease: SlotLease | None = None
        self.slots_used = 0

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Draw one slot a token, and look the tokens up by masked one-hot rows mod 2^8.

        The output of a one-hot row is the int8 row itself, so eight bits lose nothing.
        """
        linear_map = self.spec.map("embed")
        rows = len(token_ids)
        if self._lease is not None:
            self._lease.close()
        self._lease = self._store.draw(rows)
        self.slots_used += rows
        tokens_T = np.asarray(token_ids)

        def masked(first: int, last: int, mask_Tn: np.ndarray) -> np.ndarray:
            out_Tn = np.negative(mask_Tn)  # 0 - r, then 1 - r at the token; mod 2^8
            out_Tn[np.arange(last - first), tokens_T[first:last]] += 1
            return out_Tn

        row_TH = self._masked_rows(linear_map, rows, slice(0, rows), masked).view(np.int8)
        scale_T = self._bundle.maps[linear_map.index].scale[torch.from_numpy(tokens_T)]
        return torch.from_numpy(row_TH).to(torch.float32).mul_(scale_T[:, None])

    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """W x + bias for the rows of the current pass, or for its last ones."""
        public = self._bundle.maps[linear_map.index]
        quantised_Tn, unit_T = quantize_activations(x, public.max_row_l2, public.max_row_l1)
        quantised_Tn = quantised_Tn.view(np.uint32)
        assert self._lease is not None, "embed() begins a pass"
        total = len(self._lease)

        def masked(first: int, last: int, mask_Tn: np.ndarray) -> np.ndarray:
            return quantised_Tn[first:last] - mask_Tn  # unsigned: wraps mod 2^32

        rows = len(x)
        y_Tm = self._masked_rows(linear_map, rows, slice(total - rows, total), masked)
        return dequantize_outputs(y_Tm.view(np.int32), unit_T, public.scale, public.bias)

    def _masked_rows(
        self, linear_map: LinearMap, rows: int, lease_rows: slice, masked: _Masking
    ) -> np.ndarray:
        """Send masked rows, in requests of allowed size; return the opened outputs (T, m)."""
        lease = self._lease
        assert lease is not None, "embed() begins a pass"
        step = max_linear_rows(
            linear_map.in_features, linear_map.out_features, linear_map.ring_bytes
        )
        dtype = np.dtype("u1") if linear_map.ring_bits == 8 else np.dtype("<u4")
        out_Tm = np.empty((rows, linear_map.out_features), dtype=dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            part = slice(lease_rows.start + first, lease_rows.start + last)
            payload = masked(first, last, lease.masks(linear_map.index, part))
            answer = self._request(linear_map, last - first, payload)
            np.add(
                answer.view(dtype).reshape(last - first, linear_map.out_features),
                lease.corrections(linear_map.index, part),
                out=out_Tm[first:last],
            )
        return out_Tm

    def _request(self, linear_map: LinearMap, rows: int, payload: np.ndarray) -> np.ndarray:
        def due(header: Header) -> int:
            result = Result.parse(header)
            if (result.map_index, result.rows) != (linear_map.index, rows):
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due were "
                    f"map {linear_map.index}, {rows} rows"
                )
            return rows * linear_map.out_features * linear_map.ring_bytes

        return self._link.request(
            Linear(linear_map.index, rows), payload.reshape(-1), MessageType.RESULT, due
        )
