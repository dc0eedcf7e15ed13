"""The executor of one chunk of a prompt: many rows, one connection, one thread.

It computes what :class:`otpipe.client.masked_executor.MaskedExecutor` computes. What differs is
how: every array lives in memory that the next layer uses again, and the keys and values of the rows
before belong to other chunks, which are computed at the same time (``otpipe.client.row_streams``).
The layers run in compiled code (``otpipe.client.chunk_steps``) where the connection is a plain one
and slots can be read there; else step by step, by the methods that the program calls.

Shapes: T rows of the chunk, n in_features, m out_features, V vocabulary, P positions, K key/value
heads, G query heads a key/value head, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otpipe.client.chunk_memory import Workspace
from otpipe.client.chunk_order import ChunkOrder
from otpipe.client.chunk_steps import (
    ATTEND,
    KINDS,
    SENDING,
    VALUES,
    WAITING,
    ChunkTables,
    Stop,
    run_steps,
)
from otpipe.client.chunk_tables import StepTables
from otpipe.client.link import ServerLink
from otpipe.client.row_exchange import ANSWER_MS, STALL_MS, Memory, RowExchange, RowFrames
from otpipe.client.store_lease import SlotLease
from otpipe.client.store_rows import RowReader, SpanReader
from otpipe.errors import ProtocolError
from otpipe.kernels.activations import rms_norm_rows
from otpipe.kernels.native_io import system_functions
from otpipe.kernels.rotary import rotate_rows
from otpipe.kernels.row_ops import add_rows, attend_rows, swiglu_rows
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.program import LogitsFor, decoder_layers, logits_of
from otpipe.model.spec import LinearMap
from otpipe.protocol.messages import max_linear_rows
from otpipe.protocol.wire import FrameConnection

_FEW_POSITIONS = 128
"""Up to which one compiled pass is faster than the framework's matrix products."""


def most_rows(linear_map: LinearMap) -> int:
    """Rows that one request through this map may carry."""
    return max_linear_rows(linear_map.in_features, linear_map.out_features, linear_map.ring_bytes)


