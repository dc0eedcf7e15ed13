"""Who notices a dead rank: a heartbeat socket between the gateway and every other rank.

The kernel closes a dying process's sockets at once, so a crash shows as end-of-file within
milliseconds; a process that hangs, or a host that vanishes, shows as missing heartbeats. Both are
faster and surer than a collective that times out. A rank that ends on purpose says so first.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from otpipe.errors import RankDied

HEARTBEAT_PERIOD_S = 1.0
SILENCE_LIMIT_S = 6.0
JOIN_LIMIT_S = 60.0
_BEAT, _GOODBYE = b".", b"q"
_GREETING = struct.Struct("<II32s")  # rank, pid, token
_STORE_KEY = "otpipe/liveness"
_REMEDY = "look for its last words above and start the server again"

OnEnd = Callable[[int, str], None]
"""Called from a monitor thread with the rank that ended and a sentence that names it."""


@dataclass
class _Peer:
    rank: int
    pid: int
    sock: socket.socket

    def __str__(self) -> str:
        return f"rank {self.rank} ({'' if self.rank else 'the gateway, '}pid {self.pid})"


class LivenessMonitor:
    """Threads that exchange heartbeats and report the first end they see, once.

    Args:
        on_death: the peer crashed, hangs, or cannot be reached.
        on_goodbye: the peer ended on purpose.
    """

    def __init__(self, on_death: OnEnd, on_goodbye: OnEnd) -> None:
        self._on_death = on_death
        self._on_goodbye = on_goodbye
        self._lock = threading.Lock()
        self._reported = False
        self._closing = False
        self._sockets: list[socket.socket] = []

    def start(self, rank: int, world_size: int, store: dist.Store, pid: int) -> None:
        """Connect all ranks; returns when this rank is watched, and the gateway watches all.

        Raises:
            RankDied: a rank did not connect within ``JOIN_LIMIT_S``.
        """
        if world_size == 1:
            return
        if rank == 0:
            self._start_gateway(world_size, store, pid)
        else:
            self._start_worker(rank, store, pid)

    def _start_gateway(self, world_size: int, store: dist.Store, pid: int) -> None:
        token = secrets.token_bytes(32)
        host = _reachable_host()
        with socket.create_server((host if host == "127.0.0.1" else "", 0)) as listener:
            store.set(_STORE_KEY, f"{host} {listener.getsockname()[1]} {pid} {token.hex()}")
            deadline = time.monotonic() + JOIN_LIMIT_S
            waiting = set(range(1, world_size))
            while waiting:
                peer = _accept(listener, token, deadline)
                if peer is not None and peer.rank in waiting:
                    waiting.discard(peer.rank)
                    self._watch(peer)
                elif peer is not None:
                    peer.sock.close()
                elif time.monotonic() > deadline:
                    raise RankDied(
                        f"ranks {sorted(waiting)} did not report to the gateway within "
                        f"{JOIN_LIMIT_S:.0f} s; see that they reach {host}, and start again"
                    )

    def _start_worker(self, rank: int, store: dist.Store, pid: int) -> None:
        host, port, gateway_pid, token = store.get(_STORE_KEY).decode().split()
        try:
            sock = socket.create_connection((host, int(port)), timeout=JOIN_LIMIT_S / 2)
            sock.sendall(_GREETING.pack(rank, pid, bytes.fromhex(token)))
        except OSError as error:
            raise RankDied(
                f"rank {rank} cannot reach the gateway at {host}:{port}: {error}; "
                "open the ports between the hosts, or start again"
            ) from error
        self._watch(_Peer(0, int(gateway_pid), sock))

    def _watch(self, peer: _Peer) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sock.settimeout(SILENCE_LIMIT_S)
        self._sockets.append(peer.sock)
        for target in (self._listen, self._beat):
            threading.Thread(target=target, args=(peer,), daemon=True).start()

    def _beat(self, peer: _Peer) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                peer.sock.sendall(_BEAT)
                time.sleep(HEARTBEAT_PERIOD_S)

    def _listen(self, peer: _Peer) -> None:
        while True:
            try:
                data = peer.sock.recv(64)
            except TimeoutError:
                _kill_sibling(peer.pid)
                self._report(self._on_death, peer, f"hangs: no heartbeat for {SILENCE_LIMIT_S:g} s")
                return
            except ConnectionError:
                data = b""  # a killed process that had unread heartbeats resets its connection
            except OSError as error:
                self._report(self._on_death, peer, f"cannot be reached: {error}")
                return
            if _GOODBYE in data:
                self._report(self._on_goodbye, peer, "was stopped")
                return
            if not data:
                self._report(self._on_death, peer, "died: its process ended")
                return

    def _report(self, tell: OnEnd, peer: _Peer, what: str) -> None:
        with self._lock:
            if self._reported or self._closing:
                return
            self._reported = True
        tell(peer.rank, f"{peer} {what}; {_REMEDY}")

    def close(self) -> None:
        """Stop watching, and tell the peers that this rank's end is none of a sick process."""
        with self._lock:
            self._closing = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.setblocking(False)  # a hanging peer may not hold up this end
                sock.send(_GOODBYE)
            with contextlib.suppress(OSError):
                sock.close()


def _accept(listener: socket.socket, token: bytes, deadline: float) -> _Peer | None:
    """The next rank that knows the token; None when something else came, or nobody in time."""
    listener.settimeout(max(0.1, deadline - time.monotonic()))
    sock: socket.socket | None = None
    try:
        sock, _ = listener.accept()
        sock.settimeout(SILENCE_LIMIT_S)
        rank, pid, claimed = _GREETING.unpack(_read_exactly(sock, _GREETING.size))
        if hmac.compare_digest(claimed, token):
            return _Peer(rank, pid, sock)
    except OSError:
        pass
    if sock is not None:
        sock.close()
    return None


def _kill_sibling(pid: int) -> None:
    """End a hanging rank of this torchrun, which would else wait 30 s before it does so itself.

    Only a process with the same parent is touched: a number from another host, or one that has
    been given to another process since, is none of ours.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        if int(fields[1]) == os.getppid() != 1:
            os.kill(pid, signal.SIGKILL)


def _reachable_host() -> str:
    """An address of this host that the other ranks can reach: the one that torchrun gave."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return "127.0.0.1" if master in ("localhost", "127.0.0.1", "::1") else master


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("closed during the greeting")
        data += piece
    return data
