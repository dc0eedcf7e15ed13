"""Deaths, hangs and orderly ends as the ranks' heartbeats show them."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from otpipe.errors import RankDied
from otpipe.pipeline import liveness
from otpipe.pipeline.liveness import LivenessMonitor

SILENCE_S = 1.0

# A rank that joins and then only beats; a line on its standard input makes it leave on purpose.
WORKER = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from otpipe.pipeline import liveness
liveness.HEARTBEAT_PERIOD_S, liveness.SILENCE_LIMIT_S = 0.2, 1.0
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=30))
said = lambda kind: lambda rank, sentence: print(kind, rank, sentence, flush=True)
monitor = liveness.LivenessMonitor(said("death"), said("goodbye"))
monitor.start(int(sys.argv[2]), int(sys.argv[3]), store, os.getpid())
print("joined", flush=True)
sys.stdin.readline()
monitor.close()
"""


class Gateway:
    """Rank 0 in this process, the others in processes of their own."""

    def __init__(self, world_size: int) -> None:
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self.workers = {
            rank: subprocess.Popen(
                [sys.executable, "-c", WORKER, str(self.store.port), str(rank), str(world_size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(1, world_size)
        }
        self.events: queue.Queue[tuple[str, int, str]] = queue.Queue()
        self.monitor = LivenessMonitor(
            lambda rank, sentence: self.events.put(("death", rank, sentence)),
            lambda rank, sentence: self.events.put(("goodbye", rank, sentence)),
        )
        self.monitor.start(0, world_size, self.store, os.getpid())
        for worker in self.workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == "joined\n"

    def close(self) -> None:
        self.monitor.close()
        for worker in self.workers.values():
            worker.kill()
            worker.communicate()


@contextmanager
def gateway(world_size: int) -> Iterator[Gateway]:
    ranks = Gateway(world_size)
    try:
        yield ranks
    finally:
        ranks.close()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "HEARTBEAT_PERIOD_S", 0.2)
    monkeypatch.setattr(liveness, "SILENCE_LIMIT_S", SILENCE_S)
    monkeypatch.delenv("MASTER_ADDR", raising=False)


@pytest.mark.slow
def test_a_killed_rank_is_named_at_once_and_once() -> None:
    with gateway(3) as ranks:
        with pytest.raises(queue.Empty):
            ranks.events.get(timeout=2 * SILENCE_S)  # beating ranks are left alone
        started_s = time.monotonic()
        ranks.workers[2].kill()
        kind, rank, sentence = ranks.events.get(timeout=1)
        assert time.monotonic() - started_s < 2
        assert (kind, rank) == ("death", 2)
        assert sentence.startswith(f"rank 2 (pid {ranks.workers[2].pid}) died: its process ended; ")
        ranks.workers[1].kill()  # what follows from the first death is not news
        with pytest.raises(queue.Empty):
            ranks.events.get(timeout=0.5)


@pytest.mark.slow
def test_a_hanging_rank_is_named_and_ended() -> None:
    with gateway(2) as ranks:
        worker = ranks.workers[1]
        worker.send_signal(signal.SIGSTOP)
        kind, rank, sentence = ranks.events.get(timeout=SILENCE_S + 1)
        assert (kind, rank) == ("death", 1)
        assert f"(pid {worker.pid}) hangs: no heartbeat for 1 s" in sentence
        # It is no sibling of this process but its child, so it is not for the monitor to kill.
        assert worker.poll() is None


@pytest.mark.slow
def test_a_rank_that_leaves_on_purpose_says_goodbye() -> None:
    with gateway(2) as ranks:
        worker = ranks.workers[1]
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        kind, rank, sentence = ranks.events.get(timeout=1)
        assert (kind, rank) == ("goodbye", 1)
        assert f"rank 1 (pid {worker.pid}) was stopped" in sentence


@pytest.mark.slow
def test_workers_tell_a_stopped_gateway_from_a_dead_one() -> None:
    with gateway(2) as ranks:
        ranks.monitor.close()
        out = ranks.workers[1].stdout
        assert out is not None
        said = out.readline()
        assert said.startswith(f"goodbye 0 rank 0 (the gateway, pid {os.getpid()}) was stopped")
    with gateway(2) as ranks:
        for sock in ranks.monitor._sockets:
            sock.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that dies
        out = ranks.workers[1].stdout
        assert out is not None
        assert out.readline().startswith("death 0 rank 0 (the gateway, pid ")


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "JOIN_LIMIT_S", 0.5)
    store = dist.HashStore()
    monitor = LivenessMonitor(lambda *_: None, lambda *_: None)
    with pytest.raises(RankDied, match=r"ranks \[1, 2\] did not report to the gateway"):
        monitor.start(0, 3, store, os.getpid())


def test_strangers_are_not_taken_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds the port but has no token stays out, whatever it says."""
    monkeypatch.setattr(liveness, "JOIN_LIMIT_S", 20.0)
    store = dist.HashStore()
    monitor = LivenessMonitor(lambda *_: None, lambda *_: None)
    starting = threading.Thread(target=monitor.start, args=(0, 2, store, 1), daemon=True)
    starting.start()
    store.wait([liveness._STORE_KEY], timedelta(seconds=5))
    host, port, _, token = store.get(liveness._STORE_KEY).decode().split()
    for greeting in (
        b"",
        b"short",
        liveness._GREETING.pack(1, 1, bytes(32)),
        liveness._GREETING.pack(5, 1, bytes.fromhex(token)),
    ):
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.sendall(greeting)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        assert starting.is_alive()
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.sendall(liveness._GREETING.pack(1, 1, bytes.fromhex(token)))
        starting.join(5)
        assert not starting.is_alive()
    monitor.close()


def test_a_world_of_one_watches_nobody() -> None:
    monitor = LivenessMonitor(lambda *_: None, lambda *_: None)
    monitor.start(0, 1, dist.HashStore(), os.getpid())
    assert not monitor._sockets
    monitor.close()


def test_only_siblings_are_killed() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        liveness._kill_sibling(sleeper.pid)  # our child
        liveness._kill_sibling(1)
        liveness._kill_sibling(2**22 + 1)  # no such process
        time.sleep(0.2)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
