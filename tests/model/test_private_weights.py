"""The secret and the public part of a private model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from cases import CASES, Case
from checkpoints import build_checkpoint
from safetensors.torch import load_file, save_file

from otpipe.errors import CheckpointError, ProtocolError
from otpipe.model.checkpoint import Checkpoint, map_parts
from otpipe.model.private_description import (
    EMBEDDED_FORMATS,
    FORMATS,
    PrivateDescription,
    finest_exponent,
)
from otpipe.model.private_quantize import PrivateMap, dequantize_private, join_embedding
from otpipe.model.private_weights import PrivateWeights, load_private_maps, private_num_bytes
from otpipe.model.spec import (
    FINAL_NORM,
    LinearMap,
    input_norm_name,
    post_attention_norm_name,
)

CaseDirectory = Callable[[Case], Path]
Loaded = tuple[Checkpoint, dict[int, PrivateWeights], PrivateDescription]


def load(directory: Path) -> Loaded:
    checkpoint = Checkpoint.open(directory)
    weights = load_private_maps(checkpoint, range(len(checkpoint.spec.maps)))
    exponents = {index: each.exponents for index, each in weights.items()}
    return checkpoint, weights, PrivateDescription.of(checkpoint.spec, exponents)


def norm_before(linear_map: LinearMap) -> str | None:
    """The norm whose gain belongs into the columns of a map."""
    if linear_map.kind == "lm_head":
        return FINAL_NORM
    if linear_map.kind == "qkv":
        return input_norm_name(linear_map.layer)
    return post_attention_norm_name(linear_map.layer) if linear_map.kind == "gate_up" else None


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)
def test_maps_are_the_checkpoints_with_the_gains_folded(
    case: Case, case_directory: CaseDirectory
) -> None:
    checkpoint, weights, description = load(case_directory(case))
    spec, norms = checkpoint.spec, checkpoint.load_norms()
    for linear_map, shape in zip(spec.maps, description.maps, strict=True):
        loaded = weights[linear_map.index]
        stored = checkpoint.load_rows(map_parts(spec, linear_map))
        assert loaded.weight.shape == (shape.out_features, shape.in_features)
        assert all(shift >= 0 for shift in shape.shifts)
        if linear_map.kind == "embed":
            table = join_embedding(loaded.weight.t().long()) * 2.0 ** -loaded.exponents[0]
            assert float((table - stored).abs().max()) <= 0.501 * 2.0 ** -loaded.exponents[0]
            continue
        gain = norms[norm] if (norm := norm_before(linear_map)) else torch.ones(shape.in_features)
        whole = PrivateMap(loaded.weight, loaded.multipliers, loaded.exponents, shape.segments)
        folded = stored * gain
        error = (dequantize_private(whole) - folded).abs().amax(1) / folded.abs().amax(1)
        assert float(error.max()) < 0.5 / 127 * 1.3
        bias = checkpoint.load_bias(map_parts(spec, linear_map))
        assert (bias is None) == (loaded.bias is None)
        if bias is not None and loaded.bias is not None:
            assert float((loaded.bias * 2.0**-shape.out_frac - bias).abs().max()) < 1e-7


def test_tied_embeddings_are_two_private_maps(case_directory: CaseDirectory) -> None:
    checkpoint, weights, _ = load(case_directory(CASES[1]))
    assert checkpoint.spec.tied_embeddings
    head = len(checkpoint.spec.maps) - 1
    assert weights[head].weight.data_ptr() != weights[0].weight.data_ptr()
    # The gain is in the head: its columns are no longer those of the table.
    assert not torch.equal(weights[head].weight.abs().sum(0), weights[0].weight.t().abs().sum(0))


def test_some_maps_and_progress(case_directory: CaseDirectory) -> None:
    checkpoint, weights, _ = load(case_directory(CASES[2]))
    told: list[int] = []
    some = load_private_maps(checkpoint, [3, 0, 3], progress=told.append)
    assert sorted(some) == [0, 3] and sum(told) == private_num_bytes(checkpoint, [0, 3])
    for index, each in some.items():
        assert torch.equal(each.weight, weights[index].weight)
        assert torch.equal(each.multipliers, weights[index].multipliers)


def change(directory: Path, name: str, change_it: Callable[[torch.Tensor], object]) -> None:
    """Rewrite one tensor of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change_it(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_scales_are_clamped_where_the_output_has_no_finer_one(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    change(tmp_path, "model.layers.0.mlp.down_proj.weight", lambda w: w.mul_(1e-3))
    _, weights, description = load(tmp_path)
    down = description.spec.map_index("down", 0)
    assert weights[down].exponents == (finest_exponent("down"),)
    assert description.maps[down].shifts == (0,)


def test_weights_without_a_scale_are_refused(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    change(tmp_path, "model.layers.0.mlp.up_proj.weight", lambda w: w[3, 4].fill_(1e9))
    with pytest.raises(CheckpointError, match=r"layers\.0\.gate_up has weights .* too large"):
        load(tmp_path)


def test_a_bias_beyond_the_formats_is_refused(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    change(tmp_path, "model.layers.0.self_attn.k_proj.bias", lambda b: b[3].fill_(-4090.0))
    _, weights, description = load(tmp_path)
    bias = weights[description.spec.map_index("qkv", 0)].bias
    assert bias is not None and int(bias.min()) == -4090 << FORMATS.qkv.frac
    change(tmp_path, "model.layers.0.self_attn.k_proj.bias", lambda b: b[3].fill_(-5000.0))
    with pytest.raises(CheckpointError, match=r"layers\.0\.qkv has a bias of magnitude 5000"):
        load(tmp_path)


def test_a_gain_that_is_no_number_is_refused(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    change(tmp_path, "model.norm.weight", lambda w: w[5].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(tmp_path)


def test_formats_of_the_first_norms_follow_the_embedding(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    *_, description = load(tmp_path)
    assert description.norm_formats(0) is EMBEDDED_FORMATS
    assert description.norm_formats(1) is FORMATS and description.norm_formats(None) is FORMATS
    change(tmp_path, "model.embed_tokens.weight", lambda w: w[7, 0].fill_(1500.0))
    *_, description = load(tmp_path)
    assert description.norm_formats(0) is FORMATS


def test_messages(case_directory: CaseDirectory) -> None:
    *_, description = load(case_directory(CASES[5]))
    message = msgpack.unpackb(msgpack.packb(description.to_message()))
    assert PrivateDescription.from_message(message) == description


def _without_maps(message: dict[str, Any]) -> None:
    message["exponents"].pop()


def _too_fine(message: dict[str, Any]) -> None:
    message["exponents"][2] = [99]


def _no_integer(message: dict[str, Any]) -> None:
    message["exponents"][2] = [True]


def _too_many_segments(message: dict[str, Any]) -> None:
    message["exponents"][1] = [14, 14, 14, 14]


def _no_list(message: dict[str, Any]) -> None:
    message["exponents"] = [3] * len(message["exponents"])


def _other_frequency(message: dict[str, Any]) -> None:
    message["inverse_frequencies"][1] *= 1.01


def _no_float32(message: dict[str, Any]) -> None:
    message["inverse_frequencies"][1] += 1e-12


def _no_frequencies(message: dict[str, Any]) -> None:
    message["inverse_frequencies"] = None


def _more(message: dict[str, Any]) -> None:
    message["digest"] = b""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without_maps, "scales of 9 maps for a model of 10"),
        (_too_fine, r"scale exponents \(99,\) of map layers\.0\.o"),
        (_no_integer, r"scale exponents \(True,\)"),
        (_too_many_segments, r"scale exponents \(14, 14, 14, 14\) of map layers\.0\.qkv"),
        (_no_list, "no list of scale exponents"),
        (_other_frequency, "frequencies that are not those"),
        (_no_float32, "frequencies that are not those"),
        (_no_frequencies, "no list of frequencies"),
        (_more, "missing or unknown entries"),
    ],
)
def test_messages_that_lie(
    damage: Callable[[dict[str, Any]], None], sentence: str, case_directory: CaseDirectory
) -> None:
    *_, description = load(case_directory(CASES[0]))
    message = copy.deepcopy(description.to_message())
    damage(message)
    with pytest.raises(ProtocolError, match=sentence):
        PrivateDescription.from_message(message)
