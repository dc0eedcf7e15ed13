"""The listening port: accept, TLS, one thread a client, and an orderly end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from otpipe.errors import ConnectionLost, UsageError
from otpipe.protocol.messages import Error, send_message
from otpipe.protocol.sockets import tune_socket
from otpipe.protocol.wire import FrameConnection
from otpipe.server.service import Service
from otpipe.server.session import ClientSession

log = logging.getLogger("otpipe.server")

BACKLOG = 128
LINGER_S = 1.0
MAX_REFUSALS_AT_ONCE = 32
"""Clients beyond ``max_clients`` that are told so at the same time; still more are just closed."""


@dataclass(frozen=True)
class ListenOptions:
    """Where and how the gateway listens.

    Attributes:
        host, port: address; port 0 picks a free one.
        tls_cert, tls_key: PEM files, both or neither.
        insecure_plaintext: listen off loopback without TLS.
        max_clients: connections at a time; further ones are told so and closed.
        idle_timeout_s: silence between requests after which a client is dropped.
        stall_timeout_s: silence inside a frame after which a client is dropped.
    """

    host: str = "127.0.0.1"
    port: int = 7431
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure_plaintext: bool = False
    max_clients: int = 64
    idle_timeout_s: float = 600.0
    stall_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("give --tls-cert and --tls-key together, or neither")
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port is {self.port}; use 0 (any free port) to 65535")
        if self.tls_cert is None and not self.insecure_plaintext and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} is reachable from other machines: give --tls-cert and "
                "--tls-key, or --insecure-plaintext if something in front of otpipe does TLS"
            )


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine only. Names that do not resolve count as not."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UsageError(f"--host {host} does not resolve: {error}; give an address") from error
    return all(ipaddress.ip_address(str(a).split("%")[0]).is_loopback for a in addresses)


class Listener:
    """A bound port and its TLS identity.

    Made before a model is loaded, so that a port in use or a bad certificate shows at once. It
    refuses connections until :meth:`open`.
    """

    def __init__(self, options: ListenOptions) -> None:
        """Bind.

        Raises:
            UsageError: the port is taken or not permitted, or certificate and key do not fit.
        """
        self.host = options.host
        self.tls = _tls_context(options)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM
            )[0]
            self.socket = socket.socket(family, socket.SOCK_STREAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(address)
        except OSError as error:
            raise self._refused(options.port, error) from error
        self.port: int = self.socket.getsockname()[1]

    def open(self) -> None:
        """Let clients connect.

        Raises:
            UsageError: another process has opened the port since.
        """
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise self._refused(self.port, error) from error

    def _refused(self, port: int, error: OSError) -> UsageError:
        return UsageError(
            f"cannot listen on {self.host}:{port}: {error.strerror or error}; "
            "choose another --host or --port"
        )


ServeClient = Callable[[FrameConnection, float], None]
"""Serves one client's connection to its end; the number is ``idle_timeout_s``."""


class Gateway:
    """Accepts clients and serves each in a thread of its own.

    Args:
        service: what public weights offer, to a :class:`ClientSession` each; or what to do instead.
    """

    def __init__(
        self,
        service: Service | ServeClient,
        options: ListenOptions,
        listener: Listener | None = None,
    ) -> None:
        self._service = service
        self._options = options
        self._listener = listener or Listener(options)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closing = False

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return self._listener.port

    @property
    def address(self) -> str:
        """HOST:PORT, as a client's ``--server`` takes it."""
        host = self._options.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def start(self) -> None:
        """Begin to accept clients, in a thread."""
        self._listener.open()
        threading.Thread(target=self._accept_loop, name="accept", daemon=True).start()

    def _accept_loop(self) -> None:
        while True:
            try:
                sock, address = self._listener.socket.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("a client could not be accepted: %s", error)
                time.sleep(0.1)  # out of file descriptors, as a rule: let sessions end
                continue
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                self._sockets.add(sock)
                excess = len(self._sockets) - self._options.max_clients
            if excess > MAX_REFUSALS_AT_ONCE or not self._start_serving(sock, address, excess > 0):
                self._forget(sock)

    def _start_serving(self, sock: socket.socket, address: object, full: bool) -> bool:
        try:
            threading.Thread(
                target=self._serve, args=(sock, full), name=f"client {address}", daemon=True
            ).start()
        except RuntimeError as error:
            log.warning("no thread for client %s: %s", address, error)
            return False
        log.info("client %s connected", address)
        return True

    def _serve(self, sock: socket.socket, full: bool) -> None:
        stall_timeout_s = self._options.stall_timeout_s
        try:
            sock.settimeout(stall_timeout_s)
            tune_socket(sock)
            if self._listener.tls is not None:
                plain = sock
                sock = self._listener.tls.wrap_socket(
                    plain, server_side=True, do_handshake_on_connect=False
                )
                with self._lock:
                    self._sockets.discard(plain)
                    self._sockets.add(sock)
                _handshake(sock)
            connection = FrameConnection(sock, stall_timeout_s=stall_timeout_s)
            if full:
                send_message(
                    connection,
                    Error(
                        f"the server already has its {self._options.max_clients} clients; "
                        "try again later or start it with a larger --max-clients"
                    ),
                )
            else:
                self._serve_client(connection)
        except (ConnectionLost, OSError) as error:  # a failed TLS handshake
            log.info("client left: %s", error)
        finally:
            self._linger(sock)
            self._forget(sock)

    def _serve_client(self, connection: FrameConnection) -> None:
        idle_timeout_s = self._options.idle_timeout_s
        if isinstance(self._service, Service):
            ClientSession(connection, self._service, idle_timeout_s).run()
        else:
            self._service(connection, idle_timeout_s)

    def _linger(self, sock: socket.socket) -> None:
        """Let the client read the last words: closing with bytes unread would destroy them."""
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(LINGER_S)
            while time.monotonic() < deadline and sock.recv(1 << 16):
                pass

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        with contextlib.suppress(OSError):
            sock.close()

    def close(self) -> None:
        """Stop listening and close every client's connection."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.socket.shutdown(socket.SHUT_RDWR)
        self._listener.socket.close()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _handshake(sock: ssl.SSLSocket) -> None:
    """Complete the handshake; a client that speaks no TLS reads in plain text why it failed."""
    try:
        sock.do_handshake()
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            socket.socket.sendall(sock, b"this port speaks TLS only\n")  # past the TLS layer
        raise


def _tls_context(options: ListenOptions) -> ssl.SSLContext | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--tls-cert {options.tls_cert} with --tls-key {options.tls_key} cannot be used: "
            f"{error}; give a PEM certificate chain and its unencrypted PEM key"
        ) from error
    return context
