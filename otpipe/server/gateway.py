"""The listening port: accept, TLS, one thread a client, and an orderly end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from otpipe.errors import ConnectionLost, UsageError
from otpipe.protocol.messages import Error, send_message
from otpipe.protocol.sockets import tune_socket
from otpipe.protocol.wire import FrameConnection
from otpipe.server.service import Service
from otpipe.server.session import ClientSession

log = logging.getLogger("otpipe.server")


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


class Gateway:
    """Accepts clients and runs a :class:`ClientSession` for each in a thread of its own."""

    def __init__(self, service: Service, options: ListenOptions) -> None:
        self._service = service
        self._options = options
        self._tls = _tls_context(options)
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            self._listener = socket.create_server((options.host, options.port), family=family)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; "
                "choose another --host or --port"
            ) from error
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closing = False

    def start(self) -> None:
        """Begin to accept clients, in a thread."""
        threading.Thread(target=self._accept_loop, name="accept", daemon=True).start()

    def _accept_loop(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                log.exception("accept failed")
                continue
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                self._sockets.add(sock)
                full = len(self._sockets) > self._options.max_clients
            threading.Thread(
                target=self._serve, args=(sock, full), name=f"client {address}", daemon=True
            ).start()

    def _serve(self, sock: socket.socket, full: bool) -> None:
        stall_timeout_s = self._options.stall_timeout_s
        wrapped = sock
        try:
            sock.settimeout(stall_timeout_s)
            tune_socket(sock)
            if self._tls is not None:
                wrapped = self._tls.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._sockets.discard(sock)
                    self._sockets.add(wrapped)
            connection = FrameConnection(wrapped, stall_timeout_s=stall_timeout_s)
            if full:
                with contextlib.suppress(ConnectionLost):
                    send_message(
                        connection,
                        Error(
                            f"the server already has its {self._options.max_clients} clients; "
                            "try again later or start it with a larger --max-clients"
                        ),
                    )
                return
            ClientSession(connection, self._service, self._options.idle_timeout_s).run()
        except OSError as error:  # a failed TLS handshake
            log.debug("client did not complete the handshake: %s", error)
        except Exception:
            # One client's misfortune must not end the service for the others.
            log.exception("a client's session ended on an internal error")
        finally:
            with self._lock:
                self._sockets.discard(sock)
                self._sockets.discard(wrapped)
            with contextlib.suppress(OSError):
                wrapped.close()

    def close(self) -> None:
        """Stop listening and close every client's connection."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


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
