"""Opening a Hugging Face checkpoint directory and loading some of its linear maps as int8.

Everything is validated before anything is loaded: config, shards, the presence, shape and dtype of
every tensor. Loading reads only the bytes of the wanted maps, a bounded chunk of rows at a time,
and quantises on the device. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otpipe.errors import CheckpointError
from otpipe.model.quantize import (
    QuantizedMap,
    quantize_rows,
    row_norms,
    rows_digest,
    rows_per_chunk,
)
from otpipe.model.safetensors_file import DTYPES, StoredTensor, read_header
from otpipe.model.spec import (
    FINAL_NORM,
    LinearMap,
    ModelSpec,
    input_norm_name,
    post_attention_norm_name,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBED_TENSOR = "model.embed_tokens.weight"
LM_HEAD_TENSOR = "lm_head.weight"
_PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.")
_HASH_THREADS = 2


@dataclass(frozen=True)
class MapPart:
    """One stored matrix of a fused map: ``rows`` consecutive output rows."""

    weight: str
    bias: str | None
    rows: int
    columns: int


def map_parts(spec: ModelSpec, linear_map: LinearMap) -> tuple[MapPart, ...]:
    """The stored matrices whose rows, one below the other, make up the map.

    For the embedding these are the rows of the transposed map: one row a token.
    """
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    if linear_map.kind == "embed":
        return (MapPart(EMBED_TENSOR, None, spec.vocab_size, hidden),)
    if linear_map.kind == "lm_head":
        name = EMBED_TENSOR if spec.tied_embeddings else LM_HEAD_TENSOR
        return (MapPart(name, None, spec.vocab_size, hidden),)
    projections = {
        "qkv": (
            ("self_attn.q_proj", spec.q_size),
            ("self_attn.k_proj", spec.kv_size),
            ("self_attn.v_proj", spec.kv_size),
        ),
        "o": (("self_attn.o_proj", hidden),),
        "gate_up": (("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)),
        "down": (("mlp.down_proj", hidden),),
    }[linear_map.kind]
    prefix = f"model.layers.{linear_map.layer}."
    return tuple(
        MapPart(
            f"{prefix}{name}.weight",
            f"{prefix}{name}.bias" if linear_map.has_bias else None,
            rows,
            linear_map.in_features,
        )
        for name, rows in projections
    )


def norm_tensors(spec: ModelSpec) -> dict[str, str]:
    """Norm name of the program -> tensor name of the checkpoint, in program order."""
    names = {}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        names[input_norm_name(layer)] = f"{prefix}input_layernorm.weight"
        names[post_attention_norm_name(layer)] = f"{prefix}post_attention_layernorm.weight"
    return {**names, FINAL_NORM: "model.norm.weight"}


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint directory. Get one from :meth:`open`."""

    directory: Path
    config: Mapping[str, Any]
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]  # exactly the tensors the program needs

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config and headers, and check every tensor's presence, shape and dtype.

        Raises CheckpointError with what was found and what is supported.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory; give the folder of a downloaded checkpoint"
            )
        config = _read_json(directory / "config.json")
        spec = ModelSpec.from_config(config)
        stored = _read_headers(directory)
        required = _required_shapes(spec)
        _check_tensors(stored, required)
        _refuse_unknown_layer_tensors(stored, required, spec)
        return cls(directory, config, spec, {name: stored[name] for name in required})

    def num_bytes(self, indices: Iterable[int]) -> int:
        """How many bytes :meth:`load_maps` will report to ``progress`` for these maps."""
        names = set()
        for index in indices:
            for part in map_parts(self.spec, self.spec.maps[index]):
                names.update({part.weight, part.bias} - {None})
        return sum(self.tensors[name].num_bytes for name in names if name is not None)

    def load_norms(self) -> dict[str, Tensor]:
        """All norm gains, float32 (hidden_size,) on the CPU, in program order."""
        return {name: self._read_vector(tensor) for name, tensor in norm_tensors(self.spec).items()}

    def load_maps(
        self,
        indices: Iterable[int],
        device: str | torch.device = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> dict[int, QuantizedMap]:
        """Quantise the maps with these indices; their weights stay on ``device``.

        A tied embedding is quantised once; if both maps are wanted they share the int8 tensor.
        ``progress`` is called with the number of checkpoint bytes read since its last call.
        Raises CheckpointError for a NaN or an infinity.
        """
        device = torch.device(device)
        report = progress or (lambda num_bytes: None)
        rows_of_first: dict[str, tuple[Tensor, Tensor]] = {}
        loaded: dict[int, QuantizedMap] = {}
        # Hashing is slower than reading, and releases the interpreter lock.
        with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="digest") as pool:
            digests = {}
            for index in sorted(set(indices)):
                linear_map = self.spec.maps[index]
                parts = map_parts(self.spec, linear_map)
                key = parts[0].weight
                if key not in rows_of_first:
                    rows_of_first[key] = self._quantize_parts(parts, device, report)
                rows, scale = rows_of_first[key]
                transposed = linear_map.kind == "embed"
                max_l2, max_l1 = row_norms(rows, transposed=transposed)
                digests[index] = pool.submit(rows_digest, rows)
                loaded[index] = QuantizedMap(
                    weight=rows.t() if transposed else rows,
                    scale=scale,
                    bias=self._load_bias(parts, report),
                    max_row_l2=max_l2,
                    max_row_l1=max_l1,
                    digest=b"",
                )
            return {
                index: replace(loaded[index], digest=digest.result())
                for index, digest in digests.items()
            }

    def load_rows(self, parts: Iterable[MapPart], device: str | torch.device = "cpu") -> Tensor:
        """The rows of a map as float32 (m, n), not quantised. For the plaintext reference."""
        parts = tuple(parts)
        num_rows = sum(part.rows for part in parts)
        rows = torch.empty((num_rows, parts[0].columns), dtype=torch.float32, device=device)
        self._for_each_chunk(parts, rows.device, lambda at, c: rows[at : at + len(c)].copy_(c))
        return rows

    def load_bias(self, parts: Iterable[MapPart]) -> Tensor | None:
        """The bias of a map, float32 (m,) on the CPU, or None."""
        return self._load_bias(tuple(parts), lambda num_bytes: None)

    def row_chunks(
        self,
        parts: Iterable[MapPart],
        device: str | torch.device = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Tensor]:
        """The rows of a map as stored, from the first to the last, (r, n) at a time on the device.

        ``progress`` as for :meth:`load_maps`. Raises CheckpointError for a NaN or an infinity.
        """
        report = progress or (lambda num_bytes: None)
        for part in parts:
            stored = self.tensors[part.weight]
            for first, chunk in stored.row_chunks(rows_per_chunk(part.columns)):
                values = chunk.to(device)
                _check_finite(stored.name, first, values)
                yield values
                report(chunk.nbytes)

    # --- reading ------------------------------------------------------------------------------

    def _quantize_parts(
        self, parts: tuple[MapPart, ...], device: torch.device, report: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        """int8 (m, n) on the device and scales (m,) on the CPU."""
        num_rows = sum(part.rows for part in parts)
        rows = torch.empty((num_rows, parts[0].columns), dtype=torch.int8, device=device)
        scale = torch.empty(num_rows, dtype=torch.float32, device=device)

        def store(first_row: int, chunk: Tensor) -> None:
            last_row = first_row + len(chunk)
            rows[first_row:last_row], scale[first_row:last_row] = quantize_rows(chunk)

        self._for_each_chunk(parts, device, store, report)
        return rows, scale.cpu()

    def _for_each_chunk(
        self,
        parts: tuple[MapPart, ...],
        device: torch.device,
        store: Callable[[int, Tensor], object],
        report: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Call ``store(first_row, chunk)`` for all rows; chunks are (r, n) on the device."""
        first_row = 0
        for values in self.row_chunks(parts, device, report):
            store(first_row, values)
            first_row += len(values)

    def _load_bias(
        self, parts: tuple[MapPart, ...], report: Callable[[int], None]
    ) -> Tensor | None:
        names = [part.bias for part in parts if part.bias is not None]
        if not names:
            return None
        vectors = [self._read_vector(name) for name in names]
        report(sum(self.tensors[name].num_bytes for name in names))
        return torch.cat(vectors)

    def _read_vector(self, name: str) -> Tensor:
        values = self.tensors[name].read()
        _check_finite(name, 0, values[:, None])
        return values.float()


# --- validation -------------------------------------------------------------------------------


def _check_finite(name: str, first_row: int, values: Tensor) -> None:
    # NaN and infinity both survive the maximum, so one number is fetched from the device.
    if torch.isfinite(values.abs().amax()):
        return
    row = first_row + int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
    raise CheckpointError(
        f"tensor {name!r} holds NaN or infinity (first in row {row}); the checkpoint is damaged,"
        " download it again"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error!s:.80})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds {type(content).__name__}, not a JSON object")
    return content


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of all shards, in the order in which transformers looks for the files."""
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).exists():
        pickled = [p.name for pattern in _PICKLED_PATTERNS for p in directory.glob(pattern)]
        if pickled:
            raise CheckpointError(
                f"{directory} holds only pickled weights ({min(pickled)}), which otpipe never"
                " opens; supported is safetensors: convert with transformers' save_pretrained"
            )
        raise CheckpointError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; supported are safetensors"
            " checkpoints, single or sharded"
        )
    weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no 'weight_map'; download it again")
    headers: dict[str, dict[str, StoredTensor]] = {}
    stored = {}
    for name, file_name in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{INDEX_FILE} names the shard {file_name!r:.80}, not a file name"
            )
        if file_name not in headers:
            if not (directory / file_name).exists():
                raise CheckpointError(
                    f"{INDEX_FILE} names the shard {file_name}, which is missing; download it"
                )
            headers[file_name] = read_header(directory / file_name)
        if name not in headers[file_name]:
            raise CheckpointError(
                f"{file_name} lacks tensor {name!r} that {INDEX_FILE} places there"
            )
        stored[name] = headers[file_name][name]
    return stored


