"""The decoder program against transformers, and its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, run_case
from checkpoints import build_checkpoint, relative_error, transformers_logits, transformers_model

from otpipe.errors import UsageError
from otpipe.model import clear_ops
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.clear_ops import KVCache, RopeTables, inverse_frequencies
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor
from otpipe.model.spec import ModelSpec, RopeSpec

CaseDirectory = Callable[[Case], Path]


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_transformers(
    case: Case, quantised: bool, case_directory: CaseDirectory
) -> None:
    run_case(
        lambda directory: PlaintextExecutor.from_checkpoint(directory, quantised=quantised),
        case,
        case_directory(case),
        quantised=quantised,
        tolerance=1e-5,
    )


def test_from_quantised_maps_equals_from_checkpoint(case_directory: CaseDirectory) -> None:
    checkpoint = Checkpoint.open(case_directory(CASES[1]))
    maps = checkpoint.load_maps(range(len(checkpoint.spec.maps)))
    loaded = PlaintextExecutor.from_quantised_maps(checkpoint.spec, checkpoint.load_norms(), maps)
    opened = PlaintextExecutor.from_checkpoint(checkpoint, quantised=True)
    torch.testing.assert_close(
        forward(loaded, TOKENS, loaded.new_cache()),
        forward(opened, TOKENS, opened.new_cache()),
        rtol=0,
        atol=0,
    )


@pytest.fixture(scope="module")
def executor(case_directory: CaseDirectory) -> PlaintextExecutor:
    return PlaintextExecutor.from_checkpoint(case_directory(CASES[0]), quantised=False)


def test_logits_for_selects_rows(executor: PlaintextExecutor) -> None:
    all_rows = forward(executor, TOKENS, executor.new_cache(), "all")
    last_row = forward(executor, TOKENS, executor.new_cache(), "last")
    assert all_rows is not None and last_row is not None
    assert last_row.shape == (1, executor.spec.vocab_size)
    torch.testing.assert_close(last_row, all_rows[-1:], rtol=1e-5, atol=1e-5)

    cache = executor.new_cache()
    assert forward(executor, TOKENS[:-1], cache, "none") is None
    assert cache.length == len(TOKENS) - 1
    continued = forward(executor, TOKENS[-1:], cache, "last")
    torch.testing.assert_close(continued, last_row, rtol=1e-5, atol=1e-5)


def test_a_long_text_grows_the_cache_and_blocks_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(tmp_path, max_positions=1024)
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 101, (700,), generator=generator).tolist()
    monkeypatch.setattr(clear_ops, "_BLOCK_ROWS", 64)
    executor = PlaintextExecutor.from_checkpoint(tmp_path, quantised=False)
    want = transformers_logits(transformers_model(tmp_path), token_ids)

    cache = executor.new_cache()  # 256 positions at first
    chunks = [token_ids[:250], token_ids[250:690]] + [[token] for token in token_ids[690:]]
    passes = [forward(executor, chunk, cache, "all") for chunk in chunks]
    got = torch.cat([logits for logits in passes if logits is not None])
    assert relative_error(got, want) <= 1e-5


def test_an_interrupted_pass_can_be_repeated(case_directory: CaseDirectory) -> None:
    class Failing(PlaintextExecutor):
        remaining = -1

        def linear(self, linear_map: Any, x: torch.Tensor) -> torch.Tensor:
            self.remaining -= 1
            if self.remaining == 0:
                raise ConnectionError
            return super().linear(linear_map, x)

    executor = Failing.from_checkpoint(case_directory(CASES[0]), quantised=False)
    want = forward(executor, TOKENS, executor.new_cache())

    cache = executor.new_cache()
    forward(executor, TOKENS[:5], cache, "none")
    executor.remaining = 6  # in the second layer
    with pytest.raises(ConnectionError):
        forward(executor, TOKENS[5:], cache)
    assert cache.length == 5
    got = forward(executor, TOKENS[5:], cache)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_cache_growth_is_geometric_and_keeps_what_was_written() -> None:
    spec = _spec(max_positions=1000)
    cache = KVCache(spec, capacity=4)
    generator = torch.Generator().manual_seed(0)
    written = torch.randn((300, 2, spec.num_kv_heads, spec.head_dim), generator=generator)
    storages = set()
    for position in range(300):
        row = written[position : position + 1]
        keys, values = cache.append(0, row[:, 0], row[:, 1])
        cache.advance(1)
        storages.add(keys.untyped_storage().data_ptr())
        assert keys.shape == (spec.num_kv_heads, position + 1, spec.head_dim)
    assert torch.equal(keys, written[:, 0].transpose(0, 1))
    assert torch.equal(values, written[:, 1].transpose(0, 1))
    assert len(storages) <= 15


def test_rope_tables_extend_without_changing_earlier_rows() -> None:
    rope = RopeSpec(1e6, "llama3", 32.0, 1.0, 4.0, 8192)
    tables = RopeTables(rope, 128)
    early = [table.clone() for table in tables.rows(3, 9)]
    cos, sin = tables.rows(5000, 5001)
    assert torch.equal(tables.rows(3, 9)[0], early[0])
    assert torch.equal(tables.rows(3, 9)[1], early[1])
    angles = 5000 * inverse_frequencies(rope, 128)
    torch.testing.assert_close(cos.flatten(), torch.cat((angles, angles)).cos())
    torch.testing.assert_close(sin.flatten(), torch.cat((-angles.sin(), angles.sin())))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "There is no token to process; give a prompt of at least one token."),
        ([3, 101], "Token 101 is outside the vocabulary of 101;"),
        ([-1], "Token -1 is outside the vocabulary of 101;"),
        ([1] * 513, "The text would reach 513 tokens, but the model has 512 positions;"),
    ],
)
def test_impossible_tokens_are_refused_before_any_work(
    executor: PlaintextExecutor, token_ids: Sequence[int], message: str
) -> None:
    cache = executor.new_cache()
    with pytest.raises(UsageError) as raised:
        forward(executor, token_ids, cache)
    assert str(raised.value).startswith(message)
    assert cache.length == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_on_cuda(case: Case, case_directory: CaseDirectory) -> None:
    run_case(
        lambda directory: PlaintextExecutor.from_checkpoint(
            directory, quantised=True, device="cuda"
        ),
        case,
        case_directory(case),
        tolerance=2e-5,
    )


def _spec(**changes: Any) -> ModelSpec:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": changes.get("max_positions", 64),
    }
    return ModelSpec.from_config(config)
