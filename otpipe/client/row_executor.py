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

from otpipe.client.link import ANSWER_TIMEOUT_S, ServerLink
from otpipe.client.row_exchange import FOREIGN, receive_opened, send_masked
from otpipe.client.store import PadStore
from otpipe.client.store_lease import SlotLease
from otpipe.client.store_rows import RowReader
from otpipe.errors import OtpipeError, ProtocolError
from otpipe.kernels.activations import mask_rows, open_rows, rms_norm_rows
from otpipe.kernels.cpu import parallel_for
from otpipe.kernels.native_io import (
    DONE,
    INTERRUPTED,
    TIMED_OUT,
    looks_before_sleep,
    send_all,
    system_functions,
)
from otpipe.kernels.row_ops import attend_row, swiglu_row
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.spec import LinearMap
from otpipe.protocol.fixed_point import NO_BIAS, NOT_FINITE, PEAK_LIMIT, output_headroom
from otpipe.protocol.messages import Linear, MessageType, Result, message_head
from otpipe.protocol.wire import STALL_TIMEOUT_S, FrameConnection, Header

_ATTENTION_GRAIN = 1 << 21
"""Products of one attention worth a thread: waking it takes as long."""

_ANSWER_MS = int(1000 * ANSWER_TIMEOUT_S)
_STALL_MS = int(1000 * STALL_TIMEOUT_S)

_HEAD_ROOM = 64
"""Bytes before a payload, so that the head fits and the payload is aligned."""


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """What one map's exchange needs, looked up once."""

    linear_map: LinearMap
    request_head: np.ndarray
    request: np.ndarray  # uint8, the whole frame
    masked_n: np.ndarray  # its payload
    answer_head: np.ndarray
    answer: np.ndarray
    answer_m: np.ndarray
    max_row_l2: float
    headroom: float
    scale_m: np.ndarray
    bias_m: np.ndarray


