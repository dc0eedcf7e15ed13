"""The client's executor for one position at a time: the decode step.

It speaks the same protocol as :class:`otpipe.client.masked_executor.MaskedExecutor` and sends the
same bytes. A decode step goes through hundreds of maps, one after the other, so what counts here is
how little happens between an answer and the next request: values are NumPy rows, each operation is
one compiled pass, frames are laid out in place, and pads and corrections are read while the server
computes.

Shapes: n in_features, m out_features; every value has one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from otpipe.client.link import ServerLink
from otpipe.client.row_exchange import Memory, RowExchange, RowFrames
from otpipe.client.store import PadStore
from otpipe.client.store_lease import SlotLease
from otpipe.client.store_rows import RowReader
from otpipe.kernels.activations import rms_norm_rows
from otpipe.kernels.cpu import parallel_for
from otpipe.kernels.row_ops import attend_row, swiglu_row
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.spec import LinearMap

_ATTENTION_GRAIN = 1 << 21
"""Products of one attention worth a thread: waking it takes as long."""


class RowExecutor:
    """Runs the decoder for one position, with pads from ``store`` and the server behind ``link``.

    Implements :class:`otpipe.model.program.Executor`; values are float32 (1, features). The cache
    is the one of the other executors, so that a prompt's pass and the decode steps share it.

    Attributes:
        slots_used: slots drawn so far; one a token position.
    """

    def __init__(self, bundle: ModelBundle, store: PadStore, link: ServerLink) -> None:
        self.spec = bundle.spec
        self.slots_used = 0
        self._store = store
        self._link = link
        self._embedding_scale = bundle.maps[self.spec.map("embed").index].scale.numpy()
        self._norms = {name: bundle.norms[name].numpy() for name in self.spec.norm_names}
        self._rope = RopeTables(self.spec.rope, self.spec.head_dim)
        request = Memory(max(m.in_features * m.ring_bytes for m in self.spec.maps))
        answer = Memory(max(m.out_features * m.ring_bytes for m in self.spec.maps))
        self._frames = [
            RowFrames.of(bundle.maps[m.index], m, 1, request, answer) for m in self.spec.maps
        ]
        self._exchange = RowExchange(link)
        self._lease: SlotLease | None = None
        self._reader: RowReader
        self._pad = np.empty((0, 0), np.uint32)  # of the map that comes next

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.spec)

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Draw a slot and look one token up by its masked one-hot row mod 2^8."""
        if len(token_ids) != 1:
            raise ValueError(f"{len(token_ids)} tokens for an executor of single rows")
        token = token_ids[0]
        frames = self._frames[self.spec.map("embed").index]
        if self._lease is not None:
            self._lease.close()
        self._lease = self._store.draw(1)
        self.slots_used += 1
        self._reader = self._lease.row_reader()
        masked = frames.masked
        np.negative(self._reader.first_pads(), out=masked)  # 0 - r mod 2^8
        masked[:, token] += np.uint8(1)  # 1 - r at the token
        answers: list[np.ndarray] = []
        self._exchange.send(frames, lambda: answers.append(self._read_ahead(frames.linear_map)))
        row = np.add(frames.answers, answers[0]).view(np.int8)
        return np.multiply(row, self._embedding_scale[token], dtype=np.float32)

    def linear(self, linear_map: LinearMap, x: np.ndarray) -> np.ndarray:
        """W x + bias."""
        out = np.empty((1, linear_map.out_features), np.float32)
        frames = self._frames[linear_map.index]
        self._exchange.linear(frames, x, self._pad, lambda: self._read_ahead(linear_map), out)
        return out

    def _read_ahead(self, linear_map: LinearMap) -> np.ndarray:
        """While the server works: returns the correction of this map, and has the next pad."""
        correction, self._pad = self._reader.advance(linear_map.index)
        return correction

    def rms_norm(self, x: np.ndarray, norm_name: str) -> np.ndarray:
        """See :class:`otpipe.model.program.Executor`."""
        return rms_norm_rows(x, self._norms[norm_name], self.spec.rms_norm_eps)

    def attention(self, layer: int, qkv: np.ndarray, cache: KVCache) -> np.ndarray:
        """See :class:`otpipe.model.program.Executor`."""
        spec, position = self.spec, cache.length
        cos_D, sin_D = self._rope.row(position)
        keys_KPD, values_KPD = cache.storage(layer, position + 1)
        out = np.empty((1, spec.q_size), np.float32)
        work_per_head = (position + 1) * spec.q_size // spec.num_kv_heads
        parallel_for(
            lambda lo, hi: attend_row(
                qkv[0], cos_D, sin_D, keys_KPD, values_KPD, position, out[0], lo, hi
            ),
            spec.num_kv_heads,
            grain=1 + _ATTENTION_GRAIN // work_per_head,
        )
        return out

    def swiglu(self, gate_up: np.ndarray) -> np.ndarray:
        """See :class:`otpipe.model.program.Executor`."""
        out = np.empty((1, gate_up.shape[1] // 2), np.float32)
        swiglu_row(gate_up[0], out[0])
        return out

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """See :class:`otpipe.model.program.Executor`."""
        return a + b

    def last_rows(self, x: np.ndarray, num_rows: int) -> np.ndarray:
        """See :class:`otpipe.model.program.Executor`."""
        return x[-num_rows:]
