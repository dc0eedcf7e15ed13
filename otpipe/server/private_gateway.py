"""What the gateway does for clients of private weights: greet, describe, and connect to a rank."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable

from otpipe import __version__
from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError, RankDied
from otpipe.model.private_bundle import PrivateBundle
from otpipe.pipeline.placement import GATEWAY_RANK
from otpipe.protocol.messages import (
    Bundle,
    Error,
    GetBundle,
    Hello,
    MessageType,
    Ping,
    Pong,
    Welcome,
    send_message,
)
from otpipe.protocol.private_messages import Attach
from otpipe.protocol.wire import FrameConnection, Header
from otpipe.server.private_rank import PrivateRank
from otpipe.server.private_session import RankSession
from otpipe.server.relay import relay

log = logging.getLogger("otpipe.server")

ConnectRank = Callable[[int], socket.socket]
"""A connection to the private port of another rank, where its session begins at once."""


class PrivateService:
    """What one server with private weights offers to every client.

    Args:
        bundle: the public model description.
        num_ranks: of the pipeline.
        rank: the gateway's own.
        connect_rank: reaches the others.
    """

    def __init__(
        self, bundle: PrivateBundle, num_ranks: int, rank: PrivateRank, connect_rank: ConnectRank
    ) -> None:
        self.bundle = bundle.to_bytes()
        self.welcome = Welcome(
            server=f"otpipe {__version__}",
            fingerprint=bundle.fingerprint,
            weights="private",
            num_ranks=num_ranks,
            bundle_bytes=len(self.bundle),
            bundle_sha256=hashlib.sha256(self.bundle).digest(),
        )
        self.rank = rank
        self.connect_rank = connect_rank


class PrivateClientSession:
    """One client's connection at the gateway; whoever made the connection closes it.

    Args:
        connection: frames of this client.
        service: what the server offers to all clients.
        idle_timeout_s: how long a client may stay silent between requests.
    """

    def __init__(
        self, connection: FrameConnection, service: PrivateService, idle_timeout_s: float
    ) -> None:
        self._connection = connection
        self._service = service
        self._idle_timeout_s = idle_timeout_s

    def run(self) -> None:
        """Answer until the client leaves, breaks the protocol, or attaches to a rank and ends."""
        try:
            rank = self._greet()
        except (ConnectionLost, RankDied) as error:
            log.info("client left: %s", error)
            return
        except OtpipeError as error:
            log.warning("client refused: %s", error)
            self._refuse(str(error))
            return
        if rank == GATEWAY_RANK:
            RankSession(self._connection, self._service.rank, self._idle_timeout_s).run()
            return
        try:
            relay(self._connection.release(), self._service.connect_rank(rank))
        except OtpipeError as error:
            log.warning("client could not be connected to rank %d: %s", rank, error)
            # Where the rank listens is told to the log alone.
            inner = isinstance(error, RankDied)
            self._refuse(f"rank {rank} does not answer; try again later" if inner else str(error))

    def _refuse(self, text: str) -> None:
        try:
            send_message(self._connection, Error(text[:1000]))
        except ConnectionLost:
            log.info("the refused client was already gone")

    def _greet(self) -> int:
        """Answer what does not concern a rank; returns the rank that the client attaches to."""
        greeted = False
        while True:
            message_type, header, announced = self._connection.receive_head(
                self._idle_timeout_s if greeted else None
            )
            self._connection.receive_payload(announced, 0)
            if not greeted and message_type != MessageType.HELLO:
                raise ProtocolError(
                    f"the first message has type {message_type}; a client begins with HELLO"
                )
            if message_type == MessageType.ATTACH:
                return self._attach(header)
            greeted = True
            self._answer(message_type, header)

    def _answer(self, message_type: int, header: Header) -> None:
        match message_type:
            case MessageType.HELLO:
                Hello.parse(header)
                send_message(self._connection, self._service.welcome)
            case MessageType.GET_BUNDLE:
                GetBundle.parse(header)
                send_message(self._connection, Bundle(), self._service.bundle)
            case MessageType.PING:
                Ping.parse(header)
                send_message(self._connection, Pong())
            case _:
                raise ProtocolError(
                    f"message type {message_type} is not a request to a gateway with private "
                    "weights; ATTACH to a rank first, or use a client of this version"
                )

    def _attach(self, header: Header) -> int:
        rank = Attach.parse(header).rank
        num_ranks = self._service.welcome.num_ranks
        if rank >= num_ranks:
            raise ProtocolError(f"rank {rank} was asked for; this server has 0 to {num_ranks - 1}")
        return rank
