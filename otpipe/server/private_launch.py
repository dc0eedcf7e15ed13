"""From a rank that has joined the others to one that serves private weights."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import msgpack
import torch
import torch.distributed as dist

from otpipe.errors import RankDied
from otpipe.model.bundle import read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.private_bundle import PrivateBundle, new_fingerprint
from otpipe.model.private_description import PrivateDescription
from otpipe.model.private_weights import PrivateWeights, load_private_maps
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.pipeline.transport import Transport
from otpipe.protocol.wire import FrameConnection
from otpipe.server.gateway import Gateway, Listener, ListenOptions
from otpipe.server.private_gateway import PrivateClientSession, PrivateService
from otpipe.server.private_port import TOKEN_BYTES, RankPort, connect_rank
from otpipe.server.private_rank import PrivateRank
from otpipe.server.private_session import RankSession
from otpipe.server.service import Audit

log = logging.getLogger("otpipe.serve")

_KEY = "otpipe/private/"
_FOR_EVER = timedelta(days=365)
"""A rank may load for long; liveness notices one that dies meanwhile."""


@dataclass(frozen=True)
class PrivatePlan:
    """What a rank needs to serve private weights, once it has joined the others.

    Attributes:
        on_rank_died: told when another rank is gone.
        on_device_lost: told when the device fails.
        at_end: takes what is to be called on the way out.
        say: prints one sentence about this rank.
    """

    checkpoint: Checkpoint
    placement: Placement
    device: torch.device
    transport: Transport
    listen: ListenOptions
    listener: Listener | None
    audit: Audit | None
    progress: Callable[[int], None]
    on_rank_died: Callable[[RankDied], None]
    on_device_lost: Callable[[Exception], None]
    at_end: Callable[[Callable[[], None]], None]
    say: Callable[[str], None]


def serve_private(plan: PrivatePlan) -> None:
    """Load this rank's maps, agree with the others, and serve in background threads.

    Raises:
        OtpipeError: this rank cannot serve; the message says why.
    """
    transport, store = plan.transport, plan.transport.store
    weights = load_private_maps(
        plan.checkpoint, plan.placement.maps_of(transport.rank), plan.device, plan.progress
    )
    description = _agree(plan, store, weights)
    rank = PrivateRank(
        transport.rank,
        description,
        weights,
        plan.placement,
        plan.device,
        transport.hand_over,
        plan.on_device_lost,
        plan.audit,
    )
    plan.say(
        f"holds {len(weights)} of {len(description.maps)} maps, "
        f"{rank.weight_bytes / 1e6:.1f} MB of private int8 weights on {plan.device}"
    )
    for peer in sorted(rank.predecessors):
        receive = partial(_take_over, transport, peer, rank, plan.on_rank_died)
        threading.Thread(target=receive, name=f"shares of rank {peer}", daemon=True).start()
    token = _agree_on_token(transport.rank, store)
    if plan.listener is None:
        _open_port(plan, rank, store, token)
    else:
        _open_gateway(plan, plan.listener, rank, store, token)


def _agree(
    plan: PrivatePlan, store: dist.Store, weights: dict[int, PrivateWeights]
) -> PrivateDescription:
    """Every rank tells its public scales; every rank learns those of all."""
    own = {index: each.exponents for index, each in weights.items()}
    store.set(f"{_KEY}scales/{plan.transport.rank}", msgpack.packb(own))
    exponents: dict[int, tuple[int, ...]] = {}
    for rank in range(plan.transport.world_size):
        told = msgpack.unpackb(_get(store, f"{_KEY}scales/{rank}"), strict_map_key=False)
        exponents.update({index: tuple(each) for index, each in told.items()})
    return PrivateDescription.of(plan.checkpoint.spec, exponents)


def _agree_on_token(rank: int, store: dist.Store) -> bytes:
    """32 bytes that the ranks of this start know, and nobody who came by later."""
    if rank == GATEWAY_RANK:
        store.set(f"{_KEY}token", os.urandom(TOKEN_BYTES).hex())
    return bytes.fromhex(_get(store, f"{_KEY}token").decode())


def _get(store: dist.Store, key: str) -> bytes:
    store.wait([key], _FOR_EVER)
    return bytes(store.get(key))


def _take_over(
    transport: Transport, peer: int, rank: PrivateRank, on_rank_died: Callable[[RankDied], None]
) -> None:
    try:
        transport.take_over(peer, rank.deliver)
    except RankDied as error:
        on_rank_died(error)
    except Exception as error:
        # Without this thread every pass would wait in vain for shares of that rank.
        log.exception("rank %d could not take a share of rank %d", rank.rank, peer)
        on_rank_died(RankDied(f"rank {rank.rank} died: {error!r}"))


def _open_port(plan: PrivatePlan, rank: PrivateRank, store: dist.Store, token: bytes) -> None:
    def serve(connection: FrameConnection) -> None:
        RankSession(connection, rank, plan.listen.idle_timeout_s).run()

    port = RankPort(token, serve, plan.listen.stall_timeout_s)
    plan.at_end(port.close)
    store.set(f"{_KEY}address/{rank.rank}", port.address)


def _open_gateway(
    plan: PrivatePlan, listener: Listener, rank: PrivateRank, store: dist.Store, token: bytes
) -> None:
    addresses = {
        peer: _get(store, f"{_KEY}address/{peer}").decode()
        for peer in range(1, plan.transport.world_size)
    }
    bundle = PrivateBundle(
        new_fingerprint(), rank.description, read_public_files(plan.checkpoint.directory)
    )
    service = PrivateService(
        bundle,
        plan.transport.world_size,
        rank,
        lambda peer: connect_rank(addresses[peer], token),
    )

    def serve(connection: FrameConnection, idle_timeout_s: float) -> None:
        PrivateClientSession(connection, service, idle_timeout_s).run()

    gateway = Gateway(serve, plan.listen, listener)
    plan.at_end(gateway.close)
    gateway.start()
    print(f"otpipe: ready on {gateway.address}", flush=True)
