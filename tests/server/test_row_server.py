"""The compiled loop for single rows, with a device that is a function of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_checkpoint
from fake_device import FakeDevice
from raw_client import RawClient, ask_linear, eventually, linear_bytes, message_frame, raw_client
from served import DOWN, QKV, expected
from servers import LocalServer, local_server

from otpipe.errors import RankDied
from otpipe.pipeline.stage import Stage
from otpipe.protocol.messages import Linear, MessageType, Ping
from otpipe.protocol.wire import FrameConnection
from otpipe.server import row_server
from otpipe.server.row_loop import compile_loop
from otpipe.server.row_server import RowServer


@pytest.fixture(params=[0, 400], autouse=True)
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep at once, as where cores are few, and after a while."""
    monkeypatch.setattr(row_server, "looks_before_sleep", lambda: request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 127 maps, so that numbers of two msgpack lengths occur."""
    return build_checkpoint(tmp_path_factory.mktemp("model"), num_layers=33)


@contextmanager
def served(
    model: Path, **device_options: tuple[int, ...]
) -> Iterator[tuple[LocalServer, FakeDevice]]:
    devices: list[FakeDevice] = []

    def failed(code: int) -> None:
        raise RankDied(f"driver error {code}")

    def new(stages: list[Stage], connection: FrameConnection) -> RowServer:
        if not devices:
            devices.append(FakeDevice(stages[0], **device_options))
        maps = stages[0]._linear_maps
        return RowServer(connection, maps, devices[0].line, failed, 0.5)

    compile_loop()
    with local_server(model, new_row_server=new, stall_timeout_s=0.5, idle_timeout_s=1.0) as server:
        with raw_client(server.gateway.port) as client:  # makes the device
            _ask(server, client, QKV)
            client.send(message_frame(Ping()))
            assert client.answer()[0] == MessageType.PONG
        yield server, devices[0]


def _ask(server: LocalServer, client: RawClient, map_index: int, rows: int = 1) -> None:
    payload = linear_bytes(server.bundle, map_index, rows)
    got = ask_linear(client.frames, map_index, rows, payload)
    np.testing.assert_array_equal(got, expected(server, map_index, payload))


def test_every_map_and_whatever_comes_between(model: Path) -> None:
    with served(model) as (server, device), raw_client(server.gateway.port) as client:
        num_maps = len(server.bundle.spec.maps)
        assert num_maps > 128
        for map_index in range(num_maps):
            _ask(server, client, map_index)
        # The first goes through the session, which then knows that single rows come.
        assert device.launched[-(num_maps - 1) :] == list(range(1, num_maps))
        before = len(device.launched)
        for rows in (1, 2, 3, 4, 1):
            _ask(server, client, DOWN, rows)
        assert len(device.launched) - before == 5
        _ask(server, client, DOWN, rows=5)
        assert len(device.launched) - before == 5
        _ask(server, client, DOWN, rows=70)
        _ask(server, client, DOWN)
        client.send(message_frame(Ping()))
        assert client.answer()[0] == MessageType.PONG
        _ask(server, client, QKV)
        _ask(server, client, 0)
        assert device.launched[-1] == 0


def test_a_map_that_the_device_does_not_hold_goes_to_the_session(model: Path) -> None:
    with served(model, missing=(DOWN,)) as (server, device), raw_client(server.gateway.port) as c:
        for map_index in (QKV, QKV, DOWN, DOWN, QKV, QKV):
            _ask(server, c, map_index)
        assert DOWN not in device.launched


def test_heads_and_payloads_in_pieces(model: Path) -> None:
    with served(model) as (server, device), raw_client(server.gateway.port) as client:
        _ask(server, client, QKV)
        before = len(device.launched)
        payload = linear_bytes(server.bundle, QKV, 1)
        whole = message_frame(Linear(QKV, 1), payload)
        for cut in (1, 7, 15, 16, 20, 40, 41, len(whole) - 1):
            client.send(whole[:cut])
            time.sleep(0.02)
            client.send(whole[cut:])
            assert client.answer()[0] == MessageType.RESULT
        assert len(device.launched) - before == 8


def test_two_frames_at_once_are_both_answered(model: Path) -> None:
    with served(model) as (server, _), raw_client(server.gateway.port) as client:
        _ask(server, client, QKV)
        whole = message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1))
        client.send(whole + whole)
        for _ in range(2):
            assert client.answer()[0] == MessageType.RESULT
        _ask(server, client, DOWN)


@pytest.mark.parametrize(
    ("message", "lies", "sentence"),
    [
        (Linear(QKV, 1), {"payload_bytes": 4}, "a payload of 4 bytes was announced where"),
        (Linear(10_000, 1), {}, "map 10000 was asked for"),
        (Linear(QKV, 0), {}, "0 rows were sent"),
    ],
)
def test_a_bad_row_is_refused_with_a_sentence(
    model: Path, message: Linear, lies: dict[str, int], sentence: str
) -> None:
    with served(model) as (server, device), raw_client(server.gateway.port) as client:
        _ask(server, client, QKV)
        before = len(device.launched)
        client.send(message_frame(message, bytes(8), **lies))
        assert sentence in client.refusal()
        assert len(device.launched) == before


def test_an_index_in_more_bytes_than_it_needs_is_left_to_the_parser(model: Path) -> None:
    """0xcd 0x00 0x01 is 1 as well; msgpack reads it, so it is answered all the same."""
    with served(model) as (server, device), raw_client(server.gateway.port) as client:
        _ask(server, client, QKV)
        before = len(device.launched)
        payload = linear_bytes(server.bundle, QKV, 1)
        whole = message_frame(Linear(QKV, 1), payload)
        head = whole[: len(whole) - len(payload)]
        longer = head.replace(b"map_index\x01", b"map_index\xcd\x00\x01")
        assert len(longer) == len(head) + 2
        longer = longer[:8] + (len(longer) - 16).to_bytes(4, "little") + longer[12:]
        client.send(longer + payload)
        assert client.answer()[0] == MessageType.RESULT
        assert len(device.launched) == before


def test_silence_inside_a_frame_and_between_frames_ends_the_connection(model: Path) -> None:
    with served(model) as (server, _):
        for piece in (b"", message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1))[:60]):
            with raw_client(server.gateway.port) as client:
                _ask(server, client, QKV)
                _ask(server, client, QKV)
                client.send(piece)
                started_s = time.monotonic()
                assert client.is_closed_by_server()
                assert time.monotonic() - started_s < 4
        assert eventually(lambda: not server.gateway._sockets)


def test_a_client_that_leaves_takes_nothing_with_it(model: Path) -> None:
    with served(model) as (server, _):
        for piece in (b"", message_frame(Linear(QKV, 1), bytes(60))[:70]):
            with raw_client(server.gateway.port) as client:
                _ask(server, client, QKV)
                _ask(server, client, QKV)
                client.send(piece)
        assert eventually(lambda: not server.gateway._sockets)


def test_connections_share_a_line_one_at_a_time(model: Path) -> None:
    with served(model) as (server, device):
        failures: list[BaseException] = []

        def ask_many() -> None:
            try:
                with raw_client(server.gateway.port) as client:
                    for map_index in range(1, 40):
                        _ask(server, client, map_index)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert device.most_at_once == 1
        assert len(device.launched) >= 4 * 38


def test_a_failed_device_is_told_to_nobody_as_an_answer(model: Path) -> None:
    with served(model) as (server, device), raw_client(server.gateway.port) as client:
        _ask(server, client, QKV)
        _ask(server, client, QKV)
        device.broken = True
        client.send(message_frame(Linear(QKV, 1), linear_bytes(server.bundle, QKV, 1)))
        assert client.is_closed_by_server()
