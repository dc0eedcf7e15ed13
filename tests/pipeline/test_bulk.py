"""Products through pinned memory and streams of their own against the same ones on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from checkpoints import build_checkpoint
from torch import Tensor

from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline import stage as stage_module
from otpipe.pipeline.bulk import REQUESTS_AT_ONCE, BulkProducts, pinned_buffer
from otpipe.pipeline.stage import Stage

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Stage]:
    """The same maps on the CPU and on CUDA."""
    directory = build_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=56, num_heads=7)
    checkpoint = Checkpoint.open(directory)
    indices = tuple(m.index for m in checkpoint.spec.maps)
    return tuple(  # type: ignore[return-value]
        Stage(checkpoint.load_maps(indices, device, lambda _: None), checkpoint.spec.maps, device)
        for device in (torch.device("cpu"), torch.device("cuda"))
    )


def _payload(num_bytes: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    payload = pinned_buffer(num_bytes)
    payload.numpy()[:] = generator.integers(0, 256, num_bytes, np.uint8)
    return payload


@pytest.mark.parametrize("rows", [1, 2, 5, 31, 200])
def test_bulk_products_equal_the_cpu(
    rows: int, stages: tuple[Stage, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads at once, more than there are streams; every map several times."""
    monkeypatch.setattr(stage_module, "BULK_BYTES", 1)
    cpu, cuda = stages
    jobs = [
        (m.index, _payload(rows * m.in_features * m.ring_bytes, seed))
        for seed in range(4)
        for m in cpu._linear_maps
    ]
    with ThreadPoolExecutor(3 * REQUESTS_AT_ONCE) as pool:
        answers = list(pool.map(lambda job: cuda.linear(job[0], rows, job[1]), jobs))
    for (map_index, payload), answer in zip(jobs, answers, strict=True):
        assert answer.is_pinned()
        assert torch.equal(answer, cpu.linear(map_index, rows, payload))


def test_a_failed_product_leaves_the_streams_usable() -> None:
    bulk = BulkProducts(torch.device("cuda"))

    def fail(payload: Tensor) -> Tensor:
        raise ValueError("no")

    for _ in range(2 * REQUESTS_AT_ONCE):
        with pytest.raises(ValueError, match="no"):
            bulk.run(fail, pinned_buffer(16))
    payload = _payload(16, 0)
    assert torch.equal(bulk.run(lambda x: x + 1, payload), payload + 1)
