"""The command line: what it prints where, its exit codes, and a sentence for every misuse."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result, _NamedTextIOWrapper
from servers import SAMPLE, LocalServer, local_server

from otpipe import Client
from otpipe.cli import main
from otpipe.client.client import Generation

GENERATION_KEYS = ["text", "token_ids", "prompt_tokens", "finish_reason", "stats"]
STATS_KEYS = [
    "tokens_per_s",
    "bytes_sent",
    "bytes_received",
    "round_trips",
    "slots_used",
    "prepare_s",
    "prefill_s",
]
EXIT_USAGE, EXIT_FAILURE = 2, 1


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with local_server(SAMPLE) as serving:
        yield serving


@pytest.fixture(scope="module")
def store(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with slots for all tests of this module."""
    path = tmp_path_factory.mktemp("store")
    ended = run("prepare", "--server", server.address, "--store", str(path), "--slots", "512")
    assert ended.exit_code == 0, ended.stderr
    assert re.fullmatch(
        r"prepared 512 slots in [\d.]+ s \([\d.]+ slots/s, [\d.]+ MB up, [\d.]+ MB down\); "
        r"512 are free\n",
        ended.stdout,
    )
    return path


def run(*args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(
        main, args, input=stdin, env={"OTPIPE_SERVER": "", "OTPIPE_STORE": ""}
    )


def generate(server: LocalServer, store: Path, *args: str, stdin: bytes | None = None) -> Result:
    return run(
        *("generate", "--server", server.address, "--store", str(store)),
        *("--max-new-tokens", "4", "--retry-for", "1", *args),
        stdin=stdin,
    )


def says(ended: Result, sentence: str, exit_code: int) -> None:
    """One line on stderr, nothing on stdout, the right exit code, no traceback."""
    assert ended.exit_code == exit_code, (ended.stdout, ended.stderr)
    assert not ended.stdout
    assert re.search(sentence, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.exception is None or isinstance(ended.exception, SystemExit)


def own_process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "otpipe.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OTPIPE_SERVER": "", "OTPIPE_STORE": ""},
    )


# -- what comes out --------------------------------------------------------------------------------


def test_generate_prints_text_on_stdout_and_figures_on_stderr(
    server: LocalServer, store: Path
) -> None:
    text = generate(server, store, "--prompt", "In the beginning")
    assert text.exit_code == 0, text.stderr
    assert re.fullmatch(
        r"otpipe: [\d.]+ tokens/s, [\d.]+ MB up, [\d.]+ MB down, \d+ round trips, \d+ slots used\n",
        text.stderr,
    )
    as_json = generate(server, store, "--prompt", "In the beginning", "--json")
    assert not as_json.stderr
    assert json.loads(as_json.stdout)["text"] + "\n" == text.stdout


def test_chat_answers_a_line_at_a_time_and_feeds_what_is_new(
    server: LocalServer, store: Path
) -> None:
    where = ("--server", server.address, "--store", str(store), "--max-new-tokens", "3")
    free = free_slots(store)
    ended = run("chat", *where, stdin=b"In the beginning\n and the earth\n\n")
    assert ended.exit_code == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 2, ended.stdout
    alone = generate(server, store, "--prompt", "In the beginning", "--max-new-tokens", "3")
    assert lines[0] == alone.stdout.rstrip("\n")
    with Client(server.address, store) as client:
        turns = [client.encode("In the beginning"), client.encode(" and the earth")]
    # 3 tokens an answer, of which the last is fed with the next turn; `generate` spent the same.
    first = len(turns[0]) + 2
    assert free - free_slots(store) == 2 * first + (1 + len(turns[1])) + 2


def free_slots(store: Path) -> int:
    return int(json.loads(run("slots", "--store", str(store), "--json").stdout)[0]["slots_free"])


def test_json_has_exactly_the_documented_keys(server: LocalServer, store: Path) -> None:
    ended = generate(server, store, "--prompt", "In the beginning", "--json")
    generation = json.loads(ended.stdout)
    assert list(generation) == GENERATION_KEYS
    assert list(generation["stats"]) == STATS_KEYS
    assert len(generation["token_ids"]) == 4
    assert generation["finish_reason"] == "length"
    stats = generation["stats"]
    assert stats["slots_used"] == generation["prompt_tokens"] + 3
    assert stats["prepare_s"] == 0
    assert min(stats["bytes_sent"], stats["bytes_received"], stats["round_trips"]) > 0
    assert min(stats["tokens_per_s"], stats["prefill_s"]) > 0


