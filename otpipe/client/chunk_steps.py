"""A chunk's way through the layers in one compiled call: what its thread does without Python.

The decoder program is recorded once, as a table of steps on named values, and the table is run by
:func:`run_steps`. Python threads that run it step by step take turns, and on a machine with many
cores those turns are most of the time of a prompt. The recorded program is the one of
``otpipe.model.program``; each step is the kernel that ``ChunkExecutor`` calls for it.

Where anything else happens than was to be expected, the run stops at that step and says how far it
got; the executor does that step by itself, and the run goes on behind it.

Shapes: T rows of the chunk, n in_features, m out_features, P positions, K key/value heads, G query
heads a key/value head, D head size, M maps, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numba as nb
import numpy as np

from otpipe.client.chunk_order import ChunkOrder, declare_and_wait
from otpipe.client.row_exchange import HEAD_ROOM, receive_opened, send_masked
from otpipe.client.store_rows import SpanTables, read_map
from otpipe.kernels.activations import rms_norm_range
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import BROKEN, DONE, INTERRUPTED, clock_ns, floats_at, send_all
from otpipe.kernels.rotary import rotate_rows
from otpipe.kernels.row_ops import add_rows, attend_rows, swiglu_rows
from otpipe.model.program import Executor, decoder_layers
from otpipe.model.spec import LinearMap, ModelSpec
from otpipe.protocol.fixed_point import PEAK_LIMIT

NORM, LINEAR, ROTATE, ATTEND, SWIGLU, ADD = range(6)
"""Kinds of steps."""

SENDING, READING, RECEIVING, WAITING = range(6, 10)
"""Parts of steps that are timed apart: three of LINEAR, whose own is masking, and one of ROTATE."""

KINDS = 10

VALUES = (
    "residual",
    "normed",
    "qkv",
    "queries",
    "context",
    "o",
    "gate_up",
    "activated",
    "down",
)
"""Of a layer, float32 (T, width) each; ``queries`` are (K, T, G, D)."""

_KIND, _WHICH, _IN, _OUT = range(4)  # columns of the table of steps
_REQUEST, _ANSWER = range(2)  # columns of heads
_FRAMES, _BYTES_SENT, _BYTES_RECEIVED = range(3)  # counted

LONGEST_HEAD = 64


class _Recorder:
    """Notes the operations of the program; values are their names in :data:`VALUES`."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.steps: list[tuple[int, int, int, int]] = []
        self._norms = {name: row for row, name in enumerate(spec.norm_names)}

    def _step(self, kind: int, which: int, source: str, out: str) -> str:
        self.steps.append((kind, which, VALUES.index(source), VALUES.index(out)))
        return out

    def rms_norm(self, x: str, norm_name: str) -> str:
        return self._step(NORM, self._norms[norm_name], x, "normed")

    def linear(self, linear_map: LinearMap, x: str) -> str:
        return self._step(LINEAR, linear_map.index, x, linear_map.kind)

    def attention(self, layer: int, qkv: str, cache: object) -> str:
        return self._step(ATTEND, layer, self._step(ROTATE, layer, qkv, "queries"), "context")

    def swiglu(self, gate_up: str) -> str:
        return self._step(SWIGLU, 0, gate_up, "activated")

    def add(self, a: str, b: str) -> str:
        return self._step(ADD, 0, b, a)


def recorded_layers(spec: ModelSpec) -> np.ndarray:
    """int64 (steps, 4) of all layers: kind, which (norm, map or layer), source, result.

    The result of ADD is also its other source. The layers begin and end with ``residual``.
    """
    recorder = _Recorder(spec)
    executor = cast(Executor[str, Any], recorder)  # without what is beside the layers
    end = decoder_layers(executor, "residual", None)
    assert end == "residual", "what the logits are computed from"
    steps = np.array(recorder.steps, np.int64)
    maps = steps[steps[:, _KIND] == LINEAR, _WHICH]
    assert (np.diff(maps) == 1).all(), "pads are read ahead in the order of the maps"
    return steps


class ModelTables(NamedTuple):
    """The model, for all chunks of all passes.

    Attributes:
        steps: of :func:`recorded_layers`.
        sizes: int64 (M, 2): n, m.
        bounds: float64 (M, 2): max_row_l2, headroom.
        factors: int64 (M, 3): addresses of scale and bias, float32 (m,) each, and how many biases.
        gains: float32 (norms, hidden). epsilon: of the norms.
        head_shape: K, G, D.
    """

    steps: Array
    sizes: Array
    bounds: Array
    factors: Array
    gains: Array
    epsilon: float
    head_shape: tuple[int, int, int]


