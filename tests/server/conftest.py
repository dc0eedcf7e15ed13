"""One small server for all tests of this folder that can share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from checkpoints import build_checkpoint
from raw_client import (
    eventually,
)
from served import (
    IDLE_S,
    MAX_CLIENTS,
    STALL_S,
    assert_nothing_is_left,
    assert_serves,
)
from servers import LocalServer, local_server


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    directory = build_checkpoint(tmp_path_factory.mktemp("model"))
    with local_server(
        directory, 2, max_clients=MAX_CLIENTS, stall_timeout_s=STALL_S, idle_timeout_s=IDLE_S
    ) as server:
        yield server


@pytest.fixture
def server(serving: LocalServer) -> Iterator[LocalServer]:
    """The shared server; whatever a test did to it, it must have got over it at the end."""
    assert eventually(lambda: not serving.gateway._sockets), "an earlier client is still there"
    yield serving
    assert_nothing_is_left(serving)
    assert_serves(serving)
