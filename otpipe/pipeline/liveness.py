"""Who notices a dead rank: a heartbeat socket between the gateway and every other rank.

The kernel closes a dying process's sockets at once, so a crash shows as end-of-file within
milliseconds; a process that hangs, or a host that vanishes, shows as missing heartbeats. Both are
faster and surer than a collective that times out.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from otpipe.errors import RankDied

HEARTBEAT_PERIOD_S = 1.0
SILENCE_LIMIT_S = 7.0
_GREETING = struct.Struct("<II32s")  # rank, pid, token
_STORE_KEY = "otpipe/liveness"

OnDeath = Callable[[int, str], None]


@dataclass
class _Peer:
    rank: int
    pid: int
    sock: socket.socket
    last_heard_s: float


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(SILENCE_LIMIT_S)


class LivenessMonitor:
    """Threads that exchange heartbeats and report the first death they see.

    Args:
        on_death: called once, from a monitor thread, with the rank and a sentence.
    """

    def __init__(self, on_death: OnDeath) -> None:
        self._on_death = on_death
        self._lock = threading.Lock()
        self._reported = False
        self._closing = False
        self._sockets: list[socket.socket] = []

    def start(self, rank: int, world_size: int, store: dist.Store, pid: int) -> None:
        """Connect all ranks; returns when every rank is watched.

        Raises:
            RankDied: a rank did not connect within 60 s.
        """
        if world_size == 1:
            return
        if rank == 0:
            self._start_gateway(world_size, store)
        else:
            self._start_worker(rank, store, pid)

    def _start_gateway(self, world_size: int, store: dist.Store) -> None:
        token = secrets.token_bytes(32)
        with socket.create_server(("", 0)) as listener:
            host = _reachable_host()
            port = listener.getsockname()[1]
            store.set(_STORE_KEY, f"{host} {port} {token.hex()}")
            deadline = time.monotonic() + 60
            waiting = set(range(1, world_size))
            while waiting:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    sock, _ = listener.accept()
                    _tune(sock)
                    raw = _read_exactly(sock, _GREETING.size)
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise RankDied(
                            f"ranks {sorted(waiting)} did not report within 60 s: {error}"
                        ) from error
                    continue
                rank, pid, claimed = _GREETING.unpack(raw)
                if rank not in waiting or not hmac.compare_digest(claimed, token):
                    sock.close()
                    continue
                waiting.discard(rank)
                self._watch(_Peer(rank, pid, sock, time.monotonic()))

    def _start_worker(self, rank: int, store: dist.Store, pid: int) -> None:
        host, port, token = store.get(_STORE_KEY).decode().split()
        sock = socket.create_connection((host, int(port)), timeout=30)
        _tune(sock)
        sock.sendall(_GREETING.pack(rank, pid, bytes.fromhex(token)))
        self._watch(_Peer(0, 0, sock, time.monotonic()))

    def _watch(self, peer: _Peer) -> None:
        self._sockets.append(peer.sock)
        for target in (self._listen, self._beat):
            threading.Thread(target=target, args=(peer,), daemon=True).start()

    def _beat(self, peer: _Peer) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                peer.sock.sendall(b".")
                time.sleep(HEARTBEAT_PERIOD_S)

    def _listen(self, peer: _Peer) -> None:
        who = f"rank {peer.rank}" + (f" (pid {peer.pid})" if peer.pid else " (the gateway)")
        while not self._closing:
            try:
                if not peer.sock.recv(64):
                    return self._report(peer.rank, f"{who} died: its process ended")
            except TimeoutError:
                return self._report(
                    peer.rank, f"{who} died: no heartbeat for {SILENCE_LIMIT_S:.0f} s"
                )
            except OSError as error:
                return self._report(peer.rank, f"{who} died: {error}")
        return None

    def _report(self, rank: int, sentence: str) -> None:
        with self._lock:
            if self._reported or self._closing:
                return
            self._reported = True
        self._on_death(rank, sentence)

    def close(self) -> None:
        """Stop watching; deaths from now on are ordinary endings."""
        self._closing = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.close()


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
