"""One small model, and one server of it with two ranks, for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import build_checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from private_servers import PrivateServer, private_server

from otpipe import Client


@pytest.fixture(scope="session", autouse=True)
def quick_threads() -> Iterator[None]:
    """Client and ranks are threads of one process here: let them take turns more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="session")
def private_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers: they divide by no number of ranks but one, so the head is on rank 0."""
    return build_checkpoint(
        tmp_path_factory.mktemp("private"),
        num_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        vocab_size=67,
    )


@pytest.fixture(scope="session")
def private_serving(private_model: Path) -> Iterator[PrivateServer]:
    with private_server(private_model, 2) as server:
        yield server


@pytest.fixture(scope="session")
def private_store(private_serving: PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slots for all tests that use the shared server."""
    store = tmp_path_factory.mktemp("pads")
    with Client(private_serving.address, store) as client:
        client.prepare(512)
    return store
