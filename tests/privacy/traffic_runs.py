"""Clients whose traffic is recorded, and their masked rows by map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from proxies import Frame, Proxy, Recording, recording_proxy
from traffic_checks import (
    close_rows,
    difference_of_rows,
    masked_requests,
    not_uniform,
    repeated_blocks,
    without_resends,
)

from otpipe import Client
from otpipe.client.store_writer import BatchWriter
from otpipe.crypto.params import RlweParams, params_for_ring
from otpipe.model.spec import ModelSpec
from otpipe.protocol.messages import MessageType

SAME_TOKEN = [28] * 300
OUTLIER_TOKENS = [2, 71, 8, 28, 18, 28, 45, 90, 45, 23, 53, 60, 28]
STREAMS = 4
"""Connections of a pass of several rows in these tests, whatever the machine."""

MIN_ROWS = 128
"""Fewer rows of the narrowest map are too few bytes for a chi-square test."""


def scattered(length: int, vocabulary: int = 101) -> list[int]:
    return [int(t) for t in np.random.default_rng(7).integers(0, vocabulary, length)]


def parameters(spec: ModelSpec, map_index: int) -> RlweParams:
    return params_for_ring(spec.maps[map_index].ring_bits)


@dataclass
class Watched:
    """A client behind a recording proxy."""

    client: Client
    proxy: Proxy

    @property
    def spec(self) -> ModelSpec:
        return self.client.bundle.spec

    @property
    def online(self) -> list[Recording]:
        """The client's own connection, first, and those of the passes of many rows."""
        return [r for r in self.proxy.recordings if not carries_uploads(r)]

    @property
    def preparations(self) -> list[Recording]:
        """The connections over which slots were prepared."""
        return [r for r in self.proxy.recordings if carries_uploads(r)]


def carries_uploads(recording: Recording) -> bool:
    """Whether slots were prepared over a connection."""
    frames = Recording.frames(recording.to_server)
    return any(frame.type == MessageType.OLE_BEGIN for frame in frames)


@contextmanager
def watched(address: str, store: Path) -> Iterator[Watched]:
    """A client of the server at ``address``, recorded; ``store`` holds its pads."""
    with recording_proxy(address) as proxy, Client(proxy.address, store) as client:
        yield Watched(client, proxy)


def rows_by_map(frames: Sequence[Frame], spec: ModelSpec) -> dict[int, NDArray[np.unsignedinteger]]:
    """Masked rows (R, n) of every map, in the order they were sent."""
    parts = defaultdict(list)
    for frame in frames:
        index = int(frame.header["map_index"])  # type: ignore[call-overload]
        linear_map = spec.maps[index]
        dtype = np.dtype("u1") if linear_map.ring_bits == 8 else np.dtype("<u4")
        parts[index].append(np.frombuffer(frame.payload, dtype).reshape(-1, linear_map.in_features))
    return {index: np.concatenate(pieces) for index, pieces in parts.items()}


def masked_findings(recordings: Sequence[Recording], spec: ModelSpec) -> list[str]:
    """Everything that masked rows may not show: the checks of a client's online traffic."""
    frames = without_resends(recordings)
    by_map = rows_by_map(frames, spec)
    assert len(by_map) == len(spec.maps), "the recording misses a map"
    findings = repeated_blocks([frame.payload for frame in frames], "requests")
    for ring_bytes in (1, 4):
        data = b"".join(
            rows.tobytes() for rows in by_map.values() if rows.dtype.itemsize == ring_bytes
        )
        findings += not_uniform(data, f"requests of {8 * ring_bytes} bits", period=ring_bytes)
    for index, rows in by_map.items():
        name = spec.maps[index].name
        findings += close_rows(rows, name)
        if len(rows) >= MIN_ROWS:
            findings += not_uniform(rows.tobytes(), name, period=rows.dtype.itemsize)
            findings += difference_of_rows(rows, f"differences in {name}")
    return findings


@dataclass
class Upload:
    """The encrypted pads of one exchange: header facts and all coefficients of b, packed."""

    map_index: int
    num_slots: int
    upload_bytes: int
    blocks: list[bytes]

    @property
    def data(self) -> bytes:
        return b"".join(self.blocks)


def uploads(recordings: Sequence[Recording]) -> list[Upload]:
    """Every exchange of the recorded preparations."""
    found: list[Upload] = []
    for recording in recordings:
        for frame in Recording.frames(recording.to_server):
            if frame.type == MessageType.OLE_BEGIN:
                header = {k: v for k, v in frame.header.items() if k != "a_key"}
                found.append(Upload(**header, blocks=[]))  # type: ignore[arg-type]
            elif frame.type == MessageType.OLE_BLOCK:
                found[-1].blocks.append(frame.payload)
    return found


def by_width(found: Sequence[Upload]) -> dict[int, bytes]:
    """Coefficients of all uploads of each width in bytes, by map."""
    ordered = sorted(found, key=lambda upload: upload.map_index)
    return {
        width: b"".join(u.data for u in ordered if u.upload_bytes == width)
        for width in sorted({u.upload_bytes for u in found})
    }


def conversation(address: str, store: Path, prompt: list[int], tokens: int) -> Watched:
    with watched(address, store) as seen:
        seen.client.prepare(256)
        seen.client.prepare(128)
        assert len(list(seen.client.generate_ids(prompt, tokens))) == tokens
        return seen


def masked_input_bytes(address: str, store: Path, extreme: bool) -> dict[int, bytes]:
    """512 masked rows of every map, of zeros or of the most extreme inputs there are."""
    generator = torch.Generator().manual_seed(1)
    with watched(address, store) as seen:
        executor, spec = seen.client.mode.executor, seen.spec
        seen.client.prepare(1024)
        for _ in range(2):
            executor.embed(scattered(512) if extreme else [0] * 512)
            for linear_map in spec.maps[1:]:
                x = torch.zeros(512, linear_map.in_features)
                if extreme:
                    x = torch.randn(x.shape, generator=generator).mul_(3e4)
                    x[:, 3] = 1e30  # an outlier no real model has
                    x[::2] = -1e6
                executor.linear(linear_map, x)
        by_map = rows_by_map(masked_requests(seen.online), spec)
    return {index: rows.tobytes() for index, rows in by_map.items()}


def upload_bytes_of_pads(
    address: str, store: Path, monkeypatch: pytest.MonkeyPatch, value: int | None
) -> dict[int, bytes]:
    """Uploads by width when every pad is ``value`` (-1: all bits one); None: as they are."""
    real = BatchWriter.pads

    def constant(self: BatchWriter, map_index: int, first_coord: int, count: int) -> np.ndarray:
        pads = real(self, map_index, first_coord, count)
        return pads if value is None else np.full_like(pads, value & (2 ** (8 * pads.itemsize) - 1))

    with monkeypatch.context() as patch, watched(address, store) as seen:
        patch.setattr(BatchWriter, "pads", constant)
        seen.client.prepare(64)
        seen.client.prepare(2048)
        return by_width(uploads(seen.preparations))
