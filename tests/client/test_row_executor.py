"""The decode step's direct exchange where the peer does anything but answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_checkpoint
from servers import LocalServer, local_server

from otpipe import Client
from otpipe.client import row_exchange, store_rows
from otpipe.client.store_files import SlotDamaged
from otpipe.client.store_layout import MapShape
from otpipe.client.store_lease import PadReuseError
from otpipe.client.store_rows import SpanReader
from otpipe.errors import ServerRefused
from otpipe.kernels.native_io import INTERRUPTED, TIMED_OUT
from otpipe.server.lanes import Lane

PROMPT = [5, 6, 7]
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    with local_server(model) as serving:
        yield serving


@pytest.fixture
def client(server: LocalServer, tmp_path: Path) -> Iterator[Client]:
    with Client(server.address, tmp_path) as opened:
        opened.prepare(64)
        yield opened


@pytest.fixture
def expected(client: Client) -> list[int]:
    return list(client.generate_ids(PROMPT, NUM_TOKENS))


def test_rows_by_frames_give_the_same(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under TLS, where there are no plain bytes to be had."""
    monkeypatch.setattr(type(client._link), "plain_connection", lambda self: None)
    assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def test_slots_read_call_by_call_give_the_same(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor without AES instructions."""
    monkeypatch.setattr(store_rows, "NATIVE", False)
    assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


@pytest.mark.parametrize("filled", [0, 10])
def test_a_silent_server_is_left_for_a_new_connection(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch, filled: int
) -> None:
    calls = []
    genuine = row_exchange.receive_opened

    def silent_once(*args: object) -> object:
        calls.append(args)
        return (TIMED_OUT, filled) if len(calls) == 4 else genuine(*args)

    monkeypatch.setattr(row_exchange, "receive_opened", silent_once)
    assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def test_a_signal_between_two_pieces_loses_nothing(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    genuine = row_exchange.receive_opened

    def interrupted_first(*args: object) -> object:
        calls.append(args)
        return (INTERRUPTED, 0) if len(calls) % 2 else genuine(*args)

    monkeypatch.setattr(row_exchange, "receive_opened", interrupted_first)
    assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def test_after_ctrl_c_no_later_request_takes_the_answer(
    client: Client, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(row_exchange, "receive_opened", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(client.generate_ids(PROMPT, NUM_TOKENS))
    assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def test_a_refusal_is_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = client.generate_ids(PROMPT, NUM_TOKENS)
    next(tokens)

    def refuse(*args: object) -> None:
        raise ServerRefused("no more for you")

    monkeypatch.setattr(Lane, "linear", refuse)
    with pytest.raises(ServerRefused, match="no more for you"):
        list(tokens)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_reader_gives_what_the_lease_would_have_given_and_once(client: Client, rows: int) -> None:
    store, maps = client.mode.row_executor._store, client.bundle.spec.maps
    first, other = store.draw(rows + 2), store.draw(1)
    reader = first.row_reader(slice(1, rows + 1))
    assert isinstance(reader, SpanReader), "this test needs AES instructions"
    pads, corrections = [reader.first_pads().copy()], []
    for linear_map in maps:
        correction, pad = reader.advance(linear_map.index)
        corrections.append(correction.copy())
        pads.append(pad.copy())
    assert pads.pop().size == 0
    with pytest.raises(PadReuseError):
        first.masks(0, slice(0, 2))
    with pytest.raises(PadReuseError):
        first.corrections(0, slice(0, 2))
    first.masks(0, slice(0, 1))  # not among those that were claimed
    with pytest.raises(IndexError):
        reader.advance(0)
    batch, slot = first.spans[0].batch, first.spans[0].first_slot + 1
    for m, pad, correction in zip(maps, pads, corrections, strict=True):
        np.testing.assert_array_equal(pad, batch.pads(m.index, slot, rows))
        np.testing.assert_array_equal(correction, batch.corrections(m.index, slot, rows))
    late = other.row_reader()
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        late.first_pads()


def test_a_reader_claims_all_maps_or_none(client: Client) -> None:
    with client.mode.row_executor._store.draw(4) as lease:
        lease.corrections(3, slice(2, 3))
        with pytest.raises(PadReuseError, match="correction of map 3, row 2 was already given out"):
            lease.row_reader(slice(1, 4))
        lease.masks(0, slice(1, 4))
        lease.row_reader(slice(0, 1))


def test_tables_are_refused_where_pads_have_gaps_or_the_lease_is_closed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = client.mode.row_executor._store
    with store.draw(1) as lease:
        reader = lease.row_reader()
        assert isinstance(reader, SpanReader), "this test needs AES instructions"
        reader.first_pads()
        assert reader.tables() is not None
        lease.spans[0].batch._tables = None
        monkeypatch.setattr(MapShape, "pad_gap", property(lambda self: 4))
        assert reader.tables() is None
    with pytest.raises(RuntimeError, match="closed"):
        reader.tables()


def test_a_reader_keeps_to_the_order_of_the_maps(client: Client) -> None:
    with client.mode.row_executor._store.draw(1) as lease:
        reader = lease.row_reader()
        reader.first_pads()
        reader.advance(0)
        with pytest.raises(AssertionError):
            reader.advance(0)


def test_a_reader_gives_its_first_pads_once(client: Client) -> None:
    with client.mode.row_executor._store.draw(1) as lease:
        reader = lease.row_reader()
        assert isinstance(reader, SpanReader), "this test needs AES instructions"
        reader.first_pads()
        with pytest.raises(AssertionError, match="once"):
            reader.first_pads()


def test_a_damaged_correction_names_its_row(client: Client) -> None:
    with client.mode.row_executor._store.draw(4) as lease:
        reader = lease.row_reader(slice(1, 4))
        assert isinstance(reader, SpanReader)
        reader.first_pads()
        expected = reader._regions[0].expected
        expected.setflags(write=True)
        expected[lease.spans[0].first_slot + 2] += np.uint64(1)
        with pytest.raises(SlotDamaged, match="checksum differs") as caught:
            reader.advance(0)
        assert caught.value.row == 2
