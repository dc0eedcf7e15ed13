"""The private executor runs the common cases, over a real connection, with real pads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, TOKENS, Case, run_case
from checkpoints import relative_error
from servers import local_server

from otpipe import Client
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor

CaseDirectory = Callable[[Case], Path]
TOLERANCE = 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_plaintext(case: Case, case_directory: CaseDirectory, tmp_path: Path) -> None:
    directory = case_directory(case)
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(len(case.token_ids))
        run_case(lambda _: client.mode.executor, case, directory, tolerance=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_of_single_rows_equal_plaintext(
    case: Case, case_directory: CaseDirectory, tmp_path: Path
) -> None:
    directory = case_directory(case)
    row_by_row = replace(case, chunks=(1,) * len(case.token_ids))
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(len(case.token_ids))
        run_case(lambda _: client.mode.row_executor, row_by_row, directory, tolerance=TOLERANCE)
        assert client.mode.row_executor.slots_used == len(case.token_ids)


def test_both_executors_share_a_cache(case_directory: CaseDirectory, tmp_path: Path) -> None:
    directory = case_directory(CASES[0])
    reference = PlaintextExecutor.from_checkpoint(directory, quantised=True)
    want = forward(reference, TOKENS, reference.new_cache(), "last")
    assert want is not None
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(len(TOKENS))
        cache = client.mode.executor.new_cache()
        forward(client.mode.executor, TOKENS[:5], cache, "none")
        forward(client.mode.row_executor, TOKENS[5:6], cache, "none")
        forward(client.mode.executor, TOKENS[6:-1], cache, "none")
        logits = forward(client.mode.row_executor, TOKENS[-1:], cache)
    assert logits is not None
    assert relative_error(torch.from_numpy(logits), want) < TOLERANCE


def test_the_row_executor_refuses_two_rows(case_directory: CaseDirectory, tmp_path: Path) -> None:
    directory = case_directory(CASES[0])
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        with pytest.raises(ValueError, match="2 tokens for an executor of single rows"):
            client.mode.row_executor.embed([1, 2])
        assert client.mode.row_executor.slots_used == 0


@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_every_number_of_ranks_gives_the_same_tokens(
    num_layers: int, case_directory: CaseDirectory, tmp_path: Path
) -> None:
    """Three models; the final norm and the lm_head land on every rank."""
    options = {"num_layers": num_layers, "seed": num_layers, "tied": num_layers == 4}
    directory = Case(f"ranks_{num_layers}", options).build(tmp_path / "model")
    reference = PlaintextExecutor.from_checkpoint(directory, quantised=True)
    answers = []
    for world_size in (1, 2, 3, 4)[:num_layers]:
        with (
            local_server(directory, world_size) as server,
            Client(server.address, tmp_path / f"store{world_size}") as client,
        ):
            tokens = list(client.generate_ids(TOKENS, 8))
            logits = client.forward(TOKENS)
        answers.append(tokens)
        want = forward(reference, TOKENS, reference.new_cache(), "all")
        assert want is not None
        assert relative_error(logits, want) < TOLERANCE
    assert all(tokens == answers[0] for tokens in answers)
    assert answers[0] == _greedy(reference, TOKENS, 8)


def _greedy(executor: PlaintextExecutor, prompt: tuple[int, ...], count: int) -> list[int]:
    cache = executor.new_cache()
    tokens: list[int] = []
    pending = list(prompt)
    for _ in range(count):
        logits = forward(executor, pending, cache)
        assert logits is not None
        tokens.append(int(logits[0].argmax()))
        pending = [tokens[-1]]
    return tokens


def test_forward_is_float32_with_a_row_a_token(
    case_directory: CaseDirectory, tmp_path: Path
) -> None:
    with (
        local_server(case_directory(CASES[0])) as server,
        Client(server.address, tmp_path) as client,
    ):
        logits = client.forward(list(TOKENS))
        assert logits.dtype == torch.float32
        assert logits.shape == (len(TOKENS), client.bundle.spec.vocab_size)
        assert client.free_slots == 2048 - len(TOKENS)


def test_a_pass_is_repeated_when_the_disk_lost_a_correction(
    case_directory: CaseDirectory, tmp_path: Path
) -> None:
    directory = case_directory(CASES[0])
    reference = PlaintextExecutor.from_checkpoint(directory, quantised=True)
    with local_server(directory) as server, Client(server.address, tmp_path) as client:
        client.prepare(64)
        (batch,) = (tmp_path / "pads").glob("*/*/corrections.bin")
        with batch.open("r+b") as file:  # the embedding's corrections of the first slots
            file.write(b"\xa5" * (2 * client.bundle.spec.hidden_size))
        tokens = list(client.generate_ids(TOKENS[:1], 4))
        assert client.last is not None
        assert client.last.stats.slots_used == 4 + 2, "two damaged slots were burnt"
    assert tokens == _greedy(reference, TOKENS[:1], 4)
