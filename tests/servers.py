"""Servers for tests: inside the test's own process (fast), or real ones under torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from otpipe.model.bundle import ModelBundle, PublicMap, read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.pipeline.placement import Placement
from otpipe.pipeline.stage import Stage
from otpipe.protocol.messages import max_linear_rows
from otpipe.protocol.wire import FrameConnection
from otpipe.server.gateway import Gateway, ListenOptions
from otpipe.server.lanes import Lane
from otpipe.server.row_server import RowServer
from otpipe.server.service import Audit, Service

SAMPLE = Path(__file__).parent.parent / "otpipe" / "sample"


@dataclass
class LocalServer:
    """A gateway whose ranks live in this process, each with its own stage and lane."""

    gateway: Gateway
    bundle: ModelBundle
    stages: list[Stage]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"


@contextmanager
def local_server(
    model_dir: Path,
    world_size: int = 1,
    audit: Audit | None = None,
    new_row_server: Callable[[list[Stage], FrameConnection], RowServer] | None = None,
    **options: object,
) -> Iterator[LocalServer]:
    """Serve ``model_dir`` from this process with ``world_size`` stages."""
    checkpoint = Checkpoint.open(model_dir)
    placement = Placement.for_model(checkpoint.spec, world_size)
    device = torch.device("cpu")
    stages, lanes, public = [], [], {}
    max_rows = [
        max_linear_rows(m.in_features, m.out_features, m.ring_bytes) for m in checkpoint.spec.maps
    ]
    for rank in range(world_size):
        maps = checkpoint.load_maps(placement.maps_of(rank), device)
        public.update({index: PublicMap.of(loaded) for index, loaded in maps.items()})
        stages.append(Stage(maps, checkpoint.spec.maps, device))
        lanes.append(Lane(rank, stages[-1].handle, max_rows))
    bundle = ModelBundle(
        checkpoint.spec,
        checkpoint.load_norms(),
        tuple(public[m.index] for m in checkpoint.spec.maps),
        read_public_files(model_dir),
    )
    listen = ListenOptions(port=0, **options)  # type: ignore[arg-type]
    row_server = None if new_row_server is None else partial(new_row_server, stages)
    service = Service(bundle, placement, lanes, audit, new_row_server=row_server)
    gateway = Gateway(service, listen)
    gateway.start()
    try:
        yield LocalServer(gateway, bundle, stages)
    finally:
        gateway.close()


@dataclass
class TorchrunServer:
    """A real server: torchrun and one process a rank."""

    process: subprocess.Popen[str]
    address: str
    log: list[str] = field(default_factory=list)

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def log_text(self) -> str:
        return "".join(self.log)

    def rank_pids(self) -> dict[int, int]:
        """Process number of every rank."""
        pids = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            ranks = [e[5:] for e in environment if e.startswith(b"RANK=")]
            if ranks and parent == self.process.pid:
                pids[int(ranks[0])] = int(entry.name)
        return pids


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OTPIPE_STORE": ""}


def start_torchrun(model: str | Path, world_size: int, *args: str) -> subprocess.Popen[str]:
    """Start ``python -m torch.distributed.run`` with otpipe.serve; does not wait."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={world_size}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=127.0.0.1:0",
            "-m",
            "otpipe.serve",
            f"--model={model}",
            "--weights=public",
            "--device=cpu",
            "--threads=1",
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
    )


@contextmanager
def torchrun_server(
    model: str | Path, world_size: int, *args: str, ready_timeout_s: float = 120.0
) -> Iterator[TorchrunServer]:
    """Start a real server on a free port and stop it at the end."""
    process = start_torchrun(model, world_size, "--port=0", *args)
    server = TorchrunServer(process, "")
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line)
            found = re.match(r"otpipe: ready on (\S+)$", line.strip())
            if found:
                server.address = found.group(1)
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        deadline = time.monotonic() + ready_timeout_s
        while not ready.wait(0.1):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{server.log_text()}")
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
