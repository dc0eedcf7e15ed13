"""The public bundle: round trip, fingerprint, and refusal of everything malformed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.errors import CheckpointError, ProtocolError
from otpipe.model import bundle as bundle_module
from otpipe.model.bundle import ModelBundle, PublicMap, read_public_files
from otpipe.model.checkpoint import Checkpoint

CaseDirectory = Callable[[Case], Path]


def make_bundle(directory: Path) -> ModelBundle:
    checkpoint = Checkpoint.open(directory)
    indices = range(len(checkpoint.spec.maps))
    maps = checkpoint.load_maps(indices)
    return ModelBundle(
        spec=checkpoint.spec,
        norms=checkpoint.load_norms(),
        maps=tuple(PublicMap.of(maps[index]) for index in indices),
        files=read_public_files(directory),
    )


@pytest.fixture(scope="module")
def bundle(case_directory: CaseDirectory) -> ModelBundle:
    return make_bundle(case_directory(CASES[0]))


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_round_trip(case: Case, case_directory: CaseDirectory) -> None:
    sent = make_bundle(case_directory(case))
    got = ModelBundle.from_bytes(sent.to_bytes())
    assert got.spec == sent.spec
    assert got.fingerprint == sent.fingerprint
    assert dict(got.files) == dict(sent.files)
    assert list(got.norms) == list(sent.norms)
    for name, norm in sent.norms.items():
        assert torch.equal(got.norms[name], norm)
    for mine, theirs in zip(got.maps, sent.maps, strict=True):
        assert torch.equal(mine.scale, theirs.scale)
        assert (mine.bias is None) == (theirs.bias is None)
        if mine.bias is not None and theirs.bias is not None:
            assert torch.equal(mine.bias, theirs.bias)
        assert (mine.max_row_l2, mine.max_row_l1) == (theirs.max_row_l2, theirs.max_row_l1)
        assert mine.digest == theirs.digest
    got.maps[1].scale.mul_(1)  # own, writable memory
    assert got.to_bytes() == sent.to_bytes()


def test_fingerprint_is_reproducible(bundle: ModelBundle, case_directory: CaseDirectory) -> None:
    assert make_bundle(case_directory(CASES[0])).fingerprint == bundle.fingerprint
    assert len(bundle.fingerprint) == 64
    reordered = replace(bundle, files=dict(reversed(list(bundle.files.items()))))
    assert reordered.fingerprint == bundle.fingerprint


def test_fingerprint_depends_on_everything(bundle: ModelBundle) -> None:
    def with_map(index: int, **changes: Any) -> ModelBundle:
        maps = list(bundle.maps)
        maps[index] = replace(maps[index], **changes)
        return replace(bundle, maps=tuple(maps))

    norm = bundle.norms["final_norm"].clone()
    norm[3] = torch.nextafter(norm[3], torch.tensor(2.0))
    bias = bundle.maps[1].bias
    assert bias is not None
    variants = [
        replace(bundle, spec=replace(bundle.spec, rms_norm_eps=2e-6)),
        replace(bundle, norms={**bundle.norms, "final_norm": norm}),
        replace(bundle, files={**bundle.files, "merges.txt": b"a b"}),
        with_map(0, scale=bundle.maps[0].scale * 2),
        with_map(1, bias=bias + 1),
        with_map(2, max_row_l2=bundle.maps[2].max_row_l2 + 1),
        with_map(3, max_row_l1=bundle.maps[3].max_row_l1 + 1),
        with_map(4, digest=bytes(32)),
    ]
    fingerprints = {variant.fingerprint for variant in variants}
    assert len(fingerprints | {bundle.fingerprint}) == len(variants) + 1


def test_it_holds_no_weight(bundle: ModelBundle, case_directory: CaseDirectory) -> None:
    checkpoint = Checkpoint.open(case_directory(CASES[0]))
    weight = checkpoint.load_maps([1])[1].weight
    assert weight.numpy().tobytes()[:32] not in bundle.to_bytes()


def changed(bundle: ModelBundle, path: tuple[Any, ...], value: object) -> bytes:
    """The bundle's message with one entry replaced and the old fingerprint."""
    message = msgpack.unpackb(bundle.to_bytes())
    inner = message
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return bytes(msgpack.packb(message))


NAN = b"\x00\x00\xc0\x7f"


