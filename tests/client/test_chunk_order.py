"""The order among chunks: nobody passes the keys of the rows before, and a failure wakes all."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from otpipe.client.chunk_order import ChunkOrder, fail, keys_written, new_order

CHUNKS, LAYERS = 3, 40


@pytest.fixture(params=[0, 50], ids=["asleep", "looking"])
def order(request: pytest.FixtureRequest) -> Iterator[ChunkOrder]:
    made = new_order(CHUNKS)._replace(looks=request.param)
    yield made
    fail(made)  # wakes what a failed test has left


def in_threads(order: ChunkOrder, chunks: list[int], ends: list[tuple[int, bool]]) -> None:
    def run(chunk: int) -> None:
        for layer in range(LAYERS):
            if not keys_written(order, chunk, layer):
                ends.append((chunk, False))
                return
        ends.append((chunk, True))

    for chunk in chunks:
        threading.Thread(target=run, args=(chunk,), daemon=True).start()


def wait_for(ends: list[tuple[int, bool]], count: int) -> list[tuple[int, bool]]:
    done = threading.Event()
    for _ in range(1000):
        if len(ends) >= count:
            break
        done.wait(0.01)
    return sorted(ends)


def test_all_get_through_in_any_order_of_starting(order: ChunkOrder) -> None:
    ends: list[tuple[int, bool]] = []
    in_threads(order, [2, 0, 1], ends)
    assert wait_for(ends, CHUNKS) == [(chunk, True) for chunk in range(CHUNKS)]
    assert order.written.tolist() == [LAYERS] * CHUNKS


def test_a_chunk_waits_for_those_before_it(order: ChunkOrder) -> None:
    ends: list[tuple[int, bool]] = []
    in_threads(order, [2, 1], ends)
    threading.Event().wait(0.2)
    assert ends == []
    assert order.written.tolist() == [0, 0, 0]
    assert keys_written(order, 0, 0)
    threading.Event().wait(0.2)
    assert ends == []
    assert order.written.tolist() == [1, 1, 1]


def test_a_failure_wakes_who_waits_and_nobody_waits_after_it(order: ChunkOrder) -> None:
    ends: list[tuple[int, bool]] = []
    in_threads(order, [2, 1], ends)
    threading.Event().wait(0.1)
    fail(order)
    assert wait_for(ends, 2) == [(1, False), (2, False)]
    assert not keys_written(order, 2, 0)
