"""Servers of private weights inside the test's own process: every rank a thread's worth of state.

Ranks hand shares to each other by a call; clients reach rank 0 directly and the others through the
gateway's relay and their private ports, as in a real server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otpipe.model.bundle import read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.private_bundle import PrivateBundle, new_fingerprint
from otpipe.model.private_description import PrivateDescription
from otpipe.model.private_weights import PrivateWeights, load_private_maps
from otpipe.pipeline.jobs import JobHeader
from otpipe.pipeline.placement import Placement
from otpipe.protocol.wire import FrameConnection
from otpipe.server.gateway import Gateway, ListenOptions
from otpipe.server.private_gateway import PrivateClientSession, PrivateService
from otpipe.server.private_port import RankPort, connect_rank
from otpipe.server.private_rank import (
    MAX_EXCHANGES_PER_RANK,
    MAX_PASSES_AT_ONCE,
    PrivateRank,
)
from otpipe.server.private_session import RankSession

TOKEN = bytes(range(32))


@dataclass
class PrivateServer:
    """A gateway and its ranks."""

    gateway: Gateway
    bundle: PrivateBundle
    ranks: list[PrivateRank]
    ports: dict[int, RankPort]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    @property
    def weights(self) -> dict[int, PrivateWeights]:
        """Of all ranks, by map."""
        return {index: each for rank in self.ranks for index, each in rank.weights.items()}


def device_lost(error: Exception) -> None:
    raise AssertionError("a CPU does not fail") from error


@contextmanager
def private_server(
    model_dir: Path, world_size: int = 1, *, idle_timeout_s: float = 600.0, **listen: Any
) -> Iterator[PrivateServer]:
    """Serve ``model_dir`` from this process; ``listen``: further fields of ``ListenOptions``."""
    checkpoint = Checkpoint.open(model_dir)
    placement = Placement.for_model(checkpoint.spec, world_size)
    weights = [load_private_maps(checkpoint, placement.maps_of(r)) for r in range(world_size)]
    exponents = {index: each.exponents for own in weights for index, each in own.items()}
    description = PrivateDescription.of(checkpoint.spec, exponents)
    ranks: list[PrivateRank] = []

    def hand_over(peer: int, header: JobHeader, payload: Tensor) -> None:
        ranks[peer].deliver(header, payload)

    for number, own in enumerate(weights):
        cpu = torch.device("cpu")
        ranks.append(PrivateRank(number, description, own, placement, cpu, hand_over, device_lost))

    def serve_rank(rank: PrivateRank, connection: FrameConnection) -> None:
        RankSession(connection, rank, idle_timeout_s).run()

    ports = {
        rank.rank: RankPort(TOKEN, lambda c, rank=rank: serve_rank(rank, c), 10.0)  # type: ignore[misc]
        for rank in ranks[1:]
    }
    bundle = PrivateBundle(new_fingerprint(), description, read_public_files(model_dir))
    service = PrivateService(
        bundle, world_size, ranks[0], lambda peer: connect_rank(ports[peer].address, TOKEN)
    )

    def serve(connection: FrameConnection, idle_timeout_s: float) -> None:
        PrivateClientSession(connection, service, idle_timeout_s).run()

    options = ListenOptions(port=0, idle_timeout_s=idle_timeout_s, **listen)
    gateway = Gateway(serve, options)
    gateway.start()
    try:
        yield PrivateServer(gateway, bundle, ranks, ports)
    finally:
        gateway.close()
        for port in ports.values():
            port.close()


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether ``condition`` comes true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def assert_nothing_is_left(server: PrivateServer) -> None:
    """All connections are closed, no rank holds anything of a session, and all turns are free."""
    assert eventually(lambda: not server.gateway._sockets), "a connection is still open"
    for port in server.ports.values():
        assert eventually(lambda port=port: not port._sockets), "a relayed one is"  # type: ignore[misc]
    for rank in server.ranks:
        assert eventually(lambda rank=rank: not rank.mailbox._open)  # type: ignore[misc]
        assert rank.ole_turns.free == MAX_EXCHANGES_PER_RANK
        assert eventually(lambda rank=rank: not rank.product_memory.held_bytes)  # type: ignore[misc]
        assert rank.pass_turns.free == MAX_PASSES_AT_ONCE
        assert not rank.ole_turns.waiting
        assert not rank.pass_turns.waiting