class ChunkTables(NamedTuple):
    """One chunk, as one stream has it.

    Attributes:
        number: of the chunk in its pass. start: positions before it.
        values: int64 (VALUES, 2): address and width.
        cos, sin: (T, D), of its positions.
        caches: int64 (L, 3): addresses of keys and values, float32 (K, P, D) each, and P.
        heads: uint8 (M, 2, LONGEST_HEAD), of request and answer. head_bytes: int64 (M, 2).
        request, answer: uint8, the memory of frames: ``HEAD_ROOM`` and the largest payload.
        units: float64 (T,), of the rows that were masked last.
        few_positions: up to which ATTEND is done here.
        counts: int64 (3,), to which frames each way, bytes sent and bytes received are added.
        spent_ns: int64 (KINDS,), to which the time of each kind is added.
    """

    number: int
    start: int
    values: Array
    cos: Array
    sin: Array
    caches: Array
    heads: Array
    head_bytes: Array
    request: Array
    answer: Array
    units: Array
    few_positions: int
    counts: Array
    spent_ns: Array


class Stop(NamedTuple):
    """Where a run ended.

    Attributes:
        step: that it did not do; behind the last when all are done.
        part: SENDING, READING, RECEIVING: what failed of a LINEAR; WAITING: the pass has failed
            elsewhere; ATTEND: a step that is not for compiled code; else all is done.
        status, filled: of ``send_masked`` after SENDING, of ``receive_opened`` after RECEIVING.
    """

    step: int
    part: int
    status: int
    filled: int


@kernel
def run_steps(
    functions: Array,
    fd: int,
    model: ModelTables,
    chunk: ChunkTables,
    slots: SpanTables,
    order: ChunkOrder,
    first_step: int,
    first_timeout_ms: int,
    timeout_ms: int,
) -> tuple[int, int, int, int]:
    """Run the steps from ``first_step`` on as far as it goes; returns a :class:`Stop`.

    Args:
        functions, fd: of ``native_io``.
        first_timeout_ms, timeout_ms: of ``receive_opened``.
    """
    steps, spent_ns = model.steps, chunk.spent_ns
    K, G, D = model.head_shape
    T = chunk.units.shape[0]
    end = chunk.start + T
    now_ns = clock_ns(functions)
    for at in range(first_step, steps.shape[0]):
        kind, which = steps[at, _KIND], steps[at, _WHICH]
        source, out = steps[at, _IN], steps[at, _OUT]
        x_width, y_width = chunk.values[source, 1], chunk.values[out, 1]
        x = nb.carray(floats_at(chunk.values[source, 0]), (T, x_width), np.float32)
        y = nb.carray(floats_at(chunk.values[out, 0]), (T, y_width), np.float32)
        if kind == LINEAR:
            if order.failed[0] != 0:
                return at, WAITING, 0, 0
            part, status, filled, now_ns = _linear(
                functions,
                fd,
                model,
                chunk,
                slots,
                which,
                x,
                y,
                first_timeout_ms,
                timeout_ms,
                order.looks,
                now_ns,
            )
            if status != DONE:
                return at, part, status, filled
        elif kind == NORM:
            rms_norm_range(x, model.gains[which], model.epsilon, y, 0, T)
        elif kind in (ROTATE, ATTEND):
            positions = chunk.caches[which, 2]
            keys = nb.carray(floats_at(chunk.caches[which, 0]), (K, positions, D), np.float32)
            values = nb.carray(floats_at(chunk.caches[which, 1]), (K, positions, D), np.float32)
            if kind == ROTATE:
                q_KTGD = y.reshape(K, T, G, D)
                rotate_rows(x, chunk.cos, chunk.sin, q_KTGD, keys, values, chunk.start)
                now_ns = _spent(functions, spent_ns, ROTATE, now_ns)
                if not declare_and_wait(functions, order, chunk.number, which):
                    return at, WAITING, 0, 0
                kind = WAITING
            elif end <= chunk.few_positions:
                attend_rows(x.reshape(K, T, G, D), keys, values, chunk.start, y)
            else:
                return at, ATTEND, 0, 0
        elif kind == SWIGLU:
            swiglu_rows(x, y)
        else:
            add_rows(y, x)
        now_ns = _spent(functions, spent_ns, kind, now_ns)
    return steps.shape[0], LINEAR, DONE, 0


