"""The port that a rank opens for the gateway's relay, and the token that keeps others out.

On the inner network, which must be trusted (docs/operations.md): a token is sent in the clear.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from otpipe.errors import ConnectionLost, RankDied, UsageError
from otpipe.protocol.sockets import tune_socket
from otpipe.protocol.wire import FrameConnection

log = logging.getLogger("otpipe.server")

TOKEN_BYTES = 32
CONNECT_TIMEOUT_S = 5.0
LINGER_S = 1.0


class RankPort:
    """Accepts the gateway's relayed connections and serves each in a thread of its own.

    Args:
        token: 32 bytes that the gateway knows.
        serve: runs one session to its end, over the frames of a client that was greeted already.
        stall_timeout_s: silence inside a frame after which a client is dropped.
    """

    def __init__(
        self, token: bytes, serve: Callable[[FrameConnection], None], stall_timeout_s: float
    ) -> None:
        self._token = token
        self._serve = serve
        self._stall_timeout_s = stall_timeout_s
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closing = False
        host = inner_address()
        try:
            self._listener = socket.create_server((host, 0), backlog=128)
        except OSError as error:
            raise UsageError(
                f"cannot listen on the inner address {host}: {error.strerror or error}; see that "
                "MASTER_ADDR is an address of the gateway host"
            ) from error
        self.address = f"{host} {self._listener.getsockname()[1]}"
        """Host and port, as :func:`connect_rank` takes them."""
        threading.Thread(target=self._accept_loop, name="private port", daemon=True).start()

    def _accept_loop(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("a relayed client could not be accepted: %s", error)
                time.sleep(0.1)
                continue
            with self._lock:
                self._sockets.add(sock)
            try:
                threading.Thread(
                    target=self._run, args=(sock,), name="relayed", daemon=True
                ).start()
            except RuntimeError as error:
                log.warning("no thread for a relayed client: %s", error)
                self._forget(sock)

    def _run(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(self._stall_timeout_s)
            tune_socket(sock)
            if not hmac.compare_digest(_read_exactly(sock, TOKEN_BYTES), self._token):
                log.warning("a connection without the token of this start was refused")
                return
            self._serve(FrameConnection(sock, stall_timeout_s=self._stall_timeout_s))
        except (ConnectionLost, OSError) as error:
            log.info("relayed client left: %s", error)
        finally:
            self._linger(sock)
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        with contextlib.suppress(OSError):
            sock.close()

    @staticmethod
    def _linger(sock: socket.socket) -> None:
        """Let the relay read the last words: closing with bytes unread would destroy them."""
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(LINGER_S)
            while time.monotonic() < deadline and sock.recv(1 << 16):
                pass

    def close(self) -> None:
        """Stop listening and end every session."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def connect_rank(address: str, token: bytes) -> socket.socket:
    """The gateway's connection to another rank.

    Raises:
        RankDied: the rank does not answer there.
    """
    host, port = address.split()
    try:
        sock = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        tune_socket(sock)
        sock.sendall(token)
    except OSError as error:
        raise RankDied(f"a rank does not answer at {host}:{port}: {error}") from error
    return sock


def inner_address() -> str:
    """The address of this host that the gateway host reaches: the one it would be seen from."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if master in ("localhost", "127.0.0.1", "::1"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing: chooses the route
        return str(probe.getsockname()[0])


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("closed during the greeting")
        data += piece
    return data
