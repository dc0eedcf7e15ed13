"""A real server of private weights under torchrun: two ranks over gloo, the bundled model."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from servers import SAMPLE, TorchrunServer, torchrun_server

from otpipe import Client
from otpipe.cli import main
from otpipe.errors import ConnectionLost
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor
from otpipe.serve import main as serve

pytestmark = pytest.mark.slow

PROMPT = "And it came"
NUM_TOKENS = 3
EXIT_RANK_DIED = 70


def plaintext_tokens(prompt_ids: list[int], count: int) -> list[int]:
    """Greedy tokens of the model in float32, not quantised."""
    executor = PlaintextExecutor.from_checkpoint(SAMPLE, quantised=False)
    cache, tokens, pending = executor.new_cache(), list[int](), prompt_ids
    while len(tokens) < count:
        logits = forward(executor, pending, cache)
        assert logits is not None
        tokens.append(int(logits[0].argmax()))
        pending = tokens[-1:]
    return tokens


def otpipe(*args: str) -> str:
    ended = CliRunner().invoke(main, args, env={"OTPIPE_SERVER": "", "OTPIPE_STORE": ""})
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


def test_private_weights_are_the_default() -> None:
    (weights,) = [option for option in serve.params if option.name == "weights"]
    assert weights.default == "private"


def test_from_the_command_line_to_a_dead_rank(tmp_path: Path) -> None:
    """Prepare and generate on the command line, then lose a rank in the middle of a pass."""
    with torchrun_server("sample", 2, "--weights=private", "--audit") as server:
        where = ("--server", server.address, "--store", str(tmp_path))
        assert "32 are free" in otpipe("prepare", *where, "--slots", "32")
        text = otpipe(
            *("generate", *where, "--prompt", PROMPT, "--raw", "--json"),
            *("--max-new-tokens", str(NUM_TOKENS)),
        )
        generation = json.loads(text)
        facts = json.loads(otpipe("info", *where, "--json"))
        with Client(server.address, tmp_path) as client:
            prompt_ids = client.encode(PROMPT, raw=True)
            assert generation["token_ids"] == plaintext_tokens(prompt_ids, NUM_TOKENS)
            assert facts["weights"] == "private"
            assert_a_dead_rank_shows(server, client)
        assert server.wait(20) != 0
    said = server.log_text()
    assert "holds 13 of 26 maps" in said
    assert "rank 1" in said
    assert "otpipe/server" not in said, said


def assert_a_dead_rank_shows(server: TorchrunServer, client: Client) -> None:
    """Within seconds, to a client that is in the middle of a pass."""
    pids = server.rank_pids()
    pieces = client.generate_ids([5, 6, 7], 8)
    next(pieces)
    killed_s: list[float] = []

    def kill() -> None:
        killed_s.append(time.monotonic())
        os.kill(pids[1], signal.SIGKILL)

    threading.Timer(0.3, kill).start()
    with pytest.raises(ConnectionLost):
        list(pieces)
    assert killed_s
    assert time.monotonic() - killed_s[0] < 10