def _required_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for linear_map in spec.maps:
        for part in map_parts(spec, linear_map):
            shapes[part.weight] = (part.rows, part.columns)
            if part.bias is not None:
                shapes[part.bias] = (part.rows,)
    return shapes | dict.fromkeys(norm_tensors(spec).values(), (spec.hidden_size,))


def _check_tensors(
    stored: Mapping[str, StoredTensor], required: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in required if name not in stored]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint lacks tensor {missing[0]!r}{others} that its config.json calls for;"
            " download it completely"
        )
    for name, shape in required.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} in {found.path.name} has shape {list(found.shape)}, but"
                f" config.json implies {list(shape)}"
            )
        if found.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {found.path.name} has dtype {found.dtype}; supported are"
                f" {', '.join(DTYPES)}"
            )


def _refuse_unknown_layer_tensors(
    stored: Mapping[str, StoredTensor], required: Mapping[str, tuple[int, ...]], spec: ModelSpec
) -> None:
    """Refuse a layer tensor that the program would ignore: the model computes something else.

    Rotary frequency buffers follow from the config, and tensors outside the layers (a second
    lm_head of a tied model, say) are never read by transformers either.
    """
    for name in sorted(stored.keys() - required.keys()):
        match = _LAYER_TENSOR.match(name)
        if match is None or name.endswith("rotary_emb.inv_freq"):
            continue
        if int(match[1]) >= spec.num_layers:
            raise CheckpointError(
                f"the checkpoint holds tensor {name!r}, but config.json has only"
                f" {spec.num_layers} layers"
            )
        raise CheckpointError(
            f"the checkpoint holds tensor {name!r}, which a {spec.family!r} model of this config"
            " does not have; supported are plain Qwen2 and Llama decoders"
        )
