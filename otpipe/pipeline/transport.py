"""The one module in which a tensor crosses from rank to rank.

One process group, made once. Job headers always travel over gloo (a rank that waits for work then
sleeps in the kernel instead of spinning on its GPU). Payloads travel

* ``nccl``: device to device with NCCL send/recv, the CUDA tensor as it is;
* ``gloo``: through host memory, pinned when the device is a GPU.

The two differ in nothing but where the payload tensor lives when it is handed to ``dist.send``.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from otpipe.errors import RankDied, UsageError
from otpipe.pipeline.jobs import EMPTY, HEADER_FIELDS, JobHeader

TransportKind = Literal["gloo", "nccl"]

# A rank may wait for its next job for as long as no client comes. Dead peers are noticed by
# pipeline/liveness.py within seconds, not by this timeout.
IDLE_TIMEOUT = timedelta(days=365)


def choose_transport(device: torch.device, wanted: str = "auto") -> TransportKind:
    """NCCL on CUDA and gloo on CPU, unless the user chose.

    Raises:
        UsageError: NCCL was asked for without a CUDA device.
    """
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if wanted == "nccl" and device.type != "cuda":
        raise UsageError(
            f"--transport nccl needs CUDA devices, and this rank runs on {device}; "
            "use --transport gloo"
        )
    if wanted not in ("gloo", "nccl"):
        raise UsageError(f"--transport is {wanted!r}; use auto, gloo or nccl")
    return "nccl" if wanted == "nccl" else "gloo"


class Transport:
    """Send and receive jobs between ranks.

    Calls for different peers may run in different threads; calls for one peer must not overlap.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, kind: TransportKind):
        """Join the process group; blocks until all ranks have.

        ``MASTER_ADDR`` and ``MASTER_PORT`` come from torchrun.
        """
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.kind = kind
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
            # Without this gloo binds to whatever the host name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if kind == "nccl" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=IDLE_TIMEOUT)
        if kind == "nccl":
            # Creates the communicator now, so that a broken fabric shows before "ready".
            probe = torch.ones(1, device=device)
            dist.all_reduce(probe)
            if int(probe.item()) != world_size:
                raise RankDied(
                    f"NCCL summed {probe.item()} over {world_size} ranks; check the GPU links, "
                    "or start with --transport gloo"
                )
        else:
            dist.barrier()

    @property
    def store(self) -> dist.Store:
        """The rendezvous store, for start-up facts that are strings."""
        return dist.distributed_c10d._get_default_store()

    def send(self, peer: int, header: JobHeader, payload: Tensor = EMPTY) -> None:
        """Send one job or answer to ``peer``. ``payload`` is uint8 (bytes,), on any device.

        Raises:
            RankDied: the peer is gone.
        """
        try:
            dist.send(header.to_tensor(payload.numel()), peer)
            if payload.numel():
                dist.send(self._outgoing(payload), peer)
        except RuntimeError as error:
            raise RankDied(f"rank {peer} took no job: {error}") from error

    def receive(self, peer: int) -> tuple[JobHeader, Tensor]:
        """Wait for a job or answer of ``peer``; the payload is uint8 (bytes,).

        Raises:
            RankDied: the peer is gone.
        """
        row = torch.empty(HEADER_FIELDS, dtype=torch.int64)
        try:
            dist.recv(row, peer)
            header = JobHeader.from_tensor(row)
            if not header.payload_bytes:
                return header, EMPTY
            payload = self._buffer(header.payload_bytes)
            dist.recv(payload, peer)
        except RuntimeError as error:
            raise RankDied(f"rank {peer} sent no answer: {error}") from error
        return header, payload

    def _outgoing(self, payload: Tensor) -> Tensor:
        if self.kind == "nccl":
            return payload.to(self.device)
        if payload.device.type == "cpu":
            return payload
        host = self._buffer(payload.numel())
        host.copy_(payload)  # one device-to-host copy into pinned memory
        return host

    def _buffer(self, num_bytes: int) -> Tensor:
        if self.kind == "nccl":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
