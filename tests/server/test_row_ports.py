"""Rows of maps that another rank holds, over the connection that a gateway keeps to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch.distributed as dist
from checkpoints import build_checkpoint
from fake_device import SIZES, FakeDevice
from raw_client import RawClient, ask_linear, eventually, linear_bytes, message_frame, raw_client
from served import expected
from servers import LocalServer, local_server

from otpipe.errors import ConnectionLost, RankDied
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.spec import ModelSpec
from otpipe.pipeline.placement import Placement
from otpipe.pipeline.stage import Stage
from otpipe.protocol.messages import Linear, MessageType, Ping, Result
from otpipe.protocol.wire import FrameConnection
from otpipe.server import row_server
from otpipe.server.private_port import RankPort
from otpipe.server.row_loop import compile_loop
from otpipe.server.row_ports import RowRoutes, open_row_port
from otpipe.server.row_server import RowServer

STALL_S = 0.5


class TwoRanks:
    """A gateway with one fake device, and a port for rows with another, in this process."""

    def __init__(self, stages: list[Stage], spec: ModelSpec) -> None:
        self.devices = [FakeDevice(stage) for stage in stages]
        self.lost: list[int] = []
        self._maps = stages[0]._linear_maps
        placement = Placement.for_model(spec, 2)
        store = dist.HashStore()
        ports: list[RankPort] = []

        def open_port() -> None:  # waits for the gateway's token, as the gateway for its address
            ports.append(open_row_port(1, store, self._on_rank, STALL_S))

        thread = threading.Thread(target=open_port)
        thread.start()
        self._routes = RowRoutes(placement, store, STALL_S)
        thread.join(10)
        self.port = ports[0]

    def _on_rank(self, connection: FrameConnection) -> RowServer:
        return RowServer(connection, self._maps, self.devices[1].line, _failed, STALL_S)

    def on_gateway(self, connection: FrameConnection) -> RowServer:
        line, routes = self.devices[0].line, self._routes.connect()
        return RowServer(connection, self._maps, line, _failed, STALL_S, routes, self._on_lost)

    def _on_lost(self, map_index: int) -> NoReturn:
        self.lost.append(map_index)
        raise RankDied("rank 1 gave no answer")


def _failed(code: int) -> NoReturn:
    raise RankDied(f"driver error {code}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 127 maps, so that numbers of two msgpack lengths occur."""
    return build_checkpoint(tmp_path_factory.mktemp("model"), num_layers=33)