def test_prompt_from_file_and_stdin(server: LocalServer, store: Path, tmp_path: Path) -> None:
    prompt = "Grüße, and so on"
    file = tmp_path / "prompt.txt"
    file.write_text(prompt, "utf-8")
    answers = [
        generate(server, store, "--prompt", prompt).stdout,
        generate(server, store, "--prompt-file", str(file)).stdout,
        generate(server, store, "--prompt-file", "-", stdin=prompt.encode()).stdout,
    ]
    assert answers[0]
    assert answers == [answers[0]] * 3


def test_a_seed_repeats_sampling(server: LocalServer, store: Path) -> None:
    args = ("--prompt", "Once", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "50")
    answers = {generate(server, store, *args, "--seed", "7", "--raw").stdout for _ in range(2)}
    assert len(answers) == 1


def test_info(server: LocalServer, store: Path) -> None:
    args = ("info", "--server", server.address, "--store", str(store))
    facts = json.loads(run(*args, "--json").stdout)
    assert facts["fingerprint"] == server.bundle.fingerprint
    assert facts["weights"] == "public"
    assert facts["layers"] == server.bundle.spec.num_layers
    text = run(*args).stdout
    assert re.search(rf"^fingerprint +{server.bundle.fingerprint}$", text, re.MULTILINE)


def test_slots_are_listed_beside_a_client_that_draws(server: LocalServer, store: Path) -> None:
    with Client(server.address, store) as client:
        ended = run("slots", "--store", str(store), "--json")
        batches = json.loads(ended.stdout)
        assert sum(batch["slots_free"] for batch in batches) == client.free_slots
    assert {batch["fingerprint"] for batch in batches} == {server.bundle.fingerprint}
    text = run("slots", "--store", str(store), "--server", server.address)
    assert text.exit_code == 0
    assert re.search(r"of 512 free .* MB .* h old", text.stdout)


def test_slots_of_an_empty_store(tmp_path: Path) -> None:
    ended = run("slots", "--store", str(tmp_path))
    assert ended.exit_code == 0
    assert ended.stdout.startswith("no slots under ")
    assert json.loads(run("slots", "--store", str(tmp_path), "--json").stdout) == []


@pytest.mark.parametrize(
    ("terminal", "options", "shown"),
    [
        (True, [], "a\tb\n[2J]0;x31mé\u0600c"),
        (False, [], "a\tb\n\x1b[2J\x1b]0;x\x07\x9b31m\r\x7fé\u0600c"),
        (True, ["--json"], None),
    ],
    ids=["terminal", "pipe", "json"],
)
def test_generated_text_does_not_steer_a_terminal(
    server: LocalServer,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    options: list[str],
    shown: str | None,
) -> None:
    text = "a\tb\n\x1b[2J\x1b]0;x\x07\x9b31m\r\x7fé\u0600c"

    def answer(client: Client, *_: object, **__: object) -> Iterator[str]:
        client.last = Generation(text=text)
        yield from text  # a sequence may be cut anywhere

    monkeypatch.setattr(Client, "generate", answer)
    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda _: terminal, raising=False)
    ended = generate(server, store, "--prompt", "x", *options)
    assert ended.exit_code == 0, ended.stderr
    printed = ended.stdout_bytes.decode()
    if shown is None:
        assert json.loads(printed)["text"] == text
    else:
        assert printed == shown + "\n"


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "give either --prompt TEXT or --prompt-file FILE"),
        (["--prompt", "x", "--prompt-file", "y"], "give either --prompt TEXT or --prompt-file"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: No such file"),
        (["--prompt-file", "/"], "--prompt-file /: Is a directory"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "x", "--top-k", "-3"], "top_k is -3"),
        (["--prompt", "x", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["--prompt", "x", "--temperature", "hot"], "'hot' is not a valid float"),
        (["--prompt", "x", "--fingerprint", "f" * 64], "ffff"),
        (["--prompt", "x", "--fingerprint", "f" * 31], "is not at least 32 hex digits"),
        (["--prompt", "x", "--ca", "/no/such/file"], "--ca /no/such/file cannot be used"),
    ],
)
def test_misuse_of_generate(
    server: LocalServer, store: Path, args: list[str], sentence: str
) -> None:
    ended = generate(server, store, *args)
    says(ended, sentence, EXIT_FAILURE if sentence == "ffff" else EXIT_USAGE)


