"""What every benchmark needs: the machine's description, a server, quartiles, and the limits."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, object]:
    """Hardware, software and commit, as every result records them."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "link": "loopback TCP, client and server on this machine",
    }


def save(result: dict[str, Any], out: Path | None) -> None:
    """Write ``result`` as JSON, if it is to go to a file."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes on ``device``."""
    size = (1 << 30) if device == "cuda" else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        started_s = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return 2 * size / statistics.median(times)


@contextmanager
def server(
    model: Path, ranks: int, device: str, *args: str, noise: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Start ``otpipe.serve`` under torchrun; yields its address and the growing log.

    ``noise``: with weights made by ``serve_noise.py``.
    """
    program = [str(ROOT / "benchmarks" / "serve_noise.py")] if noise else ["-m", "otpipe.serve"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=127.0.0.1:0",
            *program,
            f"--model={model}",
            "--weights=public",
            f"--device={device}",
            "--port=0",
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    log: list[str] = []
    address: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            found = re.match(r"otpipe: ready on (\S+)$", line.strip())
            if found:
                address.append(found.group(1))
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        while not ready.wait(0.2):
            if process.poll() is not None:
                raise SystemExit("the server did not start:\n" + "".join(log))
        yield address[0], log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rank_pids() -> list[int]:
    """Processes of the servers that :func:`server` has running, in no order."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(status[1])
    own = os.getpid()
    return [pid for pid, parent in parents.items() if parents.get(parent) == own]


def cpu_seconds(pid: int) -> float:
    """Processor time that another process has used so far."""
    status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")


def timed(action: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that ``action`` takes, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
