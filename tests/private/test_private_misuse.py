"""A message lost, doubled, reordered, cut or of another phase: a clear end on both sides, always.

On the connection of each rank, in each direction, and in each phase: setup, preparation of
attention products, and passes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from private_servers import PrivateServer, assert_nothing_is_left
from tampering import (
    Frame,
    Plan,
    Tamper,
    TamperingProxy,
    double,
    lengthen,
    lose,
    other_phase,
    relabel,
    reorder,
    tampering_proxy,
    truncate,
)

from otpipe import Client
from otpipe.client import private_products as client_products
from otpipe.client import private_session as client_session
from otpipe.errors import OtpipeError
from otpipe.protocol.messages import MessageType
from otpipe.server import private_session as server_session

CLEAR = (
    r"out of step|are due|due are|is due|was due|were due|arrived where|sent nothing for|"
    r"not a request|inside a session|the peer closed the connection|before PASS_DONE|"
    r"the connection broke|"
    r"ended the session|are prepared for|made ready"
)
"""Every end names what came and what should have come, or that the other side is gone."""


@pytest.fixture
def proxy(
    private_serving: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TamperingProxy]:
    monkeypatch.setattr(server_session, "SILENCE_S", 2.0)
    monkeypatch.setattr(client_session, "SILENCE_S", 3.0)
    monkeypatch.setattr(client_products, "QUEUE_TIMEOUT_S", 3.0)
    with tampering_proxy(private_serving.address) as proxy:
        yield proxy


def fails(proxy: TamperingProxy, plan: Plan, store: Path) -> str:
    """The sentence with which a pass ends for the client."""
    proxy.plan = plan
    with Client(proxy.address, store) as client:
        with pytest.raises(OtpipeError) as caught:
            client.forward([5, 9])
        assert plan.done, f"the frame never came by {caught.value!r}"
        mode = client.mode
        assert not mode._session or not mode._session.alive  # type: ignore[attr-defined]
    return str(caught.value)


SETUP, PRODUCTS, PASS = 0, 2, 24
"""Number of the frame of a session, counted in one direction."""

UP, DOWN = True, False


def as_for_another_text(frame: Frame, held: list[Frame]) -> list[Frame]:
    return [replace(frame, header={**frame.header, "first": 16})]


@pytest.mark.parametrize(
    ("rank", "upward", "number", "tamper"),
    [
        (1, UP, PASS, lose),
        (1, UP, PASS, double),
        (1, UP, PASS, reorder),
        (1, UP, PASS, truncate),
        (1, UP, PASS, lengthen),
        (1, UP, PASS, relabel),
        (1, UP, PASS, other_phase),
        (1, DOWN, PASS, double),
        (1, DOWN, PASS, truncate),
        (0, DOWN, PASS, lose),
        (0, UP, PASS, double),
        (1, UP, PRODUCTS, lose),
        (1, UP, PRODUCTS, double),
        (1, UP, PRODUCTS, reorder),
        (1, UP, PRODUCTS, truncate),
        (1, UP, PRODUCTS, relabel),
        (0, UP, PRODUCTS, lengthen),
        (0, UP, PRODUCTS, other_phase),
        (1, DOWN, PRODUCTS, lose),
        (1, DOWN, PRODUCTS, double),
        (0, DOWN, PRODUCTS, truncate),
        (0, DOWN, PRODUCTS, relabel),
        (0, UP, SETUP, truncate),
        (0, DOWN, SETUP, lengthen),
        (1, DOWN, SETUP, relabel),
        (1, UP, SETUP, other_phase),
    ],
)
def test_one_wrong_message_ends_the_session(
    proxy: TamperingProxy,
    private_serving: PrivateServer,
    private_store: Path,
    caplog: pytest.LogCaptureFixture,
    rank: int,
    upward: bool,
    number: int,
    tamper: Tamper,
) -> None:
    assert_a_clear_end(
        proxy, private_serving, private_store, caplog, Plan(rank, upward, number, tamper)
    )


@pytest.mark.parametrize(
    ("rank", "upward", "tamper", "type_"),
    [
        (0, UP, lose, MessageType.PREPARE),
        (1, UP, double, MessageType.PREPARE),
        (1, UP, as_for_another_text, MessageType.PREPARE),
        (0, DOWN, double, MessageType.PREPARE_READY),
        (1, DOWN, as_for_another_text, MessageType.PREPARE_READY),
    ],
)
def test_a_wrong_begin_of_a_preparation_ends_the_session(
    proxy: TamperingProxy,
    private_serving: PrivateServer,
    private_store: Path,
    caplog: pytest.LogCaptureFixture,
    rank: int,
    upward: bool,
    tamper: Tamper,
    type_: MessageType,
) -> None:
    plan = Plan(rank, upward, 0, tamper, type_)
    assert_a_clear_end(proxy, private_serving, private_store, caplog, plan)


def assert_a_clear_end(
    proxy: TamperingProxy,
    private_serving: PrivateServer,
    private_store: Path,
    caplog: pytest.LogCaptureFixture,
    plan: Plan,
) -> None:
    """For the client and for the server, which then holds nothing of it."""
    with caplog.at_level(logging.INFO):
        sentence = fails(proxy, plan, private_store)
        assert re.search(CLEAR, sentence), sentence
        assert_nothing_is_left(private_serving)
    said = [r for r in caplog.records if r.name == "otpipe.server"]
    ends = [r.getMessage() for r in said if re.search(CLEAR, r.getMessage())]
    assert ends, [r.getMessage() for r in said]
    assert all(r.exc_info is None for r in said), "an internal error"
