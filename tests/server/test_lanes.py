"""Several clients at once, and the server's own misfortunes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import build_checkpoint
from raw_client import (
    HELLO,
    RawClient,
    ask_linear,
    eventually,
    frame,
    honest_ole,
    linear_bytes,
    message_frame,
    raw_client,
)
from served import (
    MAX_CLIENTS,
    QKV,
    expected,
    refused,
    upload,
)
from servers import LocalServer, local_server
from torch import Tensor

from otpipe.errors import RankDied
from otpipe.pipeline.bulk import BULK_BYTES
from otpipe.pipeline.jobs import JobHeader, Op
from otpipe.protocol.messages import (
    Linear,
    Welcome,
)
from otpipe.protocol.wire import MAGIC, PREFIX, WIRE_VERSION
from otpipe.server.lanes import Lane

# -- several clients  ------------------------------------------------------------------------------


def test_rows_of_several_clients_become_one_gemm(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = server.stages[0]
    calls: list[int] = []
    entered, go_on = threading.Event(), threading.Event()
    linear = stage.linear

    def counted(map_index: int, rows: int, payload: torch.Tensor) -> torch.Tensor:
        calls.append(rows)
        entered.set()
        assert go_on.wait(10)
        return linear(map_index, rows, payload)

    monkeypatch.setattr(stage, "linear", counted)
    rows = (1, 2, 3, 4)
    payloads = [linear_bytes(server.bundle, QKV, count, seed=count) for count in rows]

    def ask(number: int) -> np.ndarray:
        with raw_client(server.gateway.port) as client:
            return ask_linear(client.frames, QKV, rows[number], payloads[number])

    lane = server.gateway._service._lanes[0]
    with ThreadPoolExecutor(len(rows)) as pool:
        answers = [pool.submit(ask, 0)]
        assert entered.wait(5)  # the first is at work; the others queue meanwhile
        answers += [pool.submit(ask, number) for number in (1, 2, 3)]
        assert eventually(lambda: len(lane._pending) == 3)
        go_on.set()
        for answer, payload in zip(answers, payloads, strict=True):
            np.testing.assert_array_equal(answer.result(10), expected(server, QKV, payload))
    assert calls == [1, 9]


def test_many_clients_at_once_get_their_own_rows(server: LocalServer) -> None:
    work = []
    for number in range(25 * MAX_CLIENTS):
        map_index, rows = number % len(server.bundle.spec.maps), 1 + number % 7
        payload = linear_bytes(server.bundle, map_index, rows, seed=number)
        work.append((map_index, rows, payload, expected(server, map_index, payload)))

    def converse(number: int) -> None:
        with raw_client(server.gateway.port) as client:
            for map_index, rows, payload, due in work[number::MAX_CLIENTS]:
                got = ask_linear(client.frames, map_index, rows, payload)
                np.testing.assert_array_equal(got, due)

    with ThreadPoolExecutor(MAX_CLIENTS) as pool:
        for done in [pool.submit(converse, number) for number in range(MAX_CLIENTS)]:
            done.result(60)


# -- the server's own misfortunes  -----------------------------------------------------------------


def test_out_of_memory_is_told_to_the_client(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory for 7 GB")

    with monkeypatch.context() as patch:
        patch.setattr(server.stages[0], "linear", exhausted)
        text = refused(server, message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1)))
    assert text == "no memory for 7 GB"


def test_an_internal_error_is_told_and_logged(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: object) -> torch.Tensor:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(server.stages[0], "linear", broken)
        text = refused(server, message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1)))
    assert text == "the server failed on an internal error; its log says more"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("request_kind", ["linear", "ole"])
def test_a_dead_rank_closes_the_connection_without_a_word(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, request_kind: str
) -> None:
    """So that the client looks for a replica, or waits for this server to come back."""

    def dead(*_args: object) -> tuple[JobHeader, torch.Tensor]:
        raise RankDied("rank 0 gave no answer")

    pieces = (
        [message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1))]
        if request_kind == "linear"
        else list(upload(honest_ole(server.bundle, QKV), 10))
    )
    with monkeypatch.context() as patch:
        patch.setattr(server.gateway._service._lanes[0], "_rank_call", dead)
        with raw_client(server.gateway.port, *pieces) as client:
            assert client.is_closed_by_server()


def test_closing_the_gateway_ends_all_sessions(tmp_path: Path) -> None:
    with local_server(build_checkpoint(tmp_path)) as server:
        client = RawClient(server.gateway.port)
        client.send(HELLO)
        Welcome.parse(client.answer()[1])
    assert client.is_closed_by_server()
    with pytest.raises(OSError, match="refused"):
        RawClient(server.gateway.port)


def test_op_numbers_of_jobs_never_collide_with_answers() -> None:
    assert {Op.DONE, Op.FAILED}.isdisjoint({op for op in Op if op < 100})


def test_prefix_is_what_the_helpers_assume() -> None:
    assert PREFIX.unpack(frame(3, {}, b"xy")[: PREFIX.size]) == (MAGIC, WIRE_VERSION, 3, 1, 2)


def test_bulk_requests_of_the_own_device_run_side_by_side() -> None:
    """Both calls are inside the rank at once, or the barrier would break."""
    both = threading.Barrier(2, timeout=20)

    def call(job: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        both.wait()
        return JobHeader(Op.DONE, job.map_index, job.rows), payload[: job.rows]

    lane = Lane(0, call, [8], side_by_side=True)
    payload = torch.zeros(BULK_BYTES, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rows: lane.linear(0, rows, payload), (3, 5)))
    assert [len(result) for result in results] == [3, 5]


def test_bulk_requests_of_other_ranks_wait_for_each_other() -> None:
    inside = threading.Semaphore(1)

    def call(job: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        assert inside.acquire(blocking=False), "two calls at once"
        time.sleep(0.02)
        inside.release()
        return JobHeader(Op.DONE, job.map_index, job.rows), payload[: job.rows]

    lane = Lane(1, call, [1])
    payload = torch.zeros(BULK_BYTES, dtype=torch.uint8)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: lane.linear(0, 1, payload), range(8)))
    assert [len(result) for result in results] == [1] * 8
