"""The client's line to a server: requests that survive a lost connection.

Sending the very same bytes again is safe (they are already known to whoever listened), so a request
whose connection breaks is repeated, byte for byte, on a new one: to the same server or to another
replica that holds the same weights. Nothing else is ever sent under a pad that has been used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from otpipe.errors import (
    ConnectionLost,
    FingerprintMismatch,
    OtpipeError,
    ProtocolError,
    ServerRefused,
    UsageError,
    one_line,
)
from otpipe.protocol.messages import Error, Hello, Message, MessageType, Welcome, send_message
from otpipe.protocol.private_messages import Attach, Attached
from otpipe.protocol.sockets import tune_socket
from otpipe.protocol.wire import Buffer, FrameConnection, Header, Traffic

log = logging.getLogger("otpipe.client")

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 120.0
"""How long the server may compute on one request. A dead server shows within seconds all the same:
its sockets close, or keep-alive probes fail."""

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0

MAX_SHOWN_CHARACTERS = 400
"""Of the text of an ERROR."""

_CLOSED = "this client is closed; open a new one"
_INTERRUPTED = "the pass that this request belonged to was given up"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ServerAddress:
    """Host and port of one replica."""

    host: str
    port: int

    @classmethod
    def parse_list(cls, text: str) -> tuple[ServerAddress, ...]:
        """Parse ``HOST:PORT[,HOST:PORT...]``.

        Raises:
            UsageError: a part is not HOST:PORT.
        """
        return tuple(cls._parse(part.strip()) for part in text.split(","))

    @classmethod
    def _parse(cls, text: str) -> ServerAddress:
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"the server address {text!r} is not HOST:PORT, as 127.0.0.1:7431")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class LinkOptions:
    """How to reach the server.

    Attributes:
        servers: replicas, tried in order.
        ca: PEM file of the authority that signed the server's certificate; turns TLS on. "system"
            trusts the system's authorities.
        retry_for_s: how long a lost server is sought before the client gives up.
        connect: opens a socket; tests put faults here.
    """

    servers: tuple[ServerAddress, ...]
    ca: str | None = None
    retry_for_s: float = 30.0
    connect: Callable[[tuple[str, int], float], socket.socket] = socket.create_connection


def _tls_context(ca: str | None) -> ssl.SSLContext | None:
    if ca is None:
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca == "system" else ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--ca {ca} cannot be used: {error}; give a PEM file") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class ServerLink:
    """One connection, restored when it breaks. For one thread.

    Attributes:
        traffic: bytes and frames over all connections so far.
        round_trips: requests answered.
        welcome: the server's first frame.
    """

    def __init__(
        self,
        options: LinkOptions,
        fingerprint: str | None = None,
        *,
        seek_for_s: float | None = None,
    ) -> None:
        """Connect.

        Args:
            fingerprint: the weights the caller has pads for; None accepts any and keeps to it.
            seek_for_s: how long to seek a server at first; None: ``retry_for_s``, as later.

        Raises:
            ConnectionLost: no server answered within ``retry_for_s``.
            FingerprintMismatch: a server answered that holds other weights.
        """
        self._options = options
        self._tls = _tls_context(options.ca)
        self._fingerprint = fingerprint
        self._connection: FrameConnection | None = None
        self._closed = False
        self._interrupted = False
        self.traffic = Traffic()
        self.round_trips = 0
        self.welcome: Welcome
        self._restore(None, seek_for_s)

    def request(
        self,
        message: Message,
        payload: Buffer,
        answer_type: MessageType,
        answer_bytes: Callable[[Header], int],
        meanwhile: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Send one request and wait for its answer, over as many connections as it takes.

        Args:
            answer_bytes: checks the answer's header and returns the payload length due.
            meanwhile: called once, after the request has left, while the server works.

        Returns:
            uint8 (bytes,) payload of the answer.

        Raises:
            ServerRefused: the server answered with an error.
            ProtocolError: the server's answer is not what was asked for.
            ConnectionLost: no server with these weights came back within ``retry_for_s``.
        """
        return self._until_answered(
            lambda connection: send_message(connection, message, payload),
            lambda: self.receive(answer_type, answer_bytes),
            meanwhile,
        )

    def exchange(
        self,
        frame: memoryview,
        answer_head: bytes,
        answer: memoryview,
        answer_type: MessageType,
        answer_bytes: Callable[[Header], int],
        meanwhile: Callable[[], None] | None = None,
        sent_on: FrameConnection | None = None,
    ) -> None:
        """As :meth:`request`, for frames that are laid out already, without copies.

        Args:
            frame: the request's head and payload. Not to be changed until this returns: the same
                bytes are sent again where a connection breaks.
            answer_head: the head that the answer will have.
            answer: filled with head and payload of the answer.
            answer_type, answer_bytes, meanwhile: as for :meth:`request`.
            sent_on: a connection of :meth:`plain_connection` over which the caller has sent the
                request: while that is open, only the answer is waited for.
        """

        def send(connection: FrameConnection) -> None:
            if connection is not sent_on:
                connection.send_frame(frame)

        def receive() -> None:
            connection = self._connection
            if connection is None:
                raise ConnectionLost(_CLOSED)
            if not connection.receive_due(answer_head, answer, ANSWER_TIMEOUT_S):
                # An error, or an answer to nothing that was asked: told apart where all are.
                payload = self.receive(answer_type, answer_bytes)
                answer[len(answer_head) :] = memoryview(payload)  # type: ignore[arg-type]

        self._until_answered(send, receive, meanwhile)

    def plain_connection(self) -> FrameConnection | None:
        """The connection, for code that reads and writes frames itself; None under TLS.

        What such code has asked and been answered it counts in ``round_trips`` and in the
        connection's traffic. Raises as :meth:`request`.
        """
        connection = self._live()
        return None if connection.descriptor < 0 or connection.has_unread else connection

    def attach(self, rank: int) -> FrameConnection:
        """Tie the connection to one rank of a server with private weights.

        No request is repeated on it from then on. Raises as :meth:`request`.
        """

        def due(header: Header) -> int:
            if Attached.parse(header).rank != rank:
                raise ProtocolError(f"the server attached this client to another rank than {rank}")
            return 0

        self.request(Attach(rank), b"", MessageType.ATTACHED, due)
        assert self._connection is not None, "the answer came over it"
        return self._connection

    def drop(self) -> None:
        """Leave the connection, on which an answer may be under way that nobody is to take."""
        self._drop()

    def _until_answered(
        self,
        send: Callable[[FrameConnection], None],
        receive: Callable[[], T],
        meanwhile: Callable[[], None] | None,
    ) -> T:
        """One request over as many connections as it takes; see :meth:`request`."""
        failing_since_s: float | None = None
        pause_s = FIRST_RETRY_S
        while True:
            connection = self._live()  # its search for a server is not to be repeated below
            try:
                send(connection)
                if meanwhile is not None:
                    meanwhile()
                    meanwhile = None
                answer = receive()
            except ConnectionLost as error:
                if self._closed or self._interrupted:
                    raise
                now_s = time.monotonic()
                if failing_since_s is None:
                    failing_since_s = now_s
                elif now_s - failing_since_s > self._options.retry_for_s:
                    # It accepts connections and drops requests: do not go round for ever.
                    raise
                else:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LAST_RETRY_S)
                self._restore(error)
                continue
            except BaseException:
                # An answer may still be under way on this connection: it must never be taken for
                # the answer to a later request.
                self._drop()
                raise
            self.round_trips += 1
            return answer

    def send(self, message: Message, payload: Buffer = b"") -> None:
        """Send without waiting, and without a second try."""
        send_message(self._live(), message, payload)

    def receive(
        self,
        answer_type: MessageType,
        answer_bytes: Callable[[Header], int],
        timeout_s: float = ANSWER_TIMEOUT_S,
        new_buffer: Callable[[int], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Receive one answer of the given type; no second try.

        ``new_buffer`` as for ``FrameConnection.receive_payload``.
        """
        connection = self._connection
        if connection is None:
            raise ConnectionLost(_CLOSED)
        message_type, header, announced = connection.receive_head(timeout_s)
        if message_type == MessageType.ERROR:
            connection.receive_payload(announced, 0)
            raise ServerRefused(f"the server refused: {_error_text(header)}")
        if message_type != answer_type:
            raise ProtocolError(
                f"the server sent message type {message_type} where {answer_type.name} was due"
            )
        return connection.receive_payload(announced, answer_bytes(header), new_buffer)

    def restore(self, cause: ConnectionLost) -> None:
        """Reconnect after a failed :meth:`send` or :meth:`receive`."""
        self._restore(cause)

    def interrupt(self) -> None:
        """From another thread: make the request under way, and all further ones, fail soon.

        :meth:`resume` ends that; the next request then connects anew.
        """
        self._interrupted = True
        self._drop()

    def resume(self) -> None:
        """Serve requests again after :meth:`interrupt`."""
        self._interrupted = False

    def absorb(self, other: ServerLink) -> None:
        """Count what ``other``, a second line of the same conversation, has carried."""
        traffic = other.current_traffic()
        self.traffic.bytes_sent += traffic.bytes_sent
        self.traffic.bytes_received += traffic.bytes_received
        self.traffic.frames_sent += traffic.frames_sent
        self.traffic.frames_received += traffic.frames_received
        self.round_trips += other.round_trips

    def close(self) -> None:
        """Leave. Safe to call twice, and from another thread to wake a blocked request."""
        self._closed = True
        self._drop()

    # -- connecting ------------------------------------------------------------------------------

    def _live(self) -> FrameConnection:
        """The open connection; a new one if the server had stayed away and may be back."""
        if self._closed:
            raise ConnectionLost(_CLOSED)
        if self._interrupted:
            raise ConnectionLost(_INTERRUPTED)
        if self._connection is None:
            self._restore(None)
        assert self._connection is not None
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            for name in ("bytes_sent", "bytes_received", "frames_sent", "frames_received"):
                total = getattr(self.traffic, name) + getattr(connection.traffic, name)
                setattr(self.traffic, name, total)
            connection.close()

    def current_traffic(self) -> Traffic:
        """Totals including the connection now open."""
        live = self._connection.traffic if self._connection is not None else Traffic()
        return Traffic(
            self.traffic.bytes_sent + live.bytes_sent,
            self.traffic.bytes_received + live.bytes_received,
            self.traffic.frames_sent + live.frames_sent,
            self.traffic.frames_received + live.frames_received,
        )

    def _restore(self, cause: ConnectionLost | None, seek_for_s: float | None = None) -> None:
        """Connect to the first server that answers, until ``retry_for_s`` is over."""
        self._drop()
        if seek_for_s is None:
            seek_for_s = self._options.retry_for_s
        deadline = time.monotonic() + seek_for_s
        pause_s = FIRST_RETRY_S
        last: Exception | None = cause
        if cause is not None:
            log.warning("%s; reconnecting", cause)
        while not (self._closed or self._interrupted):
            foreign: FingerprintMismatch | None = None
            for address in self._options.servers:
                try:
                    self._connect(address)
                    return
                except FingerprintMismatch as error:
                    foreign = error
                except (ConnectionLost, ServerRefused, OSError) as error:
                    if isinstance(error, ssl.SSLCertVerificationError):
                        raise OtpipeError(
                            f"the certificate of {address} is not trusted: {error.verify_message}; "
                            "give the authority that signed it with --ca"
                        ) from error
                    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                        raise OtpipeError(
                            f"{address} does not complete a TLS handshake "
                            f"({one_line(error.reason or error)}); leave out --ca if it serves "
                            "plaintext, or check host and port"
                        ) from error
                    last = error
            if foreign is not None:
                raise foreign
            if time.monotonic() + pause_s > deadline:
                names = ", ".join(map(str, self._options.servers))
                raise ConnectionLost(
                    f"no server at {names} answered within {seek_for_s:.0f} s "
                    f"(last: {last}); start it, or check address and TLS options"
                ) from last
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_RETRY_S)
        raise ConnectionLost("this client was closed" if self._closed else _INTERRUPTED)

    def _connect(self, address: ServerAddress) -> None:
        sock = self._options.connect((address.host, address.port), CONNECT_TIMEOUT_S)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                tune_socket(sock)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=address.host)
            connection = FrameConnection(sock)
            send_message(connection, Hello(client="otpipe"))
            message_type, header, announced = connection.receive_head(CONNECT_TIMEOUT_S)
            connection.receive_payload(announced, 0)
            if message_type == MessageType.ERROR:
                raise ServerRefused(f"{address} refused: {_error_text(header)}")
            if message_type != MessageType.WELCOME:
                raise ProtocolError(f"{address} greeted with message type {message_type}")
            welcome = _checked_welcome(header, address)
            if self._fingerprint is not None and welcome.fingerprint != self._fingerprint:
                raise FingerprintMismatch(
                    f"the server at {address} holds weights {welcome.fingerprint[:16]}, but "
                    f"{self._fingerprint[:16]} are in use here; name a replica of those, or start "
                    "anew to work with the others"
                )
        except BaseException:
            with contextlib.suppress(OSError):
                sock.close()
            raise
        self.welcome = welcome
        self._fingerprint = welcome.fingerprint
        self._connection = connection


def _error_text(header: Header) -> str:
    """The sentence of an ERROR, fit for a terminal."""
    return one_line(Error.parse(header).text, MAX_SHOWN_CHARACTERS)


def _checked_welcome(header: Header, address: ServerAddress) -> Welcome:
    """A WELCOME whose strings are fit for a terminal."""
    welcome = Welcome.parse(header)
    if not _FINGERPRINT.fullmatch(welcome.fingerprint):
        raise ProtocolError(
            f"{address} greeted with a fingerprint that is not 64 hex digits; use a server of this "
            "version"
        )
    return replace(welcome, server=one_line(welcome.server), weights=one_line(welcome.weights))