def _prepared(
    bundle: ModelBundle, linear_map: LinearMap, request: np.ndarray, answer: np.ndarray
) -> _Map:
    """Frames of a map in memory that all maps share: one exchange at a time."""
    public = bundle.maps[linear_map.index]
    index, ring_bytes = linear_map.index, linear_map.ring_bytes
    in_bytes, out_bytes = linear_map.in_features * ring_bytes, linear_map.out_features * ring_bytes
    request_head = message_head(Linear(index, 1), in_bytes)
    answer_head = message_head(Result(index, 1), out_bytes)
    words = np.dtype(f"<u{ring_bytes}")
    return _Map(
        linear_map,
        np.frombuffer(request_head, np.uint8),
        request[_HEAD_ROOM - len(request_head) : _HEAD_ROOM + in_bytes],
        request[_HEAD_ROOM : _HEAD_ROOM + in_bytes].view(words),
        np.frombuffer(answer_head, np.uint8),
        answer[_HEAD_ROOM - len(answer_head) : _HEAD_ROOM + out_bytes],
        answer[_HEAD_ROOM : _HEAD_ROOM + out_bytes].view(words),
        public.max_row_l2,
        0.0 if ring_bytes == 1 else output_headroom(public.max_row_l1),
        public.scale.numpy(),
        NO_BIAS if public.bias is None else public.bias.numpy(),
    )


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
        request = _buffer(max(m.in_features * m.ring_bytes for m in self.spec.maps))
        answer = _buffer(max(m.out_features * m.ring_bytes for m in self.spec.maps))
        self._maps = [_prepared(bundle, m, request, answer) for m in self.spec.maps]
        self._lease: SlotLease | None = None
        self._reader: RowReader | None = None
        # What was read last: the correction of a map and the pad of the one after it.
        self._correction_m = self._pad_n = np.empty(0, np.uint32)
        self._correction_of = -1

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache(self.spec)

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Draw a slot and look one token up by its masked one-hot row mod 2^8."""
        if len(token_ids) != 1:
            raise ValueError(f"{len(token_ids)} tokens for an executor of single rows")
        token = token_ids[0]
        index = self.spec.map("embed").index
        prepared = self._maps[index]
        if self._lease is not None:
            self._lease.close()
        self._lease = lease = self._store.draw(1)
        self.slots_used += 1
        self._correction_of = -1
        self._reader = lease.row_reader()
        pad_n = (
            lease.masks(prepared.linear_map.index)[0]
            if self._reader is None
            else self._reader.first_pad()
        )
        masked_n = prepared.masked_n
        np.negative(pad_n, out=masked_n)  # 0 - r mod 2^8
        masked_n[token : token + 1] += 1  # 1 - r at the token; as an array, so that it wraps
        self._exchange(prepared)
        row_m = np.add(prepared.answer_m, self._correction_m).view(np.int8)
        return np.multiply(row_m, self._embedding_scale[token], dtype=np.float32)[None]

    def linear(self, linear_map: LinearMap, x: np.ndarray) -> np.ndarray:
        """W x + bias."""
        prepared = self._maps[linear_map.index]
        lease = self._lease
        assert lease is not None, "embed() begins a pass"
        assert self._correction_of == linear_map.index - 1, "maps come in their order"
        lease.require_owner()
        out = np.empty((1, linear_map.out_features), np.float32)
        connection = self._link.plain_connection()
        if connection is not None:
            unit, answered = self._exchange_directly(connection, prepared, x, out)
            if answered:
                return out
        else:
            unit = mask_rows(
                x,
                self._pad_n[None],
                prepared.max_row_l2,
                prepared.headroom,
                PEAK_LIMIT,
                prepared.masked_n[None],
            )[1][0]
            if not math.isfinite(unit):
                raise OtpipeError(NOT_FINITE)
        self._exchange(prepared, sent_on=connection)
        open_rows(
            prepared.answer_m[None],
            self._correction_m[None],
            np.array([unit]),
            prepared.scale_m,
            prepared.bias_m,
            out,
        )
        return out

    def _exchange_directly(
        self,
        connection: FrameConnection,
        prepared: _Map,
        x: np.ndarray,
        out: np.ndarray,
    ) -> tuple[float, bool]:
        """Mask, send, receive and open in compiled code; returns the unit, and whether it did.

        Where the peer did anything but answer, the request is in place for :meth:`_exchange`, and
        the connection holds what came, or is closed because a part of the answer is lost.
        """
        fd, functions = connection.descriptor, system_functions()
        filled = 0
        try:
            status, sent, unit = send_masked(
                functions,
                fd,
                prepared.request_head,
                prepared.request,
                prepared.masked_n,
                x[0],
                self._pad_n,
                prepared.max_row_l2,
                prepared.headroom,
                PEAK_LIMIT,
                _STALL_MS,
            )
            if not math.isfinite(unit):
                raise OtpipeError(NOT_FINITE)
            while status == INTERRUPTED:  # by a signal, whose handler has run by now
                status, sent = send_all(
                    functions, fd, prepared.request, sent, prepared.request.size, _STALL_MS
                )
            if status != DONE:
                connection.close()
                return unit, False
            self._read_ahead(prepared.linear_map.index)
            status = INTERRUPTED
            while status == INTERRUPTED:
                status, filled = receive_opened(
                    functions,
                    fd,
                    prepared.answer,
                    filled,
                    prepared.answer_head,
                    prepared.answer_m,
                    self._correction_m,
                    unit,
                    prepared.scale_m,
                    prepared.bias_m,
                    out[0],
                    _ANSWER_MS,
                    _STALL_MS,
                    looks_before_sleep(),
                )
        except BaseException:
            self._link.drop()  # an answer may be under way, which no later request may take
            raise
        if status == FOREIGN:
            connection.unread(prepared.answer[:filled])
            return unit, False
        if status != DONE:
            if filled or status == TIMED_OUT:
                connection.close()
            return unit, False
        traffic = connection.traffic
        traffic.frames_sent += 1
        traffic.frames_received += 1
        traffic.bytes_sent += sent
        traffic.bytes_received += filled
        self._link.round_trips += 1
        return unit, True

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

    def _read_ahead(self, index: int) -> None:
        """While the server works: the correction of this map and the pad of the next."""
        lease, reader = self._lease, self._reader
        assert lease is not None, "embed() begins a pass"
        if self._correction_of == index:
            return
        if reader is not None:
            self._correction_m, self._pad_n = reader.advance()
        else:
            self._correction_m = lease.corrections(index)[0]
            if index + 1 < len(self._maps):
                self._pad_n = lease.masks(index + 1)[0]
        self._correction_of = index

    def _exchange(self, prepared: _Map, sent_on: FrameConnection | None = None) -> None:
        """Send the masked row that is in place, and receive the answer into its place.

        It is valid until the next exchange, as is the correction read meanwhile.
        ``sent_on`` as of :meth:`ServerLink.exchange`.
        """
        index = prepared.linear_map.index
        prepared.request[: prepared.request_head.size] = prepared.request_head

        def due(header: Header) -> int:
            result = Result.parse(header)
            if (result.map_index, result.rows) != (index, 1):
                raise ProtocolError(
                    f"the server answered map {result.map_index}, {result.rows} rows; due was "
                    f"map {index}, one row"
                )
            return prepared.answer_m.nbytes

        self._link.exchange(
            memoryview(prepared.request),  # type: ignore[arg-type]
            prepared.answer_head.tobytes(),
            memoryview(prepared.answer),  # type: ignore[arg-type]
            MessageType.RESULT,
            due,
            lambda: self._read_ahead(index),
            sent_on,
        )


def _buffer(payload_bytes: int) -> np.ndarray:
    return np.empty(_HEAD_ROOM + payload_bytes, np.uint8)
