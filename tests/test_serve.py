"""Real servers: processes under torchrun, from the ready line to every way they can end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from checkpoints import build_checkpoint
from servers import TorchrunServer, start_torchrun, torchrun_server

from otpipe import Client
from otpipe.errors import OtpipeError
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor

EXIT_USAGE = 2
END_LIMIT_S = 10.0
PROMPT = (2, 71, 8, 28, 18)
NUM_TOKENS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: they divide by no number of ranks between 2 and 4."""
    return build_checkpoint(tmp_path_factory.mktemp("model"), num_layers=5)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """Greedy tokens of the plaintext reference."""
    executor = PlaintextExecutor.from_checkpoint(model, quantised=True)
    cache = executor.new_cache()
    tokens: list[int] = []
    pending = list(PROMPT)
    while len(tokens) < NUM_TOKENS:
        logits = forward(executor, pending, cache)
        assert logits is not None
        tokens.append(int(logits[0].argmax()))
        pending = [tokens[-1]]
    return tokens


def assert_generates(address: str, store: Path, expected: list[int]) -> None:
    with Client(address, store) as client:
        client.prepare(64)
        assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def seconds_to_end(server: TorchrunServer, act: Callable[[], object]) -> float:
    """How long torchrun and all ranks take to be gone after ``act``."""
    processes = [psutil.Process(pid) for pid in server.rank_pids().values()]
    started_s = time.monotonic()
    act()
    server.wait(40)
    _, alive = psutil.wait_procs(processes, timeout=max(0.1, END_LIMIT_S))
    assert not alive
    took_s = time.monotonic() - started_s
    print(f"ended after {took_s:.2f} s")
    return took_s


def otpipe_lines(server: TorchrunServer) -> list[str]:
    """What our ranks said; torchrun's own warnings and report are not ours."""
    time.sleep(0.2)  # the reading thread is a line behind
    return [line.rstrip() for line in server.log if line.startswith("otpipe:")]


def assert_no_traceback_of_ours(server: TorchrunServer) -> None:
    text = server.log_text()
    assert "otpipe/server" not in text, text
    assert "otpipe/pipeline" not in text, text