def le_floats(value: float, count: int) -> bytes:
    return struct.pack("<f", value) * count


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2, not 1"),
        (("surplus",), 1, "missing or unknown entries in it"),
        (("spec", "num_layers"), 10**9, "num_layers 1000000000"),
        (("norms", "final_norm"), bytes(47 * 4), "188 bytes where norm final_norm has 192"),
        (("norms", "final_norm"), NAN * 48, "NaN or infinity in norm final_norm"),
        (("norms", "other"), bytes(192), "missing or unknown entries in its norms"),
        (("maps",), [], "no list of 10 maps"),
        (("maps", 1), None, "missing or unknown entries in map layers.0.qkv"),
        (("maps", 1, "scale"), "text", "str where scale of map layers.0.qkv has 320 bytes"),
        (("maps", 1, "scale"), b"\x00\x00\x80\xbf" * 80, "a negative scale in map layers.0.qkv"),
        (("maps", 1, "scale"), le_floats(2e6, 80), "a value beyond 1e+06 in scale of map layers.0"),
        (("maps", 1, "bias"), le_floats(-2e6, 80), "a value beyond 1e+06 in bias of map layers.0"),
        (("norms", "final_norm"), le_floats(2e6, 48), "a value beyond 1e+06 in norm final_norm"),
        (("spec", "rms_norm_eps"), 0.0, "rms_norm_eps 0.0, which must be a number from 1e-12"),
        (("maps", 1, "bias"), None, "no bias in map layers.0.qkv"),
        (("maps", 2, "bias"), bytes(192), "an unexpected bias in map layers.0.o"),
        (("maps", 1, "max_row_l2"), float("nan"), "max_row_l2 nan in map layers.0.qkv"),
        (("maps", 1, "max_row_l2"), 1e9, "max_row_l2 1000000000.0 in map layers.0.qkv"),
        (("maps", 1, "max_row_l1"), -1.0, "max_row_l1 -1.0 in map layers.0.qkv"),
        (("maps", 1, "max_row_l1"), 5, "max_row_l1 5 in map layers.0.qkv"),
        (("maps", 1, "digest"), b"short", "a digest that is not 32 bytes in map layers.0.qkv"),
        (("files",), [], "no table of files"),
        (("files", "../config.json"), b"{}", "a file '../config.json' that is not one of"),
        (("files", "model.py"), b"", "a file 'model.py' that is not one of"),
        (("files", "config.json"), 3, "no content, or more than"),
        (("fingerprint",), "0" * 63, "a malformed fingerprint"),
        (("fingerprint",), "0" * 64, "but its content has"),
        (("files", "merges.txt"), b"a b", "but its content has"),
    ],
)
def test_malformed_bundles_are_refused(
    bundle: ModelBundle, path: tuple[Any, ...], value: object, message: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        ModelBundle.from_bytes(changed(bundle, path, value))
    assert message in str(raised.value)
    assert str(raised.value).endswith("; use a server of this version.")


def test_the_largest_possible_norms_are_accepted(bundle: ModelBundle) -> None:
    for n in range(1, 2000, 7):
        spec = replace(bundle.spec, hidden_size=n)
        public = PublicMap(
            torch.ones(spec.vocab_size), None, (127 * 127 * n) ** 0.5, 127.0 * n, bytes(32)
        )
        PublicMap.from_message(public.to_message(), spec.maps[-1])


@settings(max_examples=50)
@given(data=st.data())
def test_damaged_bytes_are_refused(bundle: ModelBundle, data: st.DataObject) -> None:
    encoded = bytearray(bundle.to_bytes())
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        ModelBundle.from_bytes(bytes(encoded))
    with pytest.raises(ProtocolError):
        ModelBundle.from_bytes(bytes(encoded[:position]))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(encoded: bytes) -> None:
    with pytest.raises(ProtocolError):
        ModelBundle.from_bytes(encoded)


def test_values_up_to_the_bound_are_accepted(bundle: ModelBundle) -> None:
    spec = bundle.spec
    public = replace(bundle.maps[1], scale=torch.full((80,), 1e6), bias=torch.full((80,), -1e6))
    got = PublicMap.from_message(public.to_message(), spec.maps[1])
    assert torch.equal(got.scale, public.scale)


EMPTY_TABLE_OF_2000 = b"\xde\x07\xd0" + b"".join(b"\xa4%04d\x90" % key for key in range(2000))


@pytest.mark.parametrize(
    "encoded",
    [
        b"\xdd\x00\x20\x00\x00" + b"\x90" * (2 << 20),
        b"\xdc\x10\x00" + (b"\xdc\x02\x00" + b"\x90" * 512) * 4096,
        b"\xdc\x10\x00" + EMPTY_TABLE_OF_2000 * 200,
        b"\xdb\x00\x20\x00\x00" + b"a" * (2 << 20),
        b"\xc7\x01\x05a",
    ],
    ids=["one list", "lists", "tables", "text", "extension"],
)
def test_many_small_values_take_no_memory(encoded: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="no valid msgpack"):
            ModelBundle.from_bytes(encoded)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_model_of_the_most_layers_fits_the_limits(bundle: ModelBundle) -> None:
    spec = replace(
        bundle.spec, num_layers=1024, hidden_size=2, intermediate_size=1, num_heads=1,
        num_kv_heads=1, head_dim=2, vocab_size=2, qkv_bias=False,
    )  # fmt: skip
    large = replace(
        bundle,
        spec=spec,
        norms=dict.fromkeys(spec.norm_names, torch.ones(2)),
        maps=tuple(
            PublicMap(
                torch.ones(m.in_features if m.kind == "embed" else m.out_features),
                torch.ones(m.out_features) if m.has_bias else None,
                1.0,
                1.0,
                bytes(32),
            )
            for m in spec.maps
        ),
        files=dict.fromkeys(bundle_module.PUBLIC_FILES, b"{}"),
    )
    assert ModelBundle.from_bytes(large.to_bytes()).fingerprint == large.fingerprint


def test_size_cap(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 1000)
    with pytest.raises(ProtocolError, match="bytes where at most 1000 are allowed"):
        ModelBundle.from_bytes(bundle.to_bytes())


def test_public_files_are_an_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.py", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    assert read_public_files(tmp_path) == {"tokenizer.json": b"{}", "chat_template.jinja": b"{}"}
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not UTF-8 text"):
        read_public_files(tmp_path)
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 2 bytes; at most 1"):
        read_public_files(tmp_path)