class Turn(Protocol):
    """How a chunk waits for the rows before it.

    Attributes:
        order, number: the same for compiled code.
    """

    @property
    def order(self) -> ChunkOrder: ...

    @property
    def number(self) -> int: ...

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
        caches: of ``cache``, as of ``StepTables``.
    """

    lease: SlotLease
    rows: slice
    cache: KVCache
    logits_for: LogitsFor
    turn: Turn
    caches: np.ndarray

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

    def __init__(
        self, bundle: ModelBundle, rope: RopeTables, tables: StepTables, link: ServerLink
    ) -> None:
        """``rope``: tables that reach as far as every chunk; shared, so never extended here."""
        self.spec = bundle.spec
        self._tables = tables
        self._link = link
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

    def _begin(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._reader = chunk.lease.row_reader(chunk.rows, len(self.spec.maps) - 1)
        self._visible = None

    def run(self, chunk: Chunk, token_ids: Sequence[int]) -> Tensor | None:
        """One pass of the program over a chunk; its logits."""
        self._begin(chunk)
        x = self.embed(token_ids)
        if self._link.plain_connection() is None or not self._run_compiled():
            x = decoder_layers(self, x, chunk)
        return logits_of(self, x, chunk.logits_for)

    def _run_compiled(self) -> bool:
        """All layers, from ``residual`` to ``residual``; False if nothing was done.

        What compiled code stops at is done here, and it goes on behind that.
        """
        reader, turn, model = self._reader, self._chunk.turn, self._tables.model
        if not isinstance(reader, SpanReader) or reader.tables() is None:
            return False
        chunk, step = self._chunk_tables(), 0
        while step < len(model.steps):
            connection, slots = self._link.plain_connection(), reader.tables()
            if connection is None or slots is None:
                raise ProtocolError("the server sent more than the answer that was due")
            stop = Stop(
                *run_steps(
                    system_functions(),
                    connection.descriptor,
                    model,
                    chunk,
                    slots,
                    turn.order,
                    step,
                    ANSWER_MS,
                    STALL_MS,
                )
            )
            self._count(chunk.counts, connection)
            if stop.step < len(model.steps):
                self._do_step(stop, chunk, connection)
            step = stop.step + 1
        reader.skip_to(len(self.spec.maps) - 1)
        return True

    def _chunk_tables(self) -> ChunkTables:
        """The chunk taken up, with this executor's memory."""
        spec, chunk = self.spec, self._chunk
        T, maps = chunk.num_rows, self.spec.maps[1:-1]
        widths = {"residual": spec.hidden_size, "normed": spec.hidden_size}
        widths |= {"queries": spec.q_size, "context": spec.q_size}
        widths |= {"activated": spec.map("down", 0).in_features}
        widths |= {m.kind: m.out_features for m in maps}
        values = [self._memory.take(name, (T, widths[name]), np.float32) for name in VALUES]
        heads, head_bytes = self._tables.heads(T)
        cos, sin = self._rope.rows(chunk.length, chunk.length + T)
        return ChunkTables(
            chunk.turn.number,
            chunk.length,
            np.array([(value.ctypes.data, value.shape[1]) for value in values], np.int64),
            cos[:, 0].numpy(),
            sin[:, 0].numpy(),
            chunk.caches,
            heads,
            head_bytes,
            self._requests.take(T * max(m.in_features * m.ring_bytes for m in maps)),
            self._answers.take(T * max(m.out_features * m.ring_bytes for m in maps)),
            np.empty(T, np.float64),
            _FEW_POSITIONS,
            np.zeros(3, np.int64),
            np.zeros(KINDS, np.int64),
        )

    def _do_step(self, stop: Stop, chunk: ChunkTables, connection: FrameConnection) -> None:
        """The step that compiled code has stopped at, or the rest of it."""
        _, which, *_ = self._tables.model.steps[stop.step].tolist()
        if stop.part == WAITING:
            self._chunk.turn.check()
        elif stop.part == ATTEND:
            self._attend(which, self._chunk)
        else:
            linear_map = self.spec.maps[which]
            cast(SpanReader, self._reader).skip_to(which)
            shape = (chunk.units.size, linear_map.out_features)
            self._exchange.go_on(
                connection,
                self._frames_for(linear_map, chunk.units.size),
                chunk.units,
                stop.part != SENDING,
                stop.status,
                stop.filled,
                lambda: self._read_ahead(linear_map),
                self._memory.take(linear_map.kind, shape, np.float32),
            )

    def _count(self, counts: np.ndarray, connection: FrameConnection) -> None:
        """Add what compiled code has counted, and count from zero."""
        frames, bytes_sent, bytes_received = counts.tolist()
        counts[:] = 0
        traffic = connection.traffic
        traffic.frames_sent += frames
        traffic.frames_received += frames
        traffic.bytes_sent += bytes_sent
        traffic.bytes_received += bytes_received
        self._link.round_trips += frames

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
        """See :class:`otpipe.model.program.Executor`."""
        T = len(qkv)
        start, end = cache.length, cache.length + T
        cos, sin = self._rope.rows(start, end)
        q_KTGD = self._queries(T)
        keys_KPD, values_KPD = cache.cache.storage(layer, end)
        rotate_rows(
            qkv.numpy(), cos[:, 0].numpy(), sin[:, 0].numpy(), q_KTGD, keys_KPD, values_KPD, start
        )
        cache.turn.keys_written(layer)
        return self._attend(layer, cache)

    def _queries(self, T: int) -> np.ndarray:
        """The rotated queries (K, T, G, D) of the layer under way."""
        K, D = self.spec.num_kv_heads, self.spec.head_dim
        return self._memory.take("queries", (K, T, self.spec.num_heads // K, D), np.float32)

    def _attend(self, layer: int, chunk: Chunk) -> Tensor:
        """Attention of the rotated queries. The heads that share keys are rows of one query."""
        T, end = chunk.num_rows, chunk.length + chunk.num_rows
        q_KTGD = self._queries(T)
        K, _, G, D = q_KTGD.shape
        keys_KPD, values_KPD = chunk.cache.storage(layer, end)
        out_TF = self._memory.take("context", (T, K * G * D), np.float32)
        if end <= _FEW_POSITIONS:
            attend_rows(q_KTGD, keys_KPD, values_KPD, chunk.length, out_TF)
            return torch.from_numpy(out_TF)
        context = functional.scaled_dot_product_attention(
            torch.from_numpy(q_KTGD).view(1, K, T * G, D),
            torch.from_numpy(keys_KPD[None, :, :end]),
            torch.from_numpy(values_KPD[None, :, :end]),
            attn_mask=self._causal_mask(chunk),
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
