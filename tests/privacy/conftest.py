"""One server for the recorded clients of this folder: a model that makes hiding hard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import build_checkpoint
from servers import LocalServer, local_server
from traffic_runs import STREAMS

from otpipe.client import row_streams

HARD_TOKENS = (2, 71, 8, 28, 18, 28, 45, 90, 45, 23, 53, 60, 28)


@pytest.fixture(autouse=True)
def prompts_go_over_several_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the rows of every prompt, though the model is small and the machine may be too."""
    monkeypatch.setattr(row_streams, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(row_streams, "MIN_CHUNK_BYTES", 1)
    real = row_streams.plan_rows
    monkeypatch.setattr(
        row_streams, "plan_rows", lambda spec, num_rows, cores: real(spec, num_rows, STREAMS)
    )


@pytest.fixture(scope="session")
def hard_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of 1e4 beside small ones, and rows long enough for uploads of 7 bytes."""
    return build_checkpoint(
        tmp_path_factory.mktemp("hard_model"),
        intermediate_size=700,
        outlier_tokens=HARD_TOKENS,
        seed=3,
    )


@pytest.fixture(scope="session")
def server(hard_model: Path) -> Iterator[LocalServer]:
    with local_server(hard_model) as serving:
        yield serving
