"""Opening and loading checkpoints; every way in which one can be unusable."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case
from checkpoints import build_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from otpipe.errors import CheckpointError
from otpipe.model import quantize
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.program import forward
from otpipe.model.quantize import quantize_rows
from otpipe.model.reference import PlaintextExecutor
from otpipe.model.safetensors_file import StoredTensor

CaseDirectory = Callable[[Case], Path]
BY_NAME = {case.name: case for case in CASES}
UNTIED = BY_NAME["qwen2_gqa_3_heads_1_kv"]
TIED = BY_NAME["qwen2_tied_6_heads_2_kv_bf16"]
SHARDED = BY_NAME["qwen2_sharded_fp16"]
FILE = "model.safetensors"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors, read by the format's own library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_maps_are_the_quantised_stacked_tensors(case: Case, case_directory: CaseDirectory) -> None:
    directory = case_directory(case)
    checkpoint = Checkpoint.open(directory)
    tensors = tensors_of(directory)
    maps = checkpoint.load_maps(range(len(checkpoint.spec.maps)))
    assert sorted(maps) == list(range(len(checkpoint.spec.maps)))
    for linear_map in checkpoint.spec.maps:
        loaded = maps[linear_map.index]
        layer = f"model.layers.{linear_map.layer}."
        names = {
            "embed": ["model.embed_tokens"],
            "lm_head": ["model.embed_tokens" if checkpoint.spec.tied_embeddings else "lm_head"],
            "qkv": [f"{layer}self_attn.{p}_proj" for p in "qkv"],
            "o": [f"{layer}self_attn.o_proj"],
            "gate_up": [f"{layer}mlp.{p}_proj" for p in ("gate", "up")],
            "down": [f"{layer}mlp.down_proj"],
        }[linear_map.kind]
        rows, scale = quantize_rows(torch.cat([tensors[f"{name}.weight"] for name in names]))
        weight = rows.t() if linear_map.kind == "embed" else rows
        assert weight.shape == (linear_map.out_features, linear_map.in_features)
        assert torch.equal(loaded.weight, weight)
        assert torch.equal(loaded.scale, scale)
        wide = weight.double()
        assert loaded.max_row_l2 == math.sqrt(wide.square().sum(1).max())
        assert loaded.max_row_l1 == float(wide.abs().sum(1).max())
        if linear_map.has_bias:
            bias = torch.cat([tensors[f"{name}.bias"] for name in names]).float()
            assert loaded.bias is not None and torch.equal(loaded.bias, bias)
            assert bias.abs().max() > 0
        else:
            assert loaded.bias is None


def test_small_chunks_change_nothing(
    case_directory: CaseDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(case_directory(SHARDED))
    indices = range(len(checkpoint.spec.maps))
    whole = checkpoint.load_maps(indices)
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 500)
    chunked = checkpoint.load_maps(indices)
    for index in indices:
        assert torch.equal(chunked[index].weight, whole[index].weight)
        assert torch.equal(chunked[index].scale, whole[index].scale)
        assert chunked[index].digest == whole[index].digest
        assert chunked[index].max_row_l2 == whole[index].max_row_l2
        assert chunked[index].max_row_l1 == whole[index].max_row_l1


def test_tied_maps_share_one_tensor(case_directory: CaseDirectory) -> None:
    checkpoint = Checkpoint.open(case_directory(TIED))
    head_index = checkpoint.spec.map_index("lm_head")
    maps = checkpoint.load_maps([head_index, 0])
    assert maps[0].weight.data_ptr() == maps[head_index].weight.data_ptr()
    assert maps[0].scale is maps[head_index].scale
    assert maps[0].digest == maps[head_index].digest
    alone = checkpoint.load_maps([head_index])[head_index]
    assert torch.equal(alone.weight, maps[head_index].weight)


def test_only_the_wanted_bytes_are_read(
    case_directory: CaseDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(case_directory(SHARDED))
    read_names = []
    row_chunks = StoredTensor.row_chunks

    def recording(self: StoredTensor, num_rows: int) -> Any:
        read_names.append(self.name)
        return row_chunks(self, num_rows)

    monkeypatch.setattr(StoredTensor, "row_chunks", recording)
    reported: list[int] = []
    indices = [checkpoint.spec.map_index("qkv", 1), checkpoint.spec.map_index("down", 2)]
    checkpoint.load_maps(indices, progress=reported.append)
    prefix = "model.layers.1.self_attn."
    assert sorted(read_names) == sorted(
        [f"{prefix}{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
        + ["model.layers.2.mlp.down_proj.weight"]
    )
    assert sum(reported) == checkpoint.num_bytes(indices)


def test_progress_of_a_tied_model_adds_up(case_directory: CaseDirectory) -> None:
    checkpoint = Checkpoint.open(case_directory(TIED))
    indices = range(len(checkpoint.spec.maps))
    reported: list[int] = []
    checkpoint.load_maps(indices, progress=reported.append)
    assert sum(reported) == checkpoint.num_bytes(indices)


def test_norms_are_float32_in_program_order(case_directory: CaseDirectory) -> None:
    directory = case_directory(SHARDED)
    checkpoint = Checkpoint.open(directory)
    norms = checkpoint.load_norms()
    assert tuple(norms) == checkpoint.spec.norm_names
    tensors = tensors_of(directory)
    assert torch.equal(norms["final_norm"], tensors["model.norm.weight"].float())
    stored = tensors["model.layers.2.post_attention_layernorm.weight"]
    assert torch.equal(norms["layers.2.post_attention_norm"], stored.float())
    assert all(norm.dtype == torch.float32 for norm in norms.values())


def test_unneeded_extra_tensors_are_ignored(case_directory: CaseDirectory, tmp_path: Path) -> None:
    directory = copy_of(case_directory(TIED), tmp_path)
    want = Checkpoint.open(directory).load_maps([0, 9])
    tensors = tensors_of(directory)
    edit(
        directory,
        {
            "lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"]),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
            "model.rotary_emb.inv_freq": torch.ones(5),
        },
    )
    got = Checkpoint.open(directory).load_maps([0, 9])
    assert [m.digest for m in got.values()] == [m.digest for m in want.values()]
    executor = PlaintextExecutor.from_checkpoint(directory, quantised=False)
    logits = forward(executor, TOKENS, executor.new_cache())
    assert logits is not None and logits.abs().max() > 0


def test_single_file_is_preferred_to_an_index(
    case_directory: CaseDirectory, tmp_path: Path
) -> None:
    directory = copy_of(case_directory(UNTIED), tmp_path)
    (directory / "model.safetensors.index.json").write_text("damaged")
    assert Checkpoint.open(directory).spec.num_layers == 2


# --- refusals ---------------------------------------------------------------------------------


def copy_of(directory: Path, target: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(directory, target / "copy"))


def edit(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    tensors: dict[str, Any] = tensors_of(directory) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / FILE)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(directory)
    return str(raised.value)


@pytest.fixture
def untied(case_directory: CaseDirectory, tmp_path: Path) -> Path:
    return copy_of(case_directory(UNTIED), tmp_path)


@pytest.fixture
def sharded(case_directory: CaseDirectory, tmp_path: Path) -> Path:
    return copy_of(case_directory(SHARDED), tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    assert "is not a directory; give the folder" in refusal(tmp_path / "absent")


def test_missing_or_damaged_config(untied: Path) -> None:
    config = untied / "config.json"
    config.write_text("{")
    assert refusal(untied).startswith("config.json is not valid JSON")
    config.write_text("[1]")
    assert refusal(untied) == "config.json holds list, not a JSON object"
    config.unlink()
    assert "has no config.json; give the folder of a Hugging Face checkpoint" in refusal(untied)


def test_pickled_weights_are_never_opened(untied: Path) -> None:
    (untied / FILE).unlink()
    assert "has neither model.safetensors nor" in refusal(untied)
    (untied / "pytorch_model.bin").write_bytes(b"c__builtin__\nprint\n(S'executed'\ntR.")
    message = refusal(untied)
    assert "holds only pickled weights (pytorch_model.bin), which otpipe never opens" in message
    assert "supported is safetensors" in message


@pytest.mark.parametrize("missing_bytes", [1, 1000])
def test_truncated_file(untied: Path, missing_bytes: int) -> None:
    path = untied / FILE
    data = path.read_bytes()
    path.write_bytes(data[:-missing_bytes])
    assert refusal(untied) == (
        f"model.safetensors is truncated: expected {len(data)} bytes, found"
        f" {len(data) - missing_bytes}; download it again"
    )


def test_truncated_shard_and_header(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    path.write_bytes(data[:100])
    expected = f"{path.name} is truncated: expected {8 + header_bytes} bytes, found 100;"
    assert refusal(sharded).startswith(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file (it starts with b'' and has 0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it starts with b'version '"),
        ((9).to_bytes(8, "little") + b"{not json", "has a damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "has a damaged safetensors header"),
        ((10).to_bytes(8, "little") + b'{"a":null}', "has a damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"{} ", "has 11 bytes where its header describes 10"),
    ],
)
def test_files_of_another_kind(untied: Path, content: bytes, message: str) -> None:
    (untied / FILE).write_bytes(content)
    assert message in refusal(untied)
    assert refusal(untied).startswith(FILE)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": 4, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
    ],
)
def test_inconsistent_headers(untied: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"x": entry}).encode()
    (untied / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert refusal(untied).startswith("model.safetensors has a damaged safetensors header")


def test_index_errors(sharded: Path) -> None:
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name, shard = next(iter(index["weight_map"].items()))

    moved = index["weight_map"] | {"extra.weight": shard}
    index_path.write_text(json.dumps({"weight_map": moved}))
    assert refusal(sharded).startswith(f"{shard} lacks tensor 'extra.weight'")
    index_path.write_text(json.dumps({"weight_map": {name: "../other.safetensors"}}))
    assert "names the shard '../other.safetensors', not a file name" in refusal(sharded)
    index_path.write_text("{}")
    assert "has no 'weight_map'" in refusal(sharded)
    index_path.write_text(json.dumps(index))
    (sharded / shard).unlink()
    assert f"names the shard {shard}, which is missing" in refusal(sharded)


def test_missing_tensors(untied: Path) -> None:
    edit(untied, {"model.layers.1.mlp.up_proj.weight": None, "lm_head.weight": None})
    assert refusal(untied).startswith(
        "the checkpoint lacks tensor 'model.layers.1.mlp.up_proj.weight' and 1 more that its"
    )


def test_wrong_shape(untied: Path) -> None:
    edit(untied, {"model.layers.0.self_attn.k_proj.weight": torch.zeros((17, 48))})
    assert refusal(untied) == (
        "tensor 'model.layers.0.self_attn.k_proj.weight' in model.safetensors has shape [17, 48],"
        " but config.json implies [16, 48]"
    )


def test_wrong_dtype(untied: Path) -> None:
    wrong = torch.zeros((16, 48), dtype=torch.int8)
    edit(untied, {"model.layers.0.self_attn.k_proj.weight": wrong})
    assert "has dtype I8; supported are BF16, F16, F32" in refusal(untied)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight_scale",
    ],
)
def test_layer_tensors_that_would_be_ignored(untied: Path, name: str) -> None:
    edit(untied, {name: torch.ones(16)})
    assert refusal(untied).startswith(f"the checkpoint holds tensor {name!r}, which a 'qwen2'")


def test_fewer_layers_in_the_config_than_in_the_file(untied: Path) -> None:
    edit_config(untied, num_hidden_layers=1, layer_types=None)
    assert refusal(untied).endswith("but config.json has only 1 layers")


def test_unsupported_config_is_refused_before_the_weights_are_looked_at(untied: Path) -> None:
    (untied / FILE).unlink()
    edit_config(untied, quantization_config={"quant_method": "gptq"})
    assert "quantization_config (gptq)" in refusal(untied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.v_proj.bias"],
)
def test_non_finite_weights(
    untied: Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 4 * 48)
    damaged = tensors_of(untied)[name]
    damaged[9] = value
    edit(untied, {name: damaged})
    checkpoint = Checkpoint.open(untied)
    checkpoint.load_maps([checkpoint.spec.map_index("qkv", 0)])
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load_maps([checkpoint.spec.map_index("qkv", 1)])
    assert str(raised.value).startswith(
        f"tensor {name!r} holds NaN or infinity (first in row 9); the checkpoint is damaged"
    )


def test_a_file_that_shrinks_while_it_is_read(untied: Path) -> None:
    checkpoint = Checkpoint.open(untied)
    (untied / FILE).write_bytes((untied / FILE).read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ended while .* was read"):
        checkpoint.load_maps(range(len(checkpoint.spec.maps)))


def test_build_checkpoint_really_shards(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not (tmp_path / FILE).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_loads_the_same_bits(case_directory: CaseDirectory) -> None:
    checkpoint = Checkpoint.open(case_directory(TIED))
    indices = range(len(checkpoint.spec.maps))
    on_cpu, on_cuda = checkpoint.load_maps(indices), checkpoint.load_maps(indices, "cuda")
    for index in indices:
        assert on_cuda[index].weight.is_cuda
        assert on_cuda[index].digest == on_cpu[index].digest
        assert torch.equal(on_cuda[index].scale, on_cpu[index].scale)
        assert on_cuda[index].max_row_l2 == on_cpu[index].max_row_l2