@kernel
def _spent(functions: Array, spent_ns: Array, kind: int, since_ns: int) -> int:
    """Add the time since then to a kind; returns the time."""
    now_ns = clock_ns(functions)
    spent_ns[kind] += now_ns - since_ns
    return now_ns


@kernel
def _linear(
    functions: Array,
    fd: int,
    model: ModelTables,
    chunk: ChunkTables,
    slots: SpanTables,
    index: int,
    x_Tn: Array,
    out_Tm: Array,
    first_timeout_ms: int,
    timeout_ms: int,
    looks: int,
    now_ns: int,
) -> tuple[int, int, int, int]:
    """One masked map: the part that failed, its status and ``filled``, and the time.

    Requests and answers are as in ``RowExchange``, pads and corrections as in ``SpanReader``.
    """
    T, n, m = x_Tn.shape[0], model.sizes[index, 0], model.sizes[index, 1]
    in_bytes, out_bytes = 4 * T * n, 4 * T * m
    spent_ns = chunk.spent_ns
    request_head = chunk.heads[index, _REQUEST, : chunk.head_bytes[index, _REQUEST]]
    request = chunk.request[HEAD_ROOM - request_head.shape[0] : HEAD_ROOM + in_bytes]
    masked_Tn = chunk.request[HEAD_ROOM : HEAD_ROOM + in_bytes].view(np.uint32).reshape(T, n)
    pad_Tn = slots.pads[:in_bytes].view(np.uint32).reshape(T, n)
    status, sent = send_masked(
        functions,
        fd,
        request_head,
        request,
        masked_Tn,
        x_Tn,
        pad_Tn,
        model.bounds[index, 0],
        model.bounds[index, 1],
        PEAK_LIMIT,
        chunk.units,
        timeout_ms,
    )
    while status == INTERRUPTED:
        status, sent = send_all(functions, fd, request, sent, request.shape[0], timeout_ms)
    now_ns = _spent(functions, spent_ns, SENDING, now_ns)
    if status != DONE:
        return SENDING, status, sent, now_ns
    octets = slots.corrections[:out_bytes]
    correction_Tm = octets.view(np.uint32).reshape(T, m)
    following, next_bytes = index, np.int64(0)
    if index + 1 < slots.end_map:
        following = index + 1
        next_bytes = 4 * T * model.sizes[following, 0]
    good = read_map(
        functions,
        slots.fd,
        slots.offsets[index] + slots.first_slot * 4 * m,
        octets,
        correction_Tm,
        slots.weights[:m],
        slots.expected[index],
        slots.round_keys[following],
        slots.prefixes[following],
        slots.first_slot * (model.sizes[following, 0] // 4),
        slots.pads[:next_bytes],
    )
    now_ns = _spent(functions, spent_ns, READING, now_ns)
    if not good:
        return READING, BROKEN, 0, now_ns
    answer_head = chunk.heads[index, _ANSWER, : chunk.head_bytes[index, _ANSWER]]
    answer = chunk.answer[HEAD_ROOM - answer_head.shape[0] : HEAD_ROOM + out_bytes]
    answer_Tm = chunk.answer[HEAD_ROOM : HEAD_ROOM + out_bytes].view(np.uint32).reshape(T, m)
    status, filled = INTERRUPTED, 0
    while status == INTERRUPTED:
        status, filled = receive_opened(
            functions,
            fd,
            answer,
            filled,
            answer_head,
            answer_Tm,
            correction_Tm,
            chunk.units,
            nb.carray(floats_at(model.factors[index, 0]), (m,), np.float32),
            nb.carray(floats_at(model.factors[index, 1]), (model.factors[index, 2],), np.float32),
            out_Tm,
            first_timeout_ms,
            timeout_ms,
            looks,
        )
    now_ns = _spent(functions, spent_ns, RECEIVING, now_ns)
    if status == DONE:
        chunk.counts[_FRAMES] += 1
        chunk.counts[_BYTES_SENT] += sent
        chunk.counts[_BYTES_RECEIVED] += filled
    return RECEIVING, status, filled, now_ns