def test_a_prompt_that_is_not_utf8(server: LocalServer, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"caf\xe9")
    says(
        generate(server, store, "--prompt-file", str(file)),
        r"prompt\.bin is not UTF-8: .* byte 0xe9 in position 3",
        EXIT_USAGE,
    )
    says(generate(server, store, "--prompt-file", "-", stdin=b"\xff"), "- is not UTF-8", EXIT_USAGE)


def test_a_prompt_longer_than_the_context(server: LocalServer, store: Path) -> None:
    positions = server.bundle.spec.max_positions
    ended = generate(server, store, "--prompt", "word " * (2 * positions))
    says(ended, rf"prompt has \d+ tokens and the model {positions} positions; shorten", EXIT_USAGE)


@pytest.mark.parametrize("address", ["nonsense", "host:", ":7431", "host:0", "host:99999", "h:x"])
def test_a_bad_server_address(address: str, tmp_path: Path) -> None:
    for command in (["info"], ["generate", "--prompt", "x"], ["prepare"], ["slots"]):
        ended = run(*command, "--server", address, "--store", str(tmp_path))
        says(ended, f"the server address '{address}' is not HOST:PORT, as ", EXIT_USAGE)


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    started_s = time.monotonic()
    ended = run(
        *("info", "--server", f"127.0.0.1:{port}", "--store", str(tmp_path), "--retry-for", "1")
    )
    assert 0.5 < time.monotonic() - started_s < 3
    says(ended, rf"no server at 127\.0\.0\.1:{port} answered within 1 s", EXIT_FAILURE)


def test_the_server_is_required() -> None:
    says(run("generate", "--prompt", "x"), "Missing option '--server'", EXIT_USAGE)


def test_a_store_in_use(server: LocalServer, store: Path) -> None:
    with Client(server.address, store):
        ended = generate(server, store, "--prompt", "x")
    says(ended, "store|lock", EXIT_FAILURE)
    assert f"pid {os.getpid()}" in ended.stderr or "another" in ended.stderr.lower()


def test_a_store_that_cannot_be_written(server: LocalServer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    ended = generate(server, file, "--prompt", "x")
    says(ended, "'--store': Directory .* is a file", EXIT_USAGE)


# -- processes of their own ------------------------------------------------------------------------


def test_help_is_fast_and_does_not_load_torch() -> None:
    code = "import sys, otpipe.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    times_s = []
    for _ in range(2):
        started_s = time.monotonic()
        out, _ = own_process("--help").communicate(timeout=20)
        times_s.append(time.monotonic() - started_s)
        assert all(command in out for command in ("prepare", "generate", "info", "slots"))
    assert min(times_s) < 1


@pytest.mark.slow
def test_slots_are_prepared_without_being_asked(server: LocalServer, tmp_path: Path) -> None:
    process = own_process(
        *("generate", "--server", server.address, "--store", str(tmp_path), "--json"),
        *("--prompt", "In the beginning", "--max-new-tokens", "3"),
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    generation = json.loads(out)
    assert generation["stats"]["prepare_s"] > 0
    assert "preparing" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "generate"])
def test_ctrl_c(server: LocalServer, store: Path, tmp_path: Path, command: str) -> None:
    """Ends soon with 130 and one sentence; what was finished before is still there."""
    with Client(server.address, store) as client:
        free_before = client.free_slots
    if command == "prepare":
        args = ["prepare", "--slots", "20000"]
    else:
        args = ["generate", "--prompt", "Once", "--max-new-tokens", "200"]
    process = own_process(*args, "--server", server.address, "--store", str(store))
    assert process.stdout is not None
    if command == "generate":
        process.stdout.read(1)
    else:
        time.sleep(5)
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - started_s < 10
    assert process.returncode == 130, err
    assert "otpipe: interrupted; slots drawn so far are spent" in err
    assert "Traceback" not in err
    with Client(server.address, store) as client:
        assert client.free_slots > free_before - 260


def test_a_closed_pipe_is_no_traceback(server: LocalServer, store: Path) -> None:
    process = own_process(
        *("generate", "--server", server.address, "--store", str(store)),
        *("--prompt", "Once", "--max-new-tokens", "8"),
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) != 0
    assert "Traceback" not in err
