"""One client of many_clients.py in a process of its own, driven by JSON lines over pipes.

:class:`ClientProcess` is the benchmark's end; run as a script this file is the other one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from otpipe import Client

PROMPT = [1]
"""One token, so that every pass of a generation is a decode step, and the first one counts too."""


class ClientProcess:
    """A process with one store and at most one connection."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command; :meth:`answer` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the oldest command without an answer gave."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the client of {self._store} ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Close the connection and the store, and wait for the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Worker:
    """The process's own end: a method for each command, with its answer."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._client: Client | None = None
        self._threads = torch.get_num_threads()

    def prepare(self, address: str, slots: int) -> dict[str, Any]:
        """Bring the store up to ``slots`` free ones."""
        torch.set_num_threads(self._threads)
        with Client(address, self._store) as client:
            missing = slots - client.free_slots
            if missing <= 0:
                return {"slots": 0, "bytes": 0}
            report = client.prepare(missing)
        return {"slots": report.slots, "bytes": report.bytes_sent + report.bytes_received}

    def open(self, address: str) -> dict[str, Any]:
        """Connect; the client computes on one core, as its decode steps do anyway."""
        torch.set_num_threads(1)
        self._client = Client(address, self._store)
        return dict(self._client.info())

    def generate(self, tokens: int, start_s: float) -> dict[str, Any]:
        """Decode ``tokens`` tokens from ``start_s`` on, by the clock that all processes share."""
        assert self._client is not None
        time.sleep(max(0.0, start_s - time.monotonic()))
        cpu_s, at_s = time.process_time(), [time.monotonic()]
        for _ in self._client.generate_ids(PROMPT, tokens):
            at_s.append(time.monotonic())
        cpu_s = time.process_time() - cpu_s
        assert self._client.last is not None
        stats = self._client.last.stats
        if stats.prepare_s:
            raise SystemExit("slots ran out inside a measurement; this is a bug of the benchmark")
        return {
            "ended_s": at_s[-1],
            "token_s": [b - a for a, b in pairwise(at_s)],
            "cpu_s": cpu_s,
            "bytes_up": stats.bytes_sent,
            "bytes_down": stats.bytes_received,
            "round_trips": stats.round_trips,
        }

    def close(self) -> dict[str, Any]:
        """Leave the server."""
        if self._client is not None:
            self._client.close()
            self._client = None
        return {}


def main() -> None:
    """Answer commands until standard input ends."""
    worker = Worker(Path(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": worker.prepare,
        "open": worker.open,
        "generate": worker.generate,
        "close": worker.close,
    }
    try:
        for line in sys.stdin:
            arguments = json.loads(line)
            answer = commands[arguments.pop("do")](**arguments)
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