@pytest.fixture(params=[0, 400], autouse=True)
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep at once, as where cores are few, and after a while."""
    monkeypatch.setattr(row_server, "looks_before_sleep", lambda: request.param)


@pytest.fixture(autouse=True)
def sizes_of_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_server, "most_line_rows", lambda _: SIZES[-1])


@contextmanager
def served(model: Path) -> Iterator[tuple[LocalServer, TwoRanks]]:
    made: list[TwoRanks] = []

    def new(stages: list[Stage], connection: FrameConnection) -> RowServer:
        if not made:
            made.append(TwoRanks(stages, Checkpoint.open(model).spec))
        return made[0].on_gateway(connection)

    compile_loop()
    with local_server(model, 2, new_row_server=new, stall_timeout_s=STALL_S) as server:
        with raw_client(server.gateway.port) as client:  # makes the ranks
            _ask(server, client, 0)
            client.send(message_frame(Ping()))
            assert client.answer()[0] == MessageType.PONG
        yield server, made[0]
        made[0].port.close()


def _ask(server: LocalServer, client: RawClient, map_index: int, rows: int = 1) -> None:
    payload = linear_bytes(server.bundle, map_index, rows)
    got = ask_linear(client.frames, map_index, rows, payload)
    np.testing.assert_array_equal(got, expected(server, map_index, payload))


def _maps_of(ranks: TwoRanks, rank: int) -> list[int]:
    return sorted(ranks.devices[rank]._stage._maps)


def test_every_map_goes_to_its_owner(model: Path) -> None:
    with served(model) as (server, ranks), raw_client(server.gateway.port) as client:
        _ask(server, client, 0)
        before = [len(device.launched) for device in ranks.devices]
        for map_index in range(len(server.bundle.spec.maps)):
            _ask(server, client, map_index, 1 + map_index % SIZES[-1])
        for rank, device in enumerate(ranks.devices):
            assert device.launched[before[rank] :] == _maps_of(ranks, rank)
            assert len(device.launched) > 60


def test_more_rows_than_are_recorded_go_through_the_session(model: Path) -> None:
    with served(model) as (server, ranks), raw_client(server.gateway.port) as client:
        far = _maps_of(ranks, 1)[0]
        _ask(server, client, far)
        before = len(ranks.devices[1].launched)
        for rows in (SIZES[-1] + 1, 70):
            _ask(server, client, far, rows)
        assert len(ranks.devices[1].launched) == before
        _ask(server, client, far)  # through the session, which then knows that few rows come
        _ask(server, client, far, SIZES[-1])
        assert len(ranks.devices[1].launched) == before + 1


def test_clients_at_once_get_their_own_answers(model: Path) -> None:
    with served(model) as (server, _):
        failures: list[BaseException] = []

        def ask_many(first: int) -> None:
            try:
                with raw_client(server.gateway.port) as client:
                    for i in range(40):
                        _ask(server, client, (first + 7 * i) % len(server.bundle.spec.maps))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask_many, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures


def test_what_a_client_leaves_is_closed_on_both_ranks(model: Path) -> None:
    with served(model) as (server, ranks):
        far = _maps_of(ranks, 1)[0]
        with raw_client(server.gateway.port) as client:
            for _ in range(3):
                _ask(server, client, far)
            assert len(ranks.port._sockets) == 1
        assert eventually(lambda: not server.gateway._sockets)
        assert eventually(lambda: not ranks.port._sockets)
        assert not ranks.lost


def test_a_rank_that_is_gone_is_told_to_nobody_as_an_answer(model: Path) -> None:
    with served(model) as (server, ranks), raw_client(server.gateway.port) as client:
        far = _maps_of(ranks, 1)[3]
        _ask(server, client, far)
        _ask(server, client, far)
        ranks.port.close()
        client.send(message_frame(Linear(far, 1), linear_bytes(server.bundle, far, 1)))
        assert client.is_closed_by_server()
        assert ranks.lost == [far]


def test_an_answer_to_another_request_is_none(model: Path) -> None:
    """A rank of another release, say, whose answer would pass for the map's product."""
    with served(model) as (server, ranks), raw_client(server.gateway.port) as client:
        near, far = _maps_of(ranks, 0)[1], _maps_of(ranks, 1)[0]
        routes = ranks._routes.connect()
        ours, theirs = socket.socketpair()
        ours.settimeout(1)
        routes[far] = FrameConnection(ours)
        ranks._routes.connect = lambda: routes  # type: ignore[method-assign]
        _ask(server, client, near)
        request = message_frame(Linear(far, 1), linear_bytes(server.bundle, far, 1))
        client.send(request)
        theirs.settimeout(5)
        received = b""
        while len(received) < len(request):
            received += theirs.recv(1 << 16)
        assert received == request
        linear_map = server.bundle.spec.maps[far]
        wrong = message_frame(
            Result(far + 1, 1), bytes(linear_map.out_features * linear_map.ring_bytes)
        )
        theirs.sendall(wrong)
        assert client.is_closed_by_server()
        assert ranks.lost == [far]
        theirs.close()


def test_a_port_for_rows_serves_nothing_else(model: Path) -> None:
    with served(model) as (_, ranks):
        connection = ranks._routes.connect()[_maps_of(ranks, 1)[0]]
        connection.send(int(MessageType.PING), Ping().header())
        with pytest.raises(ConnectionLost):
            connection.receive_head(5)
