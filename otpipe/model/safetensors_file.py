"""Reading row ranges of a safetensors file, with errors that say what is wrong with the file.

The format: 8 bytes header length (little endian), a JSON header, the tensors. Rows are read into
ordinary memory instead of a map of the file, so that a process never holds more of a checkpoint
than the chunk it works on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from otpipe.errors import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. ``dtype`` is the name in the file; unsupported ones are listed too."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    num_bytes: int

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    def row_chunks(self, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first_row, (r, ...) CPU tensor in the stored dtype) with r <= num_rows.

        The dtype must be a supported one. A chunk is valid until the next one is asked for: they
        share one buffer. Raises CheckpointError if the file became shorter.
        """
        dtype = DTYPES[self.dtype]
        row_bytes = math.prod(self._row_shape) * dtype.itemsize
        buffer = bytearray(min(num_rows, self.shape[0]) * row_bytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset_bytes)
            for first in range(0, self.shape[0], num_rows):
                rows = min(num_rows, self.shape[0] - first)
                view = memoryview(buffer)[: rows * row_bytes]
                while view:  # one read returns at most 2 GiB
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(
                            f"{self.path.name} ended while {self.name!r} was read; it must not be"
                            " changed while it is loaded"
                        )
                    view = view[count:]
                elements = rows * math.prod(self._row_shape)
                chunk = torch.frombuffer(buffer, dtype=dtype, count=elements)
                yield first, chunk.view(rows, *self._row_shape)

    def read(self) -> Tensor:
        """The whole tensor on the CPU, in the stored dtype. For small tensors."""
        for _, tensor in self.row_chunks(max(1, self.shape[0])):
            return tensor
        return torch.empty(self.shape, dtype=DTYPES[self.dtype])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file.

    Raises CheckpointError, naming the file, if it is missing, truncated (with the expected and
    the found number of bytes), or no safetensors file.
    """
    try:
        found_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path.name} is no safetensors file (it starts with {start!r} and has"
                    f" {found_bytes} bytes); download it again, completely"
                )
            if found_bytes < 8 + header_bytes:
                raise _truncated(path, 8 + header_bytes, found_bytes)
            header = json.loads(file.read(header_bytes))
            tensors = dict(_parse_header(path, header, 8 + header_bytes))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} has a damaged safetensors header ({error!s:.80}); download it again"
        ) from None
    expected_bytes = max(
        (t.offset_bytes + t.num_bytes for t in tensors.values()), default=8 + header_bytes
    )
    if found_bytes < expected_bytes:
        raise _truncated(path, expected_bytes, found_bytes)
    if found_bytes > expected_bytes:
        raise CheckpointError(
            f"{path.name} has {found_bytes} bytes where its header describes {expected_bytes};"
            " download it again"
        )
    return tensors


def _parse_header(
    path: Path, header: dict[str, dict[str, object]], data_offset: int
) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = entry["dtype"], _sizes(entry["shape"])
        begin, end = _sizes(entry["data_offsets"])
        if not isinstance(dtype, str):
            raise ValueError(f"tensor {name!r:.60} has dtype {dtype!r:.40}")
        if end < begin:
            raise ValueError(f"tensor {name!r:.60} ends before it begins")
        known = DTYPES.get(dtype)
        if known is not None and end - begin != math.prod(shape) * known.itemsize:
            raise ValueError(f"tensor {name!r:.60} has {end - begin} bytes for shape {shape}")
        yield name, StoredTensor(name, path, dtype, shape, data_offset + begin, end - begin)


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{values!r:.60} is no list of sizes")
    return tuple(values)


def _truncated(path: Path, expected_bytes: int, found_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is truncated: expected {expected_bytes} bytes, found {found_bytes};"
        " download it again"
    )