def serve_alone(*args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """``python -m otpipe.serve`` without torchrun, where it ends by itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "otpipe.serve", *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        check=False,
    )


# -- serving, and orderly ends ---------------------------------------------------------------------


def test_two_ranks_then_sigterm(model: Path, expected: list[int], tmp_path: Path) -> None:
    with torchrun_server(model, 2, "--audit") as server:
        assert re.fullmatch(r"127\.0\.0\.1:\d+", server.address)
        assert_generates(server.address, tmp_path, expected)
        assert len(server.rank_pids()) == 2
        took_s = seconds_to_end(server, lambda: server.process.send_signal(signal.SIGTERM))
        lines = otpipe_lines(server)
    assert took_s < END_LIMIT_S
    held = [line for line in lines if re.search(r"rank \d holds \d+ of 22 maps, .* MB", line)]
    assert len(held) == 2
    (audit,) = [line for line in lines if "the server saw" in line]
    entropy = float(re.search(r"with ([\d.]+) bits of entropy", audit)[1])  # type: ignore[index]
    assert entropy > 7.99
    assert lines[-1] == "otpipe: stopped by SIGTERM"
    assert len(lines) == 5, lines
    assert_no_traceback_of_ours(server)


def test_a_killed_rank_ends_the_server(model: Path, expected: list[int], tmp_path: Path) -> None:
    """While a client is at work; it is told that the server is lost, and not that it refused."""
    with torchrun_server(model, 3) as server:
        assert_generates(server.address, tmp_path, expected)
        pid = server.rank_pids()[1]
        with Client(server.address, tmp_path, retry_for_s=1) as client:
            tokens = client.generate_ids(PROMPT, 50)
            next(tokens)
            took_s = seconds_to_end(server, lambda: os.kill(pid, signal.SIGKILL))
            with pytest.raises(OtpipeError, match=r"no server at .* answered within 1 s"):
                list(tokens)
        lines = otpipe_lines(server)
    assert took_s < END_LIMIT_S
    assert server.process.returncode != 0
    assert lines[-1] == (
        f"otpipe: rank 1 (pid {pid}) died: its process ended; look for its last words above and "
        "start the server again"
    )
    assert sum("rank 1 (pid" in line for line in lines) == 1
    assert "stopped by" not in server.log_text()
    assert_no_traceback_of_ours(server)


def test_a_killed_launcher_ends_the_server(model: Path) -> None:
    with torchrun_server(model, 2) as server:
        pids = server.rank_pids().values()
        server.process.kill()
        deadline = time.monotonic() + END_LIMIT_S
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        lines = otpipe_lines(server)
    launcher = f"torchrun (pid {server.process.pid}) is gone; start the server again"
    assert any(line.endswith(f"ends: {launcher}") for line in lines)


def test_a_killed_gateway_ends_the_server(model: Path) -> None:
    with torchrun_server(model, 3) as server:
        pid = server.rank_pids()[0]
        took_s = seconds_to_end(server, lambda: os.kill(pid, signal.SIGKILL))
        lines = otpipe_lines(server)
    assert took_s < END_LIMIT_S
    assert server.process.returncode != 0
    assert [line for line in lines if "died" in line] == [
        f"otpipe: rank 0 (the gateway, pid {pid}) died: its process ended; look for its last "
        "words above and start the server again"
    ]
    assert_no_traceback_of_ours(server)


def test_a_hanging_rank_ends_the_server(model: Path, expected: list[int], tmp_path: Path) -> None:
    with torchrun_server(model, 4) as server:
        assert_generates(server.address, tmp_path, expected)
        pid = server.rank_pids()[2]
        took_s = seconds_to_end(server, lambda: os.kill(pid, signal.SIGSTOP))
        lines = otpipe_lines(server)
    assert took_s < END_LIMIT_S + 1
    assert server.process.returncode != 0
    assert f"rank 2 (pid {pid}) hangs: no heartbeat for 6 s" in lines[-1]
    assert_no_traceback_of_ours(server)


def test_without_torchrun_and_two_servers_at_once(
    model: Path, expected: list[int], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "otpipe.serve", f"--model={model}", "--weights=public"]
    command += ["--port=0", "--audit"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        addresses = []
        for process in servers:
            assert process.stdout is not None
            ready = re.fullmatch(r"otpipe: ready on (\S+)\n", process.stdout.readline())
            assert ready
            addresses.append(ready[1])
        assert addresses[0] != addresses[1]
        for number, address in enumerate(addresses):
            assert_generates(address, tmp_path / str(number), expected)
        # The same weights are the same model: pads of one are good for the other.
        with Client(",".join(addresses), tmp_path / "0") as client:
            assert client.free_slots > 0
        for process, number in zip(servers, (signal.SIGTERM, signal.SIGINT), strict=True):
            started_s = time.monotonic()
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
            assert time.monotonic() - started_s < END_LIMIT_S
            assert process.returncode == 0
            assert not out
            assert "bits of entropy a byte" in err
            assert err.endswith(f"otpipe: stopped by {number.name}\n")
            assert "Traceback" not in err


# -- starts that fail ------------------------------------------------------------------------------


def test_every_rank_finds_the_same_fault_and_one_says_it(model: Path) -> None:
    process = start_torchrun(model, 6, "--port=0")
    out, _ = process.communicate(timeout=90)
    lines = [line for line in out.splitlines() if "otpipe:" in line]
    assert lines == [
        "otpipe: 6 ranks were started for a model of 5 layers; start between 1 and 5 "
        "(torchrun --nproc_per_node)"
    ]
    assert process.returncode != 0


def test_an_unknown_option_is_said_once(model: Path) -> None:
    process = start_torchrun(model, 2, "--prot=0")
    out, _ = process.communicate(timeout=90)
    assert out.count("No such option") == 1, out
    assert process.returncode != 0


def test_a_rank_that_dies_while_loading_is_named(model: Path) -> None:
    """Loading is when a rank runs out of memory and the kernel kills it."""
    process = start_torchrun(model, 2, "--port=0", f"--threads={os.cpu_count()}")
    server = TorchrunServer(process, "")
    try:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line)
            if "holds" in line:
                break
        pid = server.rank_pids()[1]
        os.kill(pid, signal.SIGKILL)
        started_s = time.monotonic()
        rest, _ = process.communicate(timeout=40)
        assert time.monotonic() - started_s < END_LIMIT_S
        assert f"otpipe: rank 1 (pid {pid}) died" in rest
        assert process.returncode != 0
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--host=0.0.0.0"], "--host 0.0.0.0 is reachable from other machines: give --tls-cert"),
        (["--model=/no/such/directory"], "/no/such/directory"),
    ],
)
def test_refused_starts(model: Path, args: list[str], sentence: str) -> None:
    started_s = time.monotonic()
    ended = serve_alone(f"--model={model}", "--port=0", *args)
    assert ended.returncode == EXIT_USAGE
    assert sentence in ended.stderr
    assert re.fullmatch(r"otpipe: [^\n]+\n", ended.stderr), ended.stderr
    assert not ended.stdout
    assert time.monotonic() - started_s < 30
