"""How the gateway reaches the other ranks with masked rows: a port each, a connection a client.

Ports and their token are told through the process group's store when the ranks start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from otpipe.errors import OtpipeError, RankDied
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.protocol.wire import FrameConnection
from otpipe.server.private_port import TOKEN_BYTES, RankPort, connect_rank
from otpipe.server.row_server import RowServer, serve_rank_rows

log = logging.getLogger("otpipe.server")

_KEY = "otpipe/rows/"
_FOR_EVER = timedelta(days=365)
"""A rank may load for long; liveness notices one that dies meanwhile."""


def open_row_port(
    rank: int,
    store: dist.Store,
    new_server: Callable[[FrameConnection], RowServer],
    stall_timeout_s: float,
) -> RankPort:
    """Serve the gateway's rows, in threads.

    Args:
        rank: this one, not the gateway.
        new_server: makes what serves one connection.
        stall_timeout_s: silence inside a frame after which a connection is dropped.
    """
    port = RankPort(_token(rank, store), partial(_serve, new_server), stall_timeout_s)
    store.set(f"{_KEY}address/{rank}", port.address)
    return port


def _serve(new_server: Callable[[FrameConnection], RowServer], connection: FrameConnection) -> None:
    try:
        serve_rank_rows(new_server(connection), connection)
    except RankDied as error:
        log.info("rows are not served any more: %s", error)
    except OtpipeError as error:
        log.info("the gateway's rows have ended: %s", error)


class RowRoutes:
    """The gateway's side: connections to the owners of maps.

    Args:
        store: of the process group; blocks until all ranks have told it their address.
        stall_timeout_s: of the connections.
    """

    def __init__(self, placement: Placement, store: dist.Store, stall_timeout_s: float) -> None:
        self._placement = placement
        self._stall_timeout_s = stall_timeout_s
        self._token = _token(GATEWAY_RANK, store)
        self._addresses = {
            rank: _get(store, f"{_KEY}address/{rank}").decode()
            for rank in range(1, placement.world_size)
        }

    def connect(self) -> dict[int, FrameConnection]:
        """New connections, one a rank, by the maps that it owns.

        Raises:
            RankDied: a rank does not answer.
        """
        connections: dict[int, FrameConnection] = {}
        try:
            for rank, address in self._addresses.items():
                sock = connect_rank(address, self._token)
                connections[rank] = FrameConnection(sock, stall_timeout_s=self._stall_timeout_s)
        except RankDied:
            for connection in connections.values():
                connection.close()
            raise
        return {
            index: connections[rank]
            for rank in connections
            for index in self._placement.maps_of(rank)
        }


def _token(rank: int, store: dist.Store) -> bytes:
    """32 bytes that the ranks of this start know, and nobody who came by later."""
    if rank == GATEWAY_RANK:
        store.set(f"{_KEY}token", os.urandom(TOKEN_BYTES).hex())
    return bytes.fromhex(_get(store, f"{_KEY}token").decode())


def _get(store: dist.Store, key: str) -> bytes:
    store.wait([key], _FOR_EVER)
    return bytes(store.get(key))
