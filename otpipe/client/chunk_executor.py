"""The executor of one chunk of a prompt: many rows, one connection, one thread.

It computes what :class:`otpipe.client.masked_executor.MaskedExecutor` computes. What differs is
how: every array lives in memory that the next layer uses again, and the keys and values of the rows
before belong to other chunks, which are computed at the same time (``otpipe.client.row_streams``).

Shapes: T rows of the chunk, n in_features, m out_features, V vocabulary, P positions, K key/value
heads, G query heads a key/value head, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otpipe.client.chunk_memory import ExchangeBuffers, Workspace
from otpipe.client.link import ServerLink
from otpipe.client.store_lease import SlotLease
from otpipe.errors import OtpipeError
from otpipe.kernels.activations import mask_rows, rms_norm_rows
from otpipe.kernels.rotary import rotate_rows
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.program import LogitsFor
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import NOT_FINITE, PEAK_LIMIT, open_outputs, output_headroom
from otpipe.protocol.messages import max_linear_rows


class Turn(Protocol):
    """How a chunk waits for the rows before it."""

    def keys_written(self, layer: int) -> None:
        """Declare this chunk's keys and values of a layer written; return when those of all rows
        before are too. Raises when the pass has failed elsewhere."""

    def check(self) -> None:
        """Raise when the pass has failed elsewhere."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one pass.

    Attributes:
        lease: slots of the whole pass; row i of the pass is row i of it.
        rows: this chunk's part of the pass.
        cache: of the whole sequence, with room for the whole pass in every layer.
        logits_for: of which of this chunk's rows.
        turn: order among the chunks.
    """

    lease: SlotLease
    rows: slice
    cache: KVCache
    logits_for: LogitsFor
    turn: Turn

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def length(self) -> int:
        """Positions before this chunk: it is the ``cache`` that the program sees."""
        return self.cache.length + int(self.rows.start)

    def advance(self, num_rows: int) -> None:
        """The pass declares its positions complete when all its chunks are."""


class ChunkExecutor:
    """Runs the decoder over one chunk after the other; see :class:`otpipe.model.program.Executor`.

    A value is valid until the operation that made it is called again, with the same kind of map for
    ``linear``. The program holds none longer. Logits are the caller's.
    """

    def __init__(self, bundle: ModelBundle, rope: RopeTables, link: ServerLink) -> None:
        """``rope``: tables that reach as far as every chunk; shared, so never extended here."""
        self.spec = bundle.spec
        self._bundle = bundle
        self._gains = {name: gain.numpy() for name, gain in bundle.norms.items()}
        self._rope = rope
        self._link = link
        self._memory = Workspace()
        self._buffers: dict[tuple[str, int], ExchangeBuffers] = {}
        self._chunk: Chunk
        self._visible: Tensor
        self._ahead: tuple[int, slice] | None = None

    def begin(self, chunk: Chunk) -> None:
        """Take up a chunk."""
        self._chunk = chunk
        self._ahead = None
        self._visible = self._causal_mask(chunk)

    def new_cache(self) -> Chunk:
        """The chunk taken up last: keys and values of the whole sequence, seen from its rows."""
        return self._chunk

    # -- linear maps -----------------------------------------------------------------------------

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """See :class:`otpipe.model.program.Executor`: masked one-hot rows mod 2^8."""
        linear_map = self.spec.map("embed")
        tokens_T = np.asarray(token_ids)
        rows_TH = self._memory.take("embedded", (len(tokens_T), self.spec.hidden_size), np.uint8)
        for part, slots in self._parts(linear_map, len(tokens_T)):
            buffers = self._buffers_for(linear_map, slots)
            masked_Tn = buffers.masked_Tn
            self._chunk.lease.masks(linear_map.index, slots, masked_Tn)
            np.negative(masked_Tn, out=masked_Tn)  # 0 - r mod 2^8
            masked_Tn[np.arange(len(masked_Tn)), tokens_T[part]] += 1  # 1 - r at the token
            self._exchange(linear_map, slots, buffers)
            np.add(buffers.answer_Tm, buffers.correction_Tm, out=rows_TH[part])
        scale_T = self._bundle.maps[linear_map.index].scale.numpy()[tokens_T]
        x_TH = self._memory.take("residual", rows_TH.shape, np.float32)
        np.multiply(rows_TH.view(np.int8), scale_T[:, None], out=x_TH)
        return torch.from_numpy(x_TH)

    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """W x + bias for all rows of the chunk, or for its last ones."""
        public = self._bundle.maps[linear_map.index]
        shape = (len(x), linear_map.out_features)
        if linear_map.kind == "lm_head":
            out_Tm = torch.empty(shape)
        else:
            out_Tm = torch.from_numpy(self._memory.take(linear_map.kind, shape, np.float32))
        headroom = output_headroom(public.max_row_l1)
        for part, slots in self._parts(linear_map, len(x)):
            buffers = self._buffers_for(linear_map, slots)
            self._expand(linear_map, slots)
            self._ahead = None
            _, unit_T = mask_rows(
                x[part].numpy(),
                buffers.mask_Tn,
                public.max_row_l2,
                headroom,
                PEAK_LIMIT,
                buffers.masked_Tn,
            )
            if not np.isfinite(unit_T).all():
                raise OtpipeError(NOT_FINITE)
            self._exchange(linear_map, slots, buffers)
            open_outputs(
                buffers.answer_Tm,
                buffers.correction_Tm,
                unit_T,
                public.scale,
                public.bias,
                out_Tm[part],
            )
        return out_Tm

    def _parts(self, linear_map: LinearMap, num_rows: int) -> Iterator[tuple[slice, slice]]:
        """The last ``num_rows`` rows in pieces that one request may carry, and their slots."""
        step = max_linear_rows(
            linear_map.in_features, linear_map.out_features, linear_map.ring_bytes
        )
        first_slot = self._chunk.rows.stop - num_rows
        for first in range(0, num_rows, step):
            last = min(num_rows, first + step)
            yield slice(first, last), slice(first_slot + first, first_slot + last)

    def _buffers_for(self, linear_map: LinearMap, slots: slice) -> ExchangeBuffers:
        num_rows = slots.stop - slots.start
        key = (linear_map.kind, num_rows)
        buffers = self._buffers.get(key)
        if buffers is None:
            buffers = self._buffers[key] = ExchangeBuffers(self._memory, linear_map, num_rows)
        return buffers

    def _expand(self, linear_map: LinearMap, slots: slice) -> None:
        """Have the pads of these rows in place, unless they are there already."""
        if self._ahead == (linear_map.index, slots):
            self._chunk.lease.require_owner()
            return
        mask_Tn = self._buffers_for(linear_map, slots).mask_Tn
        self._chunk.lease.masks(linear_map.index, slots, mask_Tn)
        self._ahead = (linear_map.index, slots)

    def _exchange(self, linear_map: LinearMap, slots: slice, buffers: ExchangeBuffers) -> None:
        """Send the masked rows and receive the answer.

        While the server works, the corrections are read, and the pads of the request that follows
        are expanded where all rows of the chunk go on to it.
        """
        chunk = self._chunk
        chunk.turn.check()
        following = linear_map.index + 1

        def meanwhile() -> None:
            chunk.lease.corrections(linear_map.index, slots, buffers.correction_Tm)
            if slots == chunk.rows and following < len(self.spec.maps) - 1:
                self._expand(self.spec.maps[following], slots)

        buffers.exchange(linear_map.index, self._link, meanwhile)

    # -- the rest, in float32 --------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm_name: str) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        gain = self._gains[norm_name]
        return torch.from_numpy(rms_norm_rows(x.numpy(), gain, self.spec.rms_norm_eps))

    def attention(self, layer: int, qkv: Tensor, cache: Chunk) -> Tensor:
        """See :class:`otpipe.model.program.Executor`.

        The heads that share keys and values are rows of one query.
        """
        spec = self.spec
        K, D = spec.num_kv_heads, spec.head_dim
        T, G = len(qkv), spec.num_heads // K
        start, end = cache.length, cache.length + T
        cos, sin = self._rope.rows(start, end)
        q_KTGD = self._memory.take("queries", (K, T, G, D), np.float32)
        keys_KPD, values_KPD = cache.cache.storage(layer, end)
        rotate_rows(
            qkv.numpy(), cos[:, 0].numpy(), sin[:, 0].numpy(), q_KTGD, keys_KPD, values_KPD, start
        )
        cache.turn.keys_written(layer)
        context = functional.scaled_dot_product_attention(
            torch.from_numpy(q_KTGD).view(1, K, T * G, D),
            torch.from_numpy(keys_KPD[None, :, :end]),
            torch.from_numpy(values_KPD[None, :, :end]),
            attn_mask=self._visible,
        )
        out = torch.from_numpy(self._memory.take("context", (T, K * G * D), np.float32))
        out.view(T, K, G, D).copy_(context.view(K, T, G, D).transpose(0, 1))
        return out

    def _causal_mask(self, chunk: Chunk) -> Tensor:
        """float32 (T G, P): 0 where a row sees a position, minus infinity where it does not."""
        T, G = chunk.num_rows, self.spec.num_heads // self.spec.num_kv_heads
        seen = chunk.length + T
        hidden_TP = torch.full((T, seen), -math.inf).triu_(chunk.length + 1)
        return hidden_TP.repeat_interleave(G, dim=0)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        gate, up = gate_up.chunk(2, dim=1)
        out = torch.from_numpy(self._memory.take("activated", tuple(gate.shape), np.float32))
        torch.ops.aten.silu.out(gate, out=out)
        return out.mul_(up)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`; in place."""
        return a.add_(b)

    def last_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        return x[-num_rows:]
