"""The client's executor for one position at a time: the decode step.

It speaks the same protocol as :class:`otpipe.client.masked_executor.MaskedExecutor` and sends the
same bytes. A decode step goes through hundreds of maps, one after the other, so what counts here is
how little happens between an answer and the next request: values are NumPy rows, each operation is
one compiled pass, frames are laid out in place, and pads and corrections are read while the server
computes.

Shapes: n in_features, m out_features; every value has one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from otpipe.client.link import ServerLink
from otpipe.client.store import PadStore
from otpipe.client.store_lease import SlotLease
from otpipe.errors import OtpipeError, ProtocolError
from otpipe.kernels.activations import mask_rows, open_rows, rms_norm_rows
from otpipe.kernels.cpu import parallel_for
from otpipe.kernels.row_ops import attend_row, swiglu_row
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import NO_BIAS, NOT_FINITE, PEAK_LIMIT, output_headroom
from otpipe.protocol.messages import Linear, MessageType, Result, message_head
from otpipe.protocol.wire import Header

_ATTENTION_GRAIN = 1 << 21
"""Products of one attention worth a thread: waking it takes as long."""

_HEAD_ROOM = 64
"""Bytes before a payload, so that the head fits and the payload is aligned."""


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """What one map's exchange needs, looked up once."""

    linear_map: LinearMap
    request_head: bytes
    answer_head: bytes
    max_row_l2: float
    headroom: float
    scale_m: np.ndarray
    bias_m: np.ndarray


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
        self._maps = [self._prepared(bundle, linear_map) for linear_map in self.spec.maps]
        self._request = _buffer(max(m.in_features * m.ring_bytes for m in self.spec.maps))
        self._answer = _buffer(max(m.out_features * m.ring_bytes for m in self.spec.maps))
        self._lease: SlotLease | None = None
        self._next_mask: tuple[int, np.ndarray] | None = None
        self._correction = np.empty(0, np.uint32)

    @staticmethod
    def _prepared(bundle: ModelBundle, linear_map: LinearMap) -> _Map:
        public = bundle.maps[linear_map.index]
        index, ring_bytes = linear_map.index, linear_map.ring_bytes
        return _Map(
            linear_map,
            message_head(Linear(index, 1), linear_map.in_features * ring_bytes),
            message_head(Result(index, 1), linear_map.out_features * ring_bytes),
            public.max_row_l2,
            0.0 if linear_map.ring_bits == 8 else output_headroom(public.max_row_l1),
            public.scale.numpy(),
            NO_BIAS if public.bias is None else public.bias.numpy(),
        )

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.spec)

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Draw a slot and look one token up by its masked one-hot row mod 2^8."""
        if len(token_ids) != 1:
            raise ValueError(f"{len(token_ids)} tokens for an executor of single rows")
        token = token_ids[0]
        linear_map = self.spec.map("embed")
        if self._lease is not None:
            self._lease.close()
        self._next_mask = None
        self._lease = self._store.draw(1)
        self.slots_used += 1
        masked_n = self._request[_HEAD_ROOM:][: linear_map.in_features]
        np.negative(self._mask(linear_map.index)[0], out=masked_n)  # 0 - r mod 2^8
        masked_n[token : token + 1] += 1  # 1 - r at the token; as an array, so that it wraps
        answer_m = self._exchange(linear_map.index)
        row_m = np.add(answer_m, self._correction[0]).view(np.int8)
        return np.multiply(row_m, self._embedding_scale[token], dtype=np.float32)[None]

    def linear(self, linear_map: LinearMap, x: np.ndarray) -> np.ndarray:
        """W x + bias."""
        prepared = self._maps[linear_map.index]
        masked = self._request[_HEAD_ROOM:][: 4 * linear_map.in_features].view(np.uint32)
        _, unit = mask_rows(
            x,
            self._mask(linear_map.index),
            prepared.max_row_l2,
            prepared.headroom,
            PEAK_LIMIT,
            masked[None],
        )
        if not math.isfinite(unit[0]):
            raise OtpipeError(NOT_FINITE)
        answer_m = self._exchange(linear_map.index).view(np.uint32)
        out = np.empty((1, linear_map.out_features), np.float32)
        open_rows(answer_m[None], self._correction, unit, prepared.scale_m, prepared.bias_m, out)
        return out

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

    # -- inside ----------------------------------------------------------------------------------

    def _mask(self, index: int) -> np.ndarray:
        """The pad r (1, n), taken ahead of time where it was."""
        lease, taken, self._next_mask = self._lease, self._next_mask, None
        assert lease is not None, "embed() begins a pass"
        if taken is not None and taken[0] == index:
            lease.require_owner()
            return taken[1]
        return lease.masks(index)

    def _exchange(self, index: int) -> np.ndarray:
        """Send the masked row that is in place; returns the answer, uint8 (bytes,).

        It is valid until the next exchange, as is the correction (1, m) read meanwhile.
        """
        lease, prepared = self._lease, self._maps[index]
        assert lease is not None, "embed() begins a pass"
        linear_map = prepared.linear_map
        head, answer_head = prepared.request_head, prepared.answer_head
        request = _frame(self._request, len(head), linear_map.in_features * linear_map.ring_bytes)
        request[: len(head)] = head
        answer_bytes = linear_map.out_features * linear_map.ring_bytes
        answer = _frame(self._answer, len(answer_head), answer_bytes)

        def meanwhile() -> None:
            self._correction = lease.corrections(index)
            if index + 1 < len(self._maps):
                self._next_mask = (index + 1, lease.masks(index + 1))

        def due(header: Header) -> int:
            result = Result.parse(header)
            if (result.map_index, result.rows) != (index, 1):
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due was "
                    f"map {index}, one row"
                )
            return answer_bytes

        self._link.exchange(request, answer_head, answer, MessageType.RESULT, due, meanwhile)
        return self._answer[_HEAD_ROOM : _HEAD_ROOM + answer_bytes]


def _buffer(payload_bytes: int) -> np.ndarray:
    return np.empty(_HEAD_ROOM + payload_bytes, np.uint8)


def _frame(buffer: np.ndarray, head_bytes: int, payload_bytes: int) -> memoryview:
    """The part of ``buffer`` that is one frame."""
    whole = memoryview(buffer)  # type: ignore[arg-type]
    return whole[_HEAD_ROOM - head_bytes : _HEAD_ROOM + payload_bytes]
