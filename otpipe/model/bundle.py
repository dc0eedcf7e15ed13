"""Everything public that a client without weights needs, as one message.

The client trusts nothing in it: every name, shape and range is checked against the model
description before it is used, and the fingerprint is recomputed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from otpipe.errors import CheckpointError, ProtocolError
from otpipe.model.quantize import INT8_MAX, QuantizedMap
from otpipe.model.spec import LAYER_MAP_KINDS, MAX_LAYERS, LinearMap, ModelSpec

BUNDLE_VERSION = 1
MAX_BUNDLE_BYTES = 256 << 20
MAX_FILE_BYTES = 64 << 20
MAX_VALUE = 1e6
"""Largest magnitude of a scale, bias or norm gain; those of published models stay below 1000."""

_MAX_MAPS = 2 + len(LAYER_MAP_KINDS) * MAX_LAYERS
_MAX_NORMS = 1 + 2 * MAX_LAYERS
_MAX_TEXT_BYTES = 256  # names, and a fingerprint
# All tables, lists and their entries: seven for each map (five fields, their table, its place in
# the list), the norms, and few more. Each may cost a byte on the wire and a hundred in memory.
_MAX_ENTRIES = 7 * _MAX_MAPS + _MAX_NORMS + 256
# Tokenizer and generation settings that are plain text. Pickled, binary and code files stay out.
PUBLIC_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class PublicMap:
    """What a client may know of one linear map; see :class:`QuantizedMap` for the fields."""

    scale: Tensor  # (m,) float32 CPU; embedding: (n,), one per token
    bias: Tensor | None  # (m,) float32 CPU
    max_row_l2: float
    max_row_l1: float
    digest: bytes

    @classmethod
    def of(cls, loaded: QuantizedMap) -> PublicMap:
        """The public part of a loaded map."""
        return cls(loaded.scale, loaded.bias, loaded.max_row_l2, loaded.max_row_l1, loaded.digest)

    def to_message(self) -> dict[str, Any]:
        """Plain values: numbers, and arrays as little-endian bytes."""
        return {
            "scale": _array_bytes(self.scale),
            "bias": None if self.bias is None else _array_bytes(self.bias),
            "max_row_l2": self.max_row_l2,
            "max_row_l1": self.max_row_l1,
            "digest": self.digest,
        }

    @classmethod
    def from_message(cls, message: object, linear_map: LinearMap) -> PublicMap:
        """Read what :meth:`to_message` wrote for that map; raises ProtocolError."""
        m, n = linear_map.out_features, linear_map.in_features
        what = f"map {linear_map.name}"
        fields = _fields(message, ("scale", "bias", "max_row_l2", "max_row_l1", "digest"), what)
        scale = _array(fields["scale"], n if linear_map.kind == "embed" else m, f"scale of {what}")
        if bool((scale < 0).any()):
            raise _bad(f"a negative scale in {what}")
        if linear_map.has_bias != (fields["bias"] is not None):
            raise _bad(f"{'no' if linear_map.has_bias else 'an unexpected'} bias in {what}")
        bias = _array(fields["bias"], m, f"bias of {what}") if linear_map.has_bias else None
        l2, l1 = fields["max_row_l2"], fields["max_row_l1"]
        for name, norm, limit in (("l2", l2, math.sqrt(n)), ("l1", l1, n)):
            if not isinstance(norm, float) or not 0 <= norm <= INT8_MAX * limit * (1 + 1e-12):
                raise _bad(f"max_row_{name} {norm!r:.40} in {what}")
        digest = fields["digest"]
        if not isinstance(digest, bytes) or len(digest) != _DIGEST_BYTES:
            raise _bad(f"a digest that is not {_DIGEST_BYTES} bytes in {what}")
        return cls(scale, bias, l2, l1, digest)


@dataclass(frozen=True, eq=False)
class ModelBundle:
    """The public description of one model: sizes, norm gains, scales, biases, tokenizer files."""

    spec: ModelSpec
    norms: Mapping[str, Tensor]  # float32 (hidden_size,) for every name of spec.norm_names
    maps: tuple[PublicMap, ...]  # in the order of spec.maps
    files: Mapping[str, bytes]  # some of PUBLIC_FILES

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all of the above, the digests of the int8 weights included.

        Two servers with the same fingerprint give the same answers; pads prepared with one may
        be used with the other.
        """
        # One fixed order and msgpack's shortest encodings: the same model, the same bytes.
        return hashlib.sha256(encode_message(self._message())).hexdigest()

    def to_bytes(self) -> bytes:
        """One msgpack message with raw little-endian arrays."""
        return encode_message({**self._message(), "fingerprint": self.fingerprint})

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelBundle:
        """Read what :meth:`to_bytes` wrote, trusting nothing; raises ProtocolError."""
        if len(data) > MAX_BUNDLE_BYTES:
            raise _bad(f"{len(data)} bytes where at most {MAX_BUNDLE_BYTES} are allowed")
        try:
            message = decode_message(data)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise _bad(f"no valid msgpack ({error!s:.60})") from None
        version = message.get("version") if isinstance(message, dict) else None
        if version != BUNDLE_VERSION:
            raise _bad(f"version {version!r:.20}, not {BUNDLE_VERSION}")
        names = ("version", "spec", "norms", "maps", "files", "fingerprint")
        fields = _fields(message, names, "it")
        spec = ModelSpec.from_dict(fields["spec"])
        norms = _fields(fields["norms"], spec.norm_names, "its norms")
        maps = fields["maps"]
        if not isinstance(maps, list) or len(maps) != len(spec.maps):
            raise _bad(f"no list of {len(spec.maps)} maps")
        bundle = cls(
            spec=spec,
            norms={
                name: _array(norms[name], spec.hidden_size, f"norm {name}")
                for name in spec.norm_names
            },
            maps=tuple(
                PublicMap.from_message(entry, linear_map)
                for entry, linear_map in zip(maps, spec.maps, strict=True)
            ),
            files=checked_files(fields["files"]),
        )
        fingerprint = fields["fingerprint"]
        if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
            raise _bad("a malformed fingerprint")
        if fingerprint != bundle.fingerprint:
            raise _bad(f"fingerprint {fingerprint}, but its content has {bundle.fingerprint}")
        return bundle

    def _message(self) -> dict[str, Any]:
        return {
            "version": BUNDLE_VERSION,
            "spec": self.spec.to_dict(),
            "norms": {name: _array_bytes(self.norms[name]) for name in self.spec.norm_names},
            "maps": [public.to_message() for public in self.maps],
            "files": {name: self.files[name] for name in sorted(self.files)},
        }


