"""From options to a serving rank: load, join, describe, listen."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgpack
import torch

from otpipe.errors import RankDied, UsageError
from otpipe.model.bundle import ModelBundle, PublicMap, read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.jobs import EMPTY, JobHeader, Op
from otpipe.pipeline.liveness import LivenessMonitor
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.pipeline.stage import Stage
from otpipe.pipeline.transport import Transport, choose_transport
from otpipe.server.gateway import Gateway, ListenOptions
from otpipe.server.lanes import Lane
from otpipe.server.service import Audit, Service

EXIT_RANK_DIED = 70
PROGRESS_PERIOD_S = 2.0

Ask = Callable[[int, str], None]
"""Ask this process to end with an exit code and a sentence."""


@dataclass(frozen=True)
class RankOptions:
    """What one rank is started with."""

    model_dir: Path
    rank: int
    local_rank: int
    world_size: int
    device: str
    transport: str
    threads: int | None
    audit: bool
    listen: ListenOptions


def serve_rank(options: RankOptions, ask: Ask) -> Callable[[], None]:
    """Bring this rank up and serve in background threads.

    Args:
        ask: called from any thread when the rank has to end.

    Returns:
        What to call on the way out.

    Raises:
        OtpipeError: the rank cannot serve; the message says why.
    """
    device = choose_device(options.device, options.local_rank)
    if options.threads or device.type == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    kind = choose_transport(device, options.transport)
    checkpoint = Checkpoint.open(
        options.model_dir
    )  # every shape is checked before anything is loaded
    placement = Placement.for_model(checkpoint.spec, options.world_size)
    maps = checkpoint.load_maps(
        placement.maps_of(options.rank), device, _LoadingProgress(options.rank)
    )
    stage = Stage(maps, checkpoint.spec.maps, device)
    _say(
        options.rank,
        f"holds {len(maps)} of {len(checkpoint.spec.maps)} maps, "
        f"{stage.weight_bytes / 1e6:.1f} MB of int8 weights on {device}",
    )
    transport = Transport(options.rank, options.world_size, device, kind)
    liveness = LivenessMonitor(lambda _rank, sentence: ask(EXIT_RANK_DIED, sentence))
    liveness.start(options.rank, options.world_size, transport.store, os.getpid())
    if options.rank != GATEWAY_RANK:
        _start_worker(stage, transport, ask)
        return liveness.close
    return _start_gateway(options, checkpoint, placement, stage, transport, liveness)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The one device of this process, made current.

    Raises:
        UsageError: CUDA was asked for and is missing, or there are fewer devices than ranks.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    count = torch.cuda.device_count()
    # Several ranks may share a device (gloo only); NCCL itself refuses that with a clear message.
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def _start_worker(stage: Stage, transport: Transport, ask: Ask) -> None:
    def run() -> None:
        try:
            transport.serve(GATEWAY_RANK, stage.handle)
            ask(0, "")
        except RankDied:
            # The liveness monitor names the dead rank; give it time to speak first.
            time.sleep(1.0)
            ask(EXIT_RANK_DIED, "the gateway rank is gone")

    threading.Thread(target=run, name="worker", daemon=True).start()


def _start_gateway(
    options: RankOptions,
    checkpoint: Checkpoint,
    placement: Placement,
    stage: Stage,
    transport: Transport,
    liveness: LivenessMonitor,
) -> Callable[[], None]:
    lanes = [
        Lane(rank, stage.handle if rank == GATEWAY_RANK else partial(transport.call, rank))
        for rank in range(placement.world_size)
    ]
    audit = Audit() if options.audit else None
    service = Service(_assemble_bundle(checkpoint, lanes), placement, lanes, audit)
    gateway = Gateway(service, options.listen)
    gateway.start()
    print(f"otpipe: ready on {options.listen.host}:{gateway.port}", flush=True)

    def end() -> None:
        gateway.close()
        if audit is not None:
            _say(GATEWAY_RANK, audit.line())
        liveness.close()

    return end


def _assemble_bundle(checkpoint: Checkpoint, lanes: list[Lane]) -> ModelBundle:
    """Collect every rank's public facts; the bundle's fingerprint covers all weights."""
    public: dict[int, PublicMap] = {}
    for lane in lanes:
        _, encoded = lane.call(JobHeader(Op.DESCRIBE), EMPTY)
        described = msgpack.unpackb(bytes(encoded.cpu().numpy()), strict_map_key=False)
        for index, message in described.items():
            public[index] = PublicMap.from_message(message, checkpoint.spec.maps[index])
    return ModelBundle(
        spec=checkpoint.spec,
        norms=checkpoint.load_norms(),
        maps=tuple(public[linear_map.index] for linear_map in checkpoint.spec.maps),
        files=read_public_files(checkpoint.directory),
    )


class _LoadingProgress:
    """Prints how far a rank's loading is, at most every two seconds."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._loaded_bytes = 0
        self._next_s = time.monotonic() + PROGRESS_PERIOD_S

    def __call__(self, num_bytes: int) -> None:
        self._loaded_bytes += num_bytes
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_PERIOD_S
            _say(self._rank, f"read {self._loaded_bytes / 1e9:.2f} GB of the checkpoint")


def _say(rank: int, sentence: str) -> None:
    print(f"otpipe: rank {rank} {sentence}", file=sys.stderr, flush=True)
