"""Masked rows from the socket to the device and back in one compiled loop.

A client sends one or a few masked rows after another and waits for each answer. For such frames
nothing is left to decide in Python: the head is checked against the two fields it may have, the
payload against the length that its map calls for, and the product is the launch of what was
recorded. The loop releases the GIL, so connections do not wait for each other's interpreter.

A map of another rank is asked for there, by the same frame over a connection that the gateway keeps
for each client and rank; :func:`serve_rank_rows` is the other end. The payload comes from a socket
and its answer goes back to one, so the rank's own copy to its device is the only one: sent from
device to device it would be three.

Whatever else arrives is handed to the session as it is, which answers or refuses it as always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from otpipe.errors import ConnectionLost, ProtocolError
from otpipe.kernels.native_io import (
    FIRST_READ_BYTES,
    TIMED_OUT,
    looks_before_sleep,
    system_functions,
)
from otpipe.model.spec import LinearMap
from otpipe.pipeline.graphs import RowLine, most_line_rows
from otpipe.protocol.wire import FrameConnection, IdlePeer, StalledPeer
from otpipe.server import row_loop

_LONGEST_WAIT_MS = 2**31 - 1  # poll takes an int


class RowServer:
    """Serves masked rows of one connection. For one thread.

    Args:
        connection: of one client.
        linear_maps: the whole model's table, indexed by map.
        line: the device's side. Several connections may share one.
        on_failure: called with the driver's error when a launch fails; must raise.
        stall_timeout_s: silence inside a frame after which a client is dropped.
        other_ranks: connections to the ranks of the maps that are not held here, by map; not used
            by anybody else while this object is.
        on_rank_lost: called with a map whose rank gave no answer; must raise.
    """

    def __init__(
        self,
        connection: FrameConnection,
        linear_maps: Sequence[LinearMap],
        line: RowLine,
        on_failure: Callable[[int], NoReturn],
        stall_timeout_s: float,
        other_ranks: Mapping[int, FrameConnection] | None = None,
        on_rank_lost: Callable[[int], NoReturn] | None = None,
    ) -> None:
        self._connection = connection
        self._line = line
        self._on_failure = on_failure
        self._stall_timeout_s = stall_timeout_s
        self._other_ranks = other_ranks or {}
        self._on_rank_lost = on_rank_lost
        self._maps = np.array(
            [
                (
                    m.in_features * m.ring_bytes,
                    m.out_features * m.ring_bytes,
                    most_line_rows(m),
                    self._other_ranks[m.index].descriptor if m.index in self._other_ranks else -1,
                )
                for m in linear_maps
            ],
            np.int64,
        )
        # Memory that is never written to is never taken: a client that decodes needs one row's.
        sizes_in = [most_line_rows(m) * m.in_features * m.ring_bytes for m in linear_maps]
        sizes_out = [most_line_rows(m) * m.out_features * m.ring_bytes for m in linear_maps]
        self._frame = np.empty(
            max(FIRST_READ_BYTES, *sizes_in, line.inputs.size) + row_loop.LONGEST_HEAD, np.uint8
        )
        self._answer = np.empty(
            max(*sizes_out, line.outputs.size) + row_loop.LONGEST_HEAD, np.uint8
        )
        self._counts = np.zeros(3, np.int64)

    def run(self, idle_timeout_s: float) -> None:
        """Serve masked rows until the client sends something else, which the connection then has.

        Raises:
            IdlePeer, StalledPeer, ConnectionLost: as the connection's own methods.
            RankDied: the device failed, or another rank.
        """
        line, connection = self._line, self._connection
        self._counts[:] = 0
        why, detail = row_loop.serve_rows(
            system_functions(),
            connection.descriptor,
            row_loop.PATTERN,
            self._maps,
            line.rows,
            line.launches,
            line.launch,
            line.wait,
            line.stream,
            line.mutex,
            line.inputs,
            line.outputs,
            self._frame,
            self._answer,
            min(int(1000 * idle_timeout_s), _LONGEST_WAIT_MS),
            min(int(1000 * self._stall_timeout_s), _LONGEST_WAIT_MS),
            looks_before_sleep(),
            self._counts,
        )
        traffic, (frames, bytes_in, bytes_out) = connection.traffic, self._counts.tolist()
        traffic.frames_received += frames
        traffic.frames_sent += frames
        traffic.bytes_received += bytes_in
        traffic.bytes_sent += bytes_out
        if why == row_loop.IDLE:
            raise IdlePeer(f"the peer sent nothing for {idle_timeout_s:.0f} s")
        if why == row_loop.CUT_SHORT:
            raise StalledPeer("the peer began a frame and did not finish it")
        if why == row_loop.UNSENT:
            raise ConnectionLost(
                "the peer took no more bytes" if detail == TIMED_OUT else "the connection broke"
            )
        if why == row_loop.DEVICE_FAILED:
            self._on_failure(detail)
        if why == row_loop.RANK_LOST:
            assert self._on_rank_lost is not None, "there are other ranks"
            self._on_rank_lost(detail)
        connection.unread(self._frame[:detail])

    def close(self) -> None:
        """Leave the other ranks."""
        for connection in set(self._other_ranks.values()):
            connection.close()


def serve_rank_rows(server: RowServer, connection: FrameConnection) -> None:
    """Serve the gateway's rows of one client until it closes the connection.

    Raises:
        ConnectionLost: it has.
        ProtocolError: it sent something else than rows.
        RankDied: the device failed.
    """
    server.run(_LONGEST_WAIT_MS / 1000)
    message_type, _, _ = connection.receive_head()
    raise ProtocolError(
        f"message type {message_type} came to a port for rows; run one otpipe release on all ranks"
    )