def read_public_files(directory: Path) -> dict[str, bytes]:
    """Those of :data:`PUBLIC_FILES` that a checkpoint directory has, by name.

    Raises CheckpointError for one that is too large or is not UTF-8 text.
    """
    files = {}
    for name in PUBLIC_FILES:
        path = directory / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are supported"
            )
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{name} is not UTF-8 text; download it again") from None
        files[name] = content
    return files


# --- encoding ---------------------------------------------------------------------------------


def encode_message(message: Mapping[str, Any]) -> bytes:
    """One msgpack message of plain values."""
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def decode_message(data: bytes) -> Any:
    """The values in ``data``; ValueError, before they pile up, for more than a bundle has."""
    entries = 0

    def counted(container: Any) -> Any:
        nonlocal entries
        entries += 1 + len(container)
        if entries > _MAX_ENTRIES:
            raise ValueError(f"more than {_MAX_ENTRIES} entries")
        return container

    return msgpack.unpackb(
        data,
        raw=False,
        strict_map_key=True,
        object_hook=counted,
        list_hook=counted,
        max_array_len=_MAX_MAPS,
        max_map_len=_MAX_NORMS,
        max_bin_len=MAX_FILE_BYTES,
        max_str_len=_MAX_TEXT_BYTES,
        max_ext_len=0,
    )


def _array_bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().astype("<f4", copy=False).tobytes()


def _array(data: object, length: int, what: str) -> Tensor:
    """float32 (length,) from little-endian bytes; finite, at most :data:`MAX_VALUE`."""
    if not isinstance(data, bytes) or len(data) != 4 * length:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise _bad(f"{found} where {what} has {4 * length} bytes")
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise _bad(f"NaN or infinity in {what}")
    if bool((values.abs() > MAX_VALUE).any()):
        raise _bad(f"a value beyond {MAX_VALUE:g} in {what}")
    return values


def _fields(message: object, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != set(names):
        raise _bad(f"missing or unknown entries in {what}")
    return message


def checked_files(files: object) -> dict[str, bytes]:
    """Some of :data:`PUBLIC_FILES`, from a message; raises ProtocolError."""
    if not isinstance(files, dict):
        raise _bad("no table of files")
    for name, content in files.items():
        if name not in PUBLIC_FILES:
            raise _bad(f"a file {name!r:.60} that is not one of {', '.join(PUBLIC_FILES)}")
        if not isinstance(content, bytes) or len(content) > MAX_FILE_BYTES:
            raise _bad(f"no content, or more than {MAX_FILE_BYTES} bytes, in file {name}")
    return files


def _bad(found: str) -> ProtocolError:
    return ProtocolError(
        f"The model bundle of the server has {found}; use a server of this version."
    )
