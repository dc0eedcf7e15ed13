"""The client's executor in public mode: non-linear parts here, linear maps masked on the server.

For every linear map and token the client sends x - r under a fresh one-time pad r and adds the
prepared c = W·r to what comes back (docs/protocol.md, "Masked linear maps"). The server receives
uniform ring elements, whatever x is.

Shapes: T rows, n in_features, m out_features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from otpipe.client.link import ServerLink
from otpipe.client.store import PadStore
from otpipe.client.store_lease import SlotLease
from otpipe.errors import ProtocolError
from otpipe.kernels.activations import rms_norm_rows
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import ClearExecutor, KVCache
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import mask_activations, open_outputs
from otpipe.protocol.messages import Linear, MessageType, Result, max_linear_rows
from otpipe.protocol.wire import Header

_SINGLE_THREAD_WORK = 1 << 22
"""Products of one attention below which one thread does it."""


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
        self._ahead: tuple[int, slice, np.ndarray] | None = None
        self.slots_used = 0

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Draw one slot a token, and look the tokens up by masked one-hot rows mod 2^8.

        The output of a one-hot row is the int8 row itself, so eight bits lose nothing.
        """
        linear_map = self.spec.map("embed")
        rows = len(token_ids)
        if self._lease is not None:
            self._lease.close()
        self._ahead = None
        self._lease = self._store.draw(rows)
        self.slots_used += rows
        tokens_T = np.asarray(token_ids)
        row_TH = np.empty((rows, linear_map.out_features), np.uint8)
        for part in self._parts(linear_map, rows):
            masked_Tn = np.negative(self._masks(linear_map, part))  # 0 - r mod 2^8
            masked_Tn[np.arange(len(masked_Tn)), tokens_T[part]] += 1  # 1 - r at the token
            answer, correction_TH = self._request(linear_map, part, masked_Tn)
            np.add(answer.reshape(correction_TH.shape), correction_TH, out=row_TH[part])
        scale_T = self._bundle.maps[linear_map.index].scale[torch.from_numpy(tokens_T)]
        return torch.from_numpy(row_TH.view(np.int8)).to(torch.float32).mul_(scale_T[:, None])

    def rms_norm(self, x: Tensor, norm_name: str) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        gain = self._norms[norm_name].numpy()
        return torch.from_numpy(rms_norm_rows(x.numpy(), gain, self.spec.rms_norm_eps))

    def attention(self, layer: int, qkv: Tensor, cache: KVCache) -> Tensor:
        """See :class:`otpipe.model.program.Executor`.

        Waking a second thread costs more than a short product, and takes a core from the server
        where both share a machine.
        """
        work = len(qkv) * (cache.length + len(qkv)) * self.spec.q_size
        threads = torch.get_num_threads()
        if threads == 1 or work > _SINGLE_THREAD_WORK:
            return super().attention(layer, qkv, cache)
        torch.set_num_threads(1)
        try:
            return super().attention(layer, qkv, cache)
        finally:
            torch.set_num_threads(threads)

    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """W x + bias for the rows of the current pass, or for its last ones."""
        public = self._bundle.maps[linear_map.index]
        rows = len(x)
        assert self._lease is not None, "embed() begins a pass"
        skipped = len(self._lease) - rows
        out_Tm = torch.empty((rows, linear_map.out_features))
        for part in self._parts(linear_map, rows):
            slots = slice(part.start + skipped, part.stop + skipped)
            masked_Tn, unit_T = mask_activations(
                x[part], self._masks(linear_map, slots), public.max_row_l2, public.max_row_l1
            )
            answer, correction_Tm = self._request(linear_map, slots, masked_Tn)
            open_outputs(
                answer.view(np.uint32).reshape(correction_Tm.shape),
                correction_Tm,
                unit_T,
                public.scale,
                public.bias,
                out_Tm[part],
            )
        return out_Tm

    @staticmethod
    def _parts(linear_map: LinearMap, rows: int) -> Iterator[slice]:
        """Rows in pieces that one request may carry."""
        step = max_linear_rows(
            linear_map.in_features, linear_map.out_features, linear_map.ring_bytes
        )
        return (slice(first, min(rows, first + step)) for first in range(0, rows, step))

    def _masks(self, linear_map: LinearMap, slots: slice) -> np.ndarray:
        """The pads r (T, n), taken ahead of time where they were."""
        assert self._lease is not None, "embed() begins a pass"
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (linear_map.index, slots):
            self._lease.require_owner()
            return ahead[2]
        return self._lease.masks(linear_map.index, slots)

    def _request(
        self, linear_map: LinearMap, slots: slice, masked_Tn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Send masked rows; return the answer, uint8 (bytes,), and the corrections (T, m).

        While the server computes, the corrections are read and the pads of the map that follows
        are expanded.
        """
        lease = self._lease
        assert lease is not None, "embed() begins a pass"
        rows = slots.stop - slots.start
        corrections: list[np.ndarray] = []

        def meanwhile() -> None:
            corrections.append(lease.corrections(linear_map.index, slots))
            following = linear_map.index + 1
            # A single row goes through all maps in order; longer passes may skip rows at the end.
            if len(lease) == 1 and following < len(self.spec.maps):
                self._ahead = (following, slots, lease.masks(following, slots))

        def due(header: Header) -> int:
            result = Result.parse(header)
            if (result.map_index, result.rows) != (linear_map.index, rows):
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due were "
                    f"map {linear_map.index}, {rows} rows"
                )
            return rows * linear_map.out_features * linear_map.ring_bytes

        answer = self._link.request(
            Linear(linear_map.index, rows),
            masked_Tn.reshape(-1),
            MessageType.RESULT,
            due,
            meanwhile,
        )
        return answer, corrections[0]
