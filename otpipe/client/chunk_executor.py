"""The executor of one chunk of a prompt: many rows, one connection, one thread.

It computes what :class:`otpipe.client.masked_executor.MaskedExecutor` computes. What differs is
how: every array lives in memory that the next layer uses again, and the keys and values of the rows
before belong to other chunks, which are computed at the same time (``otpipe.client.row_streams``).

Shapes: T rows of the chunk, n in_features, m out_features, V vocabulary, P positions, K key/value
heads, G query heads a key/value head, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otpipe.client.chunk_memory import Workspace
from otpipe.client.link import ServerLink
from otpipe.client.row_exchange import Memory, RowExchange, RowFrames
from otpipe.client.store_lease import SlotLease
from otpipe.client.store_rows import RowReader
from otpipe.kernels.activations import rms_norm_rows
from otpipe.kernels.rotary import rotate_rows
from otpipe.kernels.row_ops import add_rows, attend_rows, swiglu_rows
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.program import LogitsFor
from otpipe.model.spec import LinearMap
from otpipe.protocol.messages import max_linear_rows

_FEW_POSITIONS = 128
"""Up to which one compiled pass is faster than the framework's matrix products."""


def most_rows(linear_map: LinearMap) -> int:
    """Rows that one request through this map may carry."""
    return max_linear_rows(linear_map.in_features, linear_map.out_features, linear_map.ring_bytes)


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
        self._exchange = RowExchange(link)
        self._memory = Workspace()
        self._requests, self._answers = Memory(0), Memory(0)
        self._frames: dict[tuple[int, int], RowFrames] = {}
        self._chunk: Chunk
        self._visible: Tensor | None = None
        self._reader: RowReader
        self._pads = np.empty((0, 0), np.uint32)  # of the map that comes next

    def begin(self, chunk: Chunk) -> None:
        """Take up a chunk."""
        self._chunk = chunk
        self._reader = chunk.lease.row_reader(chunk.rows, len(self.spec.maps) - 1)
        self._visible = None

    def new_cache(self) -> Chunk:
        """The chunk taken up last: keys and values of the whole sequence, seen from its rows."""
        return self._chunk

    # -- linear maps -----------------------------------------------------------------------------

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """See :class:`otpipe.model.program.Executor`: masked one-hot rows mod 2^8."""
        linear_map = self.spec.map("embed")
        frames = self._frames_for(linear_map, len(token_ids))
        tokens_T = np.asarray(token_ids)
        masked_Tn = frames.masked
        np.negative(self._reader.first_pads(), out=masked_Tn)  # 0 - r mod 2^8
        masked_Tn[np.arange(len(masked_Tn)), tokens_T] += 1  # 1 - r at the token
        corrections: list[np.ndarray] = []
        self._chunk.turn.check()
        self._exchange.send(frames, lambda: corrections.append(self._read_ahead(linear_map)))
        rows_TH = np.add(frames.answers, corrections[0])
        scale_T = self._bundle.maps[linear_map.index].scale.numpy()[tokens_T]
        x_TH = self._memory.take("residual", rows_TH.shape, np.float32)
        np.multiply(rows_TH.view(np.int8), scale_T[:, None], out=x_TH)
        return torch.from_numpy(x_TH)

    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """W x + bias for all rows of the chunk, or lm_head for its last ones."""
        if linear_map.kind == "lm_head":
            return self._logits(linear_map, x)
        shape = (len(x), linear_map.out_features)
        out_Tm = self._memory.take(linear_map.kind, shape, np.float32)
        self._chunk.turn.check()
        self._exchange.linear(
            self._frames_for(linear_map, len(x)),
            x.numpy(),
            self._pads,
            lambda: self._read_ahead(linear_map),
            out_Tm,
        )
        return torch.from_numpy(out_Tm)

    def _logits(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """In as many requests as the limit of their size asks for."""
        lease, num_rows = self._chunk.lease, len(x)
        first_slot = self._chunk.rows.stop - num_rows
        out_Tm = torch.empty((num_rows, linear_map.out_features))
        step = most_rows(linear_map)
        for first in range(0, num_rows, step):
            last = min(num_rows, first + step)
            slots = slice(first_slot + first, first_slot + last)
            self._chunk.turn.check()
            self._exchange.linear(
                self._frames_for(linear_map, last - first),
                x[first:last].numpy(),
                lease.masks(linear_map.index, slots),
                partial(lease.corrections, linear_map.index, slots),
                out_Tm[first:last].numpy(),
            )
        return out_Tm

    def _frames_for(self, linear_map: LinearMap, num_rows: int) -> RowFrames:
        key = (linear_map.index, num_rows)
        frames = self._frames.get(key)
        if frames is None:
            frames = self._frames[key] = RowFrames.of(
                self._bundle.maps[linear_map.index],
                linear_map,
                num_rows,
                self._requests,
                self._answers,
            )
        return frames

    def _read_ahead(self, linear_map: LinearMap) -> np.ndarray:
        """While the server works: returns the corrections of this map, and has the next pads."""
        corrections, self._pads = self._reader.advance(linear_map.index)
        return corrections

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
        out_TF = self._memory.take("context", (T, K * G * D), np.float32)
        if end <= _FEW_POSITIONS:
            attend_rows(q_KTGD, keys_KPD, values_KPD, start, out_TF)
            return torch.from_numpy(out_TF)
        context = functional.scaled_dot_product_attention(
            torch.from_numpy(q_KTGD).view(1, K, T * G, D),
            torch.from_numpy(keys_KPD[None, :, :end]),
            torch.from_numpy(values_KPD[None, :, :end]),
            attn_mask=self._causal_mask(cache),
        )
        out = torch.from_numpy(out_TF)
        out.view(T, K, G, D).copy_(context.view(K, T, G, D).transpose(0, 1))
        return out

    def _causal_mask(self, chunk: Chunk) -> Tensor:
        """float32 (T G, P): 0 where a row sees a position, minus infinity where it does not."""
        if self._visible is None:
            T, G = chunk.num_rows, self.spec.num_heads // self.spec.num_kv_heads
            hidden_TP = torch.full((T, chunk.length + T), -math.inf).triu_(chunk.length + 1)
            self._visible = hidden_TP.repeat_interleave(G, dim=0)
        return self._visible

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        shape = (len(gate_up), gate_up.shape[1] // 2)
        out = self._memory.take("activated", shape, np.float32)
        swiglu_rows(gate_up.numpy(), out)
        return torch.from_numpy(out)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`; in place."""
        add_rows(a.numpy(), b.numpy())
        return a

    def last_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        return x[-num_rows:]
