"""Passes of many rows over several connections: right answers, and nothing left behind."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import CASES, TOKENS, Case, expected_logits
from checkpoints import relative_error
from cutting_proxy import cutting_proxy
from proxies import recording_proxy
from servers import LocalServer, local_server
from torch import Tensor

from otpipe import Client
from otpipe.client import chunk_executor, row_streams
from otpipe.client.chunk_executor import ChunkExecutor
from otpipe.client.row_streams import plan_rows
from otpipe.errors import ConnectionLost, OtpipeError, ServerRefused
from otpipe.model.clear_ops import KVCache
from otpipe.model.spec import ModelSpec, post_attention_norm_name
from otpipe.server.lanes import Lane

CaseDirectory = Callable[[Case], Path]
STREAMS = 3
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def three_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every pass of several rows, though models are small and the machine may be too."""
    monkeypatch.setattr(row_streams, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(row_streams, "MIN_CHUNK_BYTES", 1)
    monkeypatch.setattr(row_streams, "plan_rows", lambda spec, rows, _: plan_rows(spec, rows, 3))


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers step by step in Python, where a test can get between two steps."""
    monkeypatch.setattr(ChunkExecutor, "_run_compiled", lambda self: False)


@pytest.fixture
def server(case_directory: CaseDirectory) -> Iterator[LocalServer]:
    with local_server(case_directory(CASES[0])) as serving:
        yield serving


@pytest.fixture
def client(server: LocalServer, tmp_path: Path) -> Iterator[Client]:
    with Client(server.address, tmp_path) as connected:
        connected.prepare(256)
        yield connected


def one_pass(client: Client, cache: KVCache | None = None) -> Tensor:
    """Logits of all tokens, in one pass over several streams."""
    logits = client.mode._pass(list(TOKENS), cache or client.mode.executor.new_cache(), "all")
    assert logits is not None
    return logits


def want_of(directory: Path) -> Tensor:
    return expected_logits(CASES[0], directory, True)


def open_connections(server: LocalServer) -> int:
    """Connections once those that are being closed are."""
    deadline = time.monotonic() + 5
    while (count := len(server.gateway._sockets)) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def row_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rows")]


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("few_positions", [4, 128], ids=["framework", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("chunk_rows", [2, 128])
def test_logits_equal_plaintext_and_those_of_single_steps(
    case: Case,
    chunk_rows: int,
    few_positions: int,
    case_directory: CaseDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The passes of each case, one after the other with one cache; two chunk sizes.

    ``few_positions``: whose attention is taken for most rows.
    """
    monkeypatch.setattr(row_streams, "MAX_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(chunk_executor, "_FEW_POSITIONS", few_positions)
    directory = case_directory(case)

    def passes() -> Tensor:
        cache = client.mode.executor.new_cache()
        ends = [sum(case.chunks[:i]) for i in range(len(case.chunks) + 1)]
        parts = [
            client.mode._pass(list(case.token_ids[first:last]), cache, "all")
            for first, last in pairwise(ends)
        ]
        assert cache.length == len(case.token_ids)
        return torch.cat([part for part in parts if part is not None])

    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(2 * len(case.token_ids))
        got = passes()
        monkeypatch.setattr(ChunkExecutor, "_run_compiled", lambda self: False)
        torch.testing.assert_close(passes(), got, rtol=0, atol=0)
    assert relative_error(got, expected_logits(case, directory, True)) < TOLERANCE


def test_layers_run_in_compiled_code(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others compare it with is not taken by mistake."""
    stops: list[int] = []
    real = chunk_executor.run_steps

    def watched(*args: object) -> tuple[int, int, int, int]:
        stop: tuple[int, int, int, int] = real(*args)
        stops.append(stop[0])
        return stop

    monkeypatch.setattr(chunk_executor, "run_steps", watched)
    one_pass(client)
    assert stops == [len(client.mode._streams._tables.model.steps)] * STREAMS


def test_logits_of_the_last_row_and_of_none(client: Client, case_directory: CaseDirectory) -> None:
    cache = client.mode.executor.new_cache()
    assert client.mode._pass(list(TOKENS[:7]), cache, "none") is None
    last = client.mode._pass(list(TOKENS[7:]), cache, "last")
    assert last is not None
    assert last.shape == (1, client.bundle.spec.vocab_size)
    want = want_of(case_directory(CASES[0]))[-1:]
    assert relative_error(last, want) < TOLERANCE
    assert client.mode.slots_used == len(TOKENS)


# -- connections and threads ---------------------------------------------------------------------


@pytest.mark.usefixtures("by_steps")
def test_every_stream_has_a_connection_and_all_but_one_are_closed(
    server: LocalServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = ChunkExecutor.swiglu

    def counted(self: ChunkExecutor, gate_up: Tensor) -> Tensor:
        seen.append((len(server.gateway._sockets), len(row_threads())))
        return real(self, gate_up)

    monkeypatch.setattr(ChunkExecutor, "swiglu", counted)
    before = client._link.current_traffic()
    one_pass(client)
    after = client._link.current_traffic()
    assert max(seen) == (STREAMS, STREAMS)
    assert open_connections(server) == 1
    assert row_threads() == []
    spec = client.bundle.spec
    assert client._link.round_trips == STREAMS * len(spec.maps) + 1  # and the bundle
    rows_up = sum(m.in_features * m.ring_bytes for m in spec.maps) * len(TOKENS)
    assert rows_up < after.bytes_sent - before.bytes_sent < rows_up + 10_000


@pytest.mark.parametrize("room", [1, 2])
def test_a_full_server_leaves_a_pass_with_fewer_connections(
    room: int, case_directory: CaseDirectory, tmp_path: Path
) -> None:
    directory = case_directory(CASES[0])
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(64)
    with (
        local_server(directory, max_clients=room) as server,
        Client(server.address, tmp_path) as client,
    ):
        assert relative_error(one_pass(client), want_of(directory)) < TOLERANCE


def test_torch_keeps_its_number_of_threads(client: Client) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one_pass(client)
        assert torch.get_num_threads() == 2
        in_new_thread: list[int] = []
        thread = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert in_new_thread == [2]
    finally:
        torch.set_num_threads(before)


# -- errors --------------------------------------------------------------------------------------


def fail_once(patch: pytest.MonkeyPatch, action: Callable[[], object], first_row: int = 4) -> None:
    """Have the chunk that begins at ``first_row`` do ``action`` in its first SwiGLU."""
    real = ChunkExecutor.swiglu
    done: list[bool] = []

    def failing(self: ChunkExecutor, gate_up: Tensor) -> Tensor:
        if self._chunk.rows.start == 4 and not done:
            done.append(True)
            action()
        return real(self, gate_up)

    patch.setattr(ChunkExecutor, "swiglu", failing)


def raise_it(error: BaseException) -> object:
    raise error


@pytest.mark.usefixtures("by_steps")
@pytest.mark.parametrize("error", [RuntimeError("a bug"), ServerRefused("no")], ids=repr)
def test_one_failure_ends_the_pass_and_the_next_one_works(
    error: Exception,
    server: LocalServer,
    client: Client,
    case_directory: CaseDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_once(monkeypatch, lambda: raise_it(error))
    cache = client.mode.executor.new_cache()
    with pytest.raises(type(error), match=str(error)):
        one_pass(client, cache)
    assert cache.length == 0
    assert row_threads() == []
    assert open_connections(server) <= 1
    assert relative_error(one_pass(client, cache), want_of(case_directory(CASES[0]))) < TOLERANCE


@pytest.mark.usefixtures("by_steps")
def test_a_failure_wakes_those_who_wait_for_the_server(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of the first chunk is held back on its way; meanwhile the last chunk fails."""
    held, waiting = threading.Event(), threading.Event()
    real = ChunkExecutor.rms_norm

    def failing(self: ChunkExecutor, x: Tensor, norm_name: str) -> Tensor:
        if self._chunk.rows.stop == len(TOKENS) and norm_name == post_attention_norm_name(0):
            assert waiting.wait(20)
            raise RuntimeError("a bug")
        return real(self, x, norm_name)

    monkeypatch.setattr(ChunkExecutor, "rms_norm", failing)
    with recording_proxy(server.address) as proxy, Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        first_rows = len(TOKENS) // STREAMS
        sent = sum(m.in_features * m.ring_bytes for m in client.bundle.spec.maps[:3]) * first_rows

        def hold(connection: int, bytes_sent: int) -> bool:
            if connection == 0 and bytes_sent > sent + 1000:
                waiting.set()
                held.wait(30)
            return False

        proxy.cut = hold
        started_s = time.monotonic()
        try:
            with pytest.raises(RuntimeError, match="a bug"):
                one_pass(client)
            assert waiting.is_set()
            assert time.monotonic() - started_s < 10
            assert row_threads() == []
        finally:
            held.set()


@pytest.mark.usefixtures("by_steps")
def test_an_interrupt_by_the_user_leaves_nothing_running(
    server: LocalServer,
    client: Client,
    case_directory: CaseDirectory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_once(monkeypatch, lambda: (_thread.interrupt_main(), time.sleep(0.5)))
    with pytest.raises(KeyboardInterrupt):
        one_pass(client)
    assert row_threads() == []
    assert open_connections(server) <= 1
    assert relative_error(one_pass(client), want_of(case_directory(CASES[0]))) < TOLERANCE


def test_a_pass_goes_on_after_its_connections_are_cut(
    server: LocalServer, tmp_path: Path, case_directory: CaseDirectory
) -> None:
    with cutting_proxy(server.address) as proxy, Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        proxy.cut_downward(2_000, 9_000, 30_001)
        assert relative_error(one_pass(client), want_of(case_directory(CASES[0]))) < TOLERANCE
        assert proxy.cuts == 3


def test_a_server_that_stays_away_ends_the_pass(server: LocalServer, tmp_path: Path) -> None:
    with (
        cutting_proxy(server.address) as proxy,
        Client(proxy.address, tmp_path, retry_for_s=0.5) as client,
    ):
        client.prepare(64)
        proxy.cut_downward(2_000, 2_001, 2_002, stay_away=True)
        with pytest.raises(ConnectionLost):
            one_pass(client)
        assert row_threads() == []


@pytest.mark.parametrize("map_index", [0, 3], ids=["embedding", "inside a layer"])
def test_a_damaged_slot_of_one_chunk_costs_a_repeated_pass(
    map_index: int, client: Client, tmp_path: Path, case_directory: CaseDirectory
) -> None:
    (corrections,) = (tmp_path / "pads").glob("*/*/corrections.bin")
    maps = client.bundle.spec.maps
    before = sum(m.out_features * m.ring_bytes for m in maps[:map_index]) * 256
    row_bytes = maps[map_index].out_features * maps[map_index].ring_bytes
    with corrections.open("r+b") as file:  # the correction of the sixth slot
        file.seek(before + 5 * row_bytes)
        file.write(b"\xa5" * row_bytes)
    logits = client.mode.forward(list(TOKENS), client.mode.executor.new_cache(), "all")
    assert logits is not None
    assert relative_error(logits, want_of(case_directory(CASES[0]))) < TOLERANCE
    assert client.mode.slots_used == 2 * len(TOKENS)


def test_what_is_not_a_number_ends_the_pass_unsent(client: Client) -> None:
    client.mode._streams._tables.model.gains[1] = float("nan")
    before = client._link.current_traffic().bytes_sent
    with pytest.raises(OtpipeError, match="infinite or not a number"):
        one_pass(client)
    spec = client.bundle.spec
    until_then = [spec.map("embed"), spec.map("qkv", 0), spec.map("o", 0)]
    rows_up = sum(m.in_features * m.ring_bytes for m in until_then) * len(TOKENS)
    assert client._link.current_traffic().bytes_sent - before <= rows_up + 10_000


def test_a_refusal_inside_a_layer_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Lane.linear

    def refuse(self: Lane, map_index: int, rows: int, payload: Tensor) -> Tensor:
        if map_index == 3:
            raise ServerRefused("no more for you")
        return real(self, map_index, rows, payload)

    monkeypatch.setattr(Lane, "linear", refuse)
    with pytest.raises(ServerRefused, match="no more for you"):
        one_pass(client)
    assert row_threads() == []


def test_an_interrupt_wakes_compiled_code(server: LocalServer, tmp_path: Path) -> None:
    """The first chunk waits for the server, which is not asked, and the others for its keys."""
    held = threading.Event()
    with recording_proxy(server.address) as proxy, Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        embedding = client.bundle.spec.map("embed").in_features * (len(TOKENS) // STREAMS)

        def hold(connection: int, bytes_sent: int) -> bool:
            if connection == 0 and bytes_sent > embedding + 1000 and not held.is_set():
                time.sleep(0.3)
                _thread.interrupt_main()
                held.wait(30)
            return False

        proxy.cut = hold
        started_s = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                one_pass(client)
            assert time.monotonic() - started_s < 10
            assert row_threads() == []
        finally:
            held.set()


# -- how a pass is cut ---------------------------------------------------------------------------


def real_plan(spec: ModelSpec, rows: int, cores: int) -> tuple[list[int], int]:
    plan = plan_rows(spec, rows, cores)
    ends = [0]
    for chunk in plan.chunks:
        assert chunk.start == ends[-1]
        ends.append(chunk.stop)
    assert ends[-1] == rows
    return [last - first for first, last in pairwise(ends)], plan.num_streams


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 127, 128, 129, 400, 512])
@pytest.mark.parametrize("cores", [1, 2, 7, 64])
def test_chunks_cover_the_rows_and_are_nearly_equal(rows: int, cores: int, client: Client) -> None:
    sizes, streams = real_plan(client.bundle.spec, rows, cores)
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= streams <= min(cores, rows, row_streams.MAX_STREAMS)
    assert len(sizes) % streams == 0
    assert streams == 1 or max(sizes) <= row_streams.MAX_CHUNK_ROWS


def test_little_work_is_not_cut(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_streams, "MIN_CHUNK_BYTES", 1 << 18)
    assert real_plan(client.bundle.spec, 40, 8) == ([40], 1)
