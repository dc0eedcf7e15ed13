"""The order among the chunks of one pass: each waits for the keys of the rows before it.

Compiled, so that a chunk waits without the interpreter. Threads share the arrays; what is written
under a lock is read under it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import (
    COND_BROADCAST,
    COND_WAIT,
    LOCK,
    UNLOCK,
    YIELD,
    call_1,
    call_2,
    looks_before_sleep,
    new_condition,
    new_mutex,
    system_functions,
)


class ChunkOrder(NamedTuple):
    """What the chunks of a pass share.

    Attributes:
        written: int64 (chunks,), layers whose keys and values are written, by the chunk and by all
            before it.
        failed: int64 (1,), not 0 once the pass has failed.
        mutexes, conditions: uint8 (chunks, bytes) for ``native_io``; of ``written``.
        looks: how often to look before going to sleep.
    """

    written: Array
    failed: Array
    mutexes: Array
    conditions: Array
    looks: int


def new_order(num_chunks: int) -> ChunkOrder:
    """Of chunks none of which has begun."""
    return ChunkOrder(
        np.zeros(num_chunks, np.int64),
        np.zeros(1, np.int64),
        np.stack([new_mutex()] * num_chunks),
        np.stack([new_condition()] * num_chunks),
        looks_before_sleep(),
    )


def keys_written(order: ChunkOrder, chunk: int, layer: int) -> bool:
    """Declare a layer's keys and values of a chunk written, and wait until those before it are.

    Returns False, at once or while it waits, when the pass has failed.
    """
    return bool(declare_and_wait(system_functions(), order, chunk, layer))


def fail(order: ChunkOrder) -> None:
    """Wake all who wait; nobody waits from now on."""
    _fail(system_functions(), order)


@kernel
def declare_and_wait(functions: Array, order: ChunkOrder, chunk: int, layer: int) -> bool:
    """See :func:`keys_written`. A chunk declares a layer when all before it have done so."""
    before = chunk - 1
    if before >= 0:
        looks = order.looks
        while looks > 0 and order.written[before] <= layer and order.failed[0] == 0:
            call_1(functions[YIELD], np.int64(0))
            looks -= 1
        held = np.int64(order.mutexes[before].ctypes.data)
        call_1(functions[LOCK], held)
        while order.written[before] <= layer and order.failed[0] == 0:
            call_2(functions[COND_WAIT], np.int64(order.conditions[before].ctypes.data), held)
        call_1(functions[UNLOCK], held)
    held = np.int64(order.mutexes[chunk].ctypes.data)
    call_1(functions[LOCK], held)
    order.written[chunk] = layer + 1
    call_1(functions[COND_BROADCAST], np.int64(order.conditions[chunk].ctypes.data))
    call_1(functions[UNLOCK], held)
    return order.failed[0] == 0


@kernel
def _fail(functions: Array, order: ChunkOrder) -> None:
    order.failed[0] = 1
    for chunk in range(order.mutexes.shape[0]):
        held = np.int64(order.mutexes[chunk].ctypes.data)
        call_1(functions[LOCK], held)
        call_1(functions[COND_BROADCAST], np.int64(order.conditions[chunk].ctypes.data))
        call_1(functions[UNLOCK], held)
