"""Recorded products against the same ones launched one by one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from checkpoints import build_checkpoint
from torch import Tensor

from otpipe.kernels.cpu import kernel
from otpipe.kernels.native_io import call_1, call_2
from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.graphs import LINE_ROWS, NUM_LINES, RECORDED_ROWS, RowLine
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


@kernel
def _replay(launch: int, wait: int, handle: int, stream: int) -> int:
    failed = call_2(launch, handle, stream)
    return failed if failed != 0 else call_1(wait, stream)


def test_lines_replay_side_by_side_and_equal_the_cpu(stages: tuple[Stage, Stage]) -> None:
    """Every map and size; the temporary memory of one line is no other's."""
    cpu, cuda = stages
    lines = cuda.row_lines
    assert len(lines) == NUM_LINES
    payloads = [
        [_payload(rows * m.in_features * m.ring_bytes) for rows in LINE_ROWS]
        for m in cpu._linear_maps
    ]
    wants = [
        [
            cpu.linear(m.index, rows, payloads[m.index][i]).numpy()
            for i, rows in enumerate(LINE_ROWS)
        ]
        for m in cpu._linear_maps
    ]
    failures: list[str] = []

    def replay_all(line: RowLine) -> None:
        torch.cuda.set_device(0)
        for linear_map in cpu._linear_maps:
            for i, rows in enumerate(LINE_ROWS):
                handle = int(line.launches[linear_map.index, i])
                payload, want = payloads[linear_map.index][i], wants[linear_map.index][i]
                line.inputs[: payload.numel()] = payload.numpy()
                failed = _replay(line.launch, line.wait, handle, line.stream)
                if handle == 0 or failed or not np.array_equal(line.outputs[: want.size], want):
                    failures.append(f"{linear_map.name}, {rows} rows: {failed}")

    threads = [threading.Thread(target=replay_all, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
