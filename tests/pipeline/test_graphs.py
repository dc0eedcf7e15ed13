"""Recorded products against the same ones launched one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import build_checkpoint
from torch import Tensor

from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.graphs import RECORDED_ROWS
from otpipe.pipeline.stage import Stage

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Stage]:
    """The same maps on the CPU and on CUDA, warmed up."""
    directory = build_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=56, num_heads=7)
    checkpoint = Checkpoint.open(directory)
    indices = tuple(m.index for m in checkpoint.spec.maps)
    cpu, cuda = (
        Stage(checkpoint.load_maps(indices, device), checkpoint.spec.maps, torch.device(device))
        for device in ("cpu", "cuda")
    )
    cuda.warm_up()
    return cpu, cuda


def _payload(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, RECORDED_ROWS[-1] + 1])
def test_replays_equal_the_cpu(stages: tuple[Stage, Stage], rows: int) -> None:
    """All maps in turn, twice: temporary memory is shared, and results must not be."""
    cpu, cuda = stages
    maps = cpu._linear_maps
    for _ in range(2):
        payloads = [_payload(rows * m.in_features * m.ring_bytes) for m in maps]
        got = [
            cuda.linear(m.index, rows, payload) for m, payload in zip(maps, payloads, strict=True)
        ]
        for linear_map, payload, result in zip(maps, payloads, got, strict=True):
            want = cpu.linear(linear_map.index, rows, payload)
            assert torch.equal(result.cpu(), want), linear_map.name


def test_a_payload_on_the_device_is_not_replayed(stages: tuple[Stage, Stage]) -> None:
    cpu, cuda = stages
    linear_map = cpu._linear_maps[1]
    payload = _payload(linear_map.in_features * linear_map.ring_bytes)
    result = cuda.linear(1, 1, payload.cuda())
    assert result.is_cuda
    assert torch.equal(result.cpu(), cpu.linear(1, 1, payload))


def test_warm_up_records_every_map(stages: tuple[Stage, Stage]) -> None:
    _, cuda = stages
    assert cuda._graphs is not None
    for rows in range(1, RECORDED_ROWS[-1] + 1):
        assert all(cuda._graphs.recorded(index, rows) for index in cuda._maps)
    assert not cuda._graphs.recorded(0, RECORDED_ROWS[-1] + 1)
