"""The channel of an OT session and of the secure operations, over the frames of a connection.

Implements :class:`otpipe.ot.channel.Channel`. Every message carries its number and its label, and
both parties know from the program which label and which length come next: a message that is lost,
doubled, out of order, cut short or of another phase ends the session at the next receive.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError, ServerRefused, one_line
from otpipe.ot.channel import Bytes, label_kind
from otpipe.protocol.messages import Error, MessageType, send_message
from otpipe.protocol.private_messages import ChannelMessage
from otpipe.protocol.wire import FrameConnection, Header, IdlePeer

MAX_SHOWN_CHARACTERS = 400


class SilentPeer(ConnectionLost):
    """The peer is there and does not send what is due."""


class WireChannel:
    """One party's end; for one thread at a time, as the connection is.

    Attributes:
        sent_bytes, received_bytes: payload bytes by kind of label.
        rounds: how often this end received something after it had sent something.
    """

    def __init__(
        self,
        connection: FrameConnection,
        peer: str,
        timeout_s: float,
        on_received: Callable[[Bytes], None] | None = None,
    ) -> None:
        """
        Args:
            connection: carries nothing else while a program runs.
            peer: "client" or "server", for errors.
            timeout_s: silence after which the peer is given up.
            on_received: told every payload that arrives.
        """
        self._connection = connection
        self._peer = peer
        self._timeout_s = timeout_s
        self._on_received = on_received
        self._num_sent = self._num_received = 0
        self._listening = False
        self._patience_s: float | None = None
        self.sent_bytes: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()
        self.rounds = 0

    def send(self, label: str, payload: Bytes) -> None:
        """See :class:`otpipe.ot.channel.Channel`."""
        message = ChannelMessage(self._num_sent, label)
        send_message(self._connection, message, np.ascontiguousarray(payload))
        self._num_sent += 1
        self.sent_bytes[label_kind(label)] += payload.size
        self._listening = False

    def receive(self, label: str, num_bytes: int) -> Bytes:
        """See :class:`otpipe.ot.channel.Channel`; no memory is taken for a message not due.

        Raises:
            SilentPeer: nothing came in time.
            ServerRefused, ProtocolError: the server, or the client, ended the session with an
                error, which this tells.
        """
        started_s = time.monotonic()
        try:
            message_type, header, announced = self._connection.receive_head(self._timeout_s)
        except IdlePeer as error:
            raise SilentPeer(
                f"the {self._peer} sent nothing for {self._timeout_s:.0f} s where {label!r} was "
                "due; open a new connection"
            ) from error
        if message_type == MessageType.ERROR:
            self._connection.receive_payload(announced, 0)
            raise peer_error(self._peer, header)
        if message_type != MessageType.CHANNEL:
            raise ProtocolError(
                f"the {self._peer} sent message type {message_type} where {label!r} was due: the "
                "two parties are out of step; open a new connection"
            )
        message = ChannelMessage.parse(header)
        if (message.number, message.label) != (self._num_received, label):
            raise ProtocolError(
                f"the {self._peer} sent message {message.number}, {one_line(message.label, 64)!r}, "
                f"where message {self._num_received}, {label!r}, was due: the two parties are out "
                "of step; open a new connection"
            )
        if announced != num_bytes:
            raise ProtocolError(
                f"the {self._peer} announced {announced} bytes as {label!r} where {num_bytes} are "
                "due; open a new connection"
            )
        payload = self._connection.receive_payload(announced, num_bytes)
        self._num_received += 1
        self.received_bytes[label_kind(label)] += num_bytes
        if not self._listening:
            self._listening = True
            self.rounds += 1
        if self._on_received is not None:
            self._on_received(payload)
        self._lose_patience(time.monotonic() - started_s)
        return payload

    @contextlib.contextmanager
    def at_a_pace(self, patience_s: float) -> Iterator[None]:
        """Inside, spend at most ``patience_s`` in waiting for messages, all together.

        Where it is over, :meth:`receive` raises ProtocolError.
        """
        self._patience_s = patience_s
        try:
            yield
        finally:
            self._patience_s = None

    def _lose_patience(self, waited_s: float) -> None:
        if self._patience_s is None:
            return
        self._patience_s -= waited_s
        if self._patience_s < 0:
            raise ProtocolError(
                f"the {self._peer} sent what was due more slowly than is allowed; use a faster line"
            )


def peer_error(peer: str, header: Header) -> OtpipeError:
    """The exception that stands for an ERROR of the other party."""
    text = one_line(Error.parse(header).text, MAX_SHOWN_CHARACTERS)
    if peer == "server":
        return ServerRefused(f"the server refused: {text}")
    return ProtocolError(f"the client ended the session: {text}")
