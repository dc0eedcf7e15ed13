"""Deliberately broken clients, and the checks of test_traffic.py that notice them.

Every client here is INSECURE, each by one change made inside its test. Most of them compute the
right tokens all the same, so no other kind of test would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutting_proxy import cutting_proxy
from numpy.typing import NDArray
from servers import LocalServer
from traffic_checks import (
    changed_resends,
    different_conversations,
    distinguishable,
    masked_requests,
    not_uniform,
    repeated_blocks,
    repeated_keys,
    shared_substrings,
    upload_law,
)
from traffic_runs import (
    OUTLIER_TOKENS,
    SAME_TOKEN,
    STREAMS,
    conversation,
    masked_findings,
    masked_input_bytes,
    parameters,
    scattered,
    upload_bytes_of_pads,
    uploads,
    watched,
)

from otpipe import Client
from otpipe.client import chunk_executor, preparation, row_streams, store_writer
from otpipe.client.link import ServerLink
from otpipe.client.store_batch import Batch
from otpipe.client.store_lease import SlotLease
from otpipe.client.store_rows import SpanReader
from otpipe.crypto.randomness import random_bytes
from otpipe.crypto.rlwe import BatchSecret

Patch = pytest.MonkeyPatch


def findings_of_generation(server: LocalServer, store: Path, prompt: Sequence[int]) -> list[str]:
    with watched(server.address, store) as seen:
        seen.client.prepare(512)
        assert len(list(seen.client.generate_ids(prompt, 20))) == 20
        return masked_findings(seen.online, seen.spec)


def assert_found(findings: Sequence[str], *phrases: str) -> None:
    for phrase in phrases:
        assert any(phrase in finding for finding in findings), f"{phrase!r} not in {findings[:9]}"


# -- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streams", "phrases"),
    [
        (1, ("embed: rows 0 and 101 are close", "differ")),
        # A quarter of the prompt and a decode step lie between the two on the own connection.
        (STREAMS, ("embed: rows 0 and 26 are close",)),
    ],
)
def test_a_slot_that_is_handed_out_twice(
    streams: int,
    phrases: tuple[str, ...],
    server: LocalServer,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    """Two different prompts under the same slots; both get right answers."""
    monkeypatch.setattr(row_streams, "MAX_STREAMS", streams)
    monkeypatch.setattr(Batch, "spend", lambda self, count: 0)
    with watched(server.address, tmp_path) as seen:
        seen.client.prepare(512)
        first, second = scattered(200)[:100], scattered(200)[100:]
        tokens = [list(seen.client.generate_ids(prompt, 2)) for prompt in (first, second)]
        findings = masked_findings(seen.online, seen.spec)
    assert_found(findings, "are repetitions", "qkv", *phrases)
    assert len(tokens) == 2


Change = Callable[[int, NDArray[Any]], None]
"""What a fault does, in place, to the values (rows, features) of a map."""


def plant(patch: Patch, masks: Change, corrections: Change = lambda index, values: None) -> None:
    """Faulty masks and corrections, from wherever slots are read."""
    for name, change in (("masks", masks), ("corrections", corrections)):
        real: Callable[..., NDArray[Any]] = getattr(SlotLease, name)

        def changed(
            self: SlotLease,
            map_index: int,
            rows: slice | None = None,
            out: NDArray[Any] | None = None,
            real: Callable[..., NDArray[Any]] = real,
            change: Change = change,
        ) -> NDArray[Any]:
            values = real(self, map_index, rows, out)
            change(map_index, values)
            return values

        patch.setattr(SlotLease, name, changed)
    first_pads, advance = SpanReader.first_pads, SpanReader.advance

    def changed_first(self: SpanReader) -> NDArray[Any]:
        pads = first_pads(self)
        masks(0, pads)
        return pads

    def changed_advance(self: SpanReader, map_index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        values, pads = advance(self, map_index)
        corrections(map_index, values)
        if pads.size:
            masks(map_index + 1, pads)
        return values, pads

    patch.setattr(SpanReader, "first_pads", changed_first)
    patch.setattr(SpanReader, "advance", changed_advance)
    patch.setattr(SpanReader, "tables", lambda self: None)  # so that all maps go through these


def test_the_same_mask_for_all_rows_of_a_message(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    def first_row_for_all(map_index: int, masks: NDArray[Any]) -> None:
        masks[1:] = masks[0]

    plant(monkeypatch, first_row_for_all)
    findings = findings_of_generation(server, tmp_path, scattered(100))
    assert_found(findings, "are close in", "are repetitions")


def zero_masks(patch: Patch, only_map: int | None = None) -> None:
    """No mask, and no correction to go with it."""

    def zero(map_index: int, values: NDArray[Any]) -> None:
        if only_map in (None, map_index):
            values[:] = 0

    plant(patch, zero, zero)


@pytest.mark.parametrize("only_map", [None, 0, 2], ids=["all maps", "embedding", "one map"])
def test_a_missing_mask(
    only_map: int | None, server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    zero_masks(monkeypatch, only_map)
    findings = findings_of_generation(server, tmp_path, (OUTLIER_TOKENS * 16)[:200])
    name = server.bundle.spec.maps[only_map or 0].name
    assert_found(findings, f"{name}: byte 0 of", f"{name}: rows", "apart correlate")


def test_a_missing_mask_tells_inputs_apart(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    zero_masks(monkeypatch, 3)
    zeros = masked_input_bytes(server.address, tmp_path / "zeros", extreme=False)
    extreme = masked_input_bytes(server.address, tmp_path / "extreme", extreme=True)
    assert distinguishable(zeros[3], extreme[3], "map 3", period=4)
    assert not distinguishable(zeros[2], extreme[2], "map 2", period=4)


def test_masks_of_31_bits(server: LocalServer, tmp_path: Path, monkeypatch: Patch) -> None:
    """A generator whose highest bit is always zero."""

    def short(map_index: int, masks: NDArray[Any]) -> None:
        if masks.dtype != np.uint8:
            masks &= np.uint32(0x7FFFFFFF)

    plant(monkeypatch, short)
    findings = findings_of_generation(server, tmp_path, SAME_TOKEN[:200])
    assert_found(findings, "requests of 32 bits: byte 3 of 4")


def test_masks_of_a_seeded_generator(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Each run looks perfect by itself; two runs share everything."""
    monkeypatch.setattr(store_writer.secrets, "token_bytes", lambda count: b"\x07" * count)
    runs, recordings = [], []
    for name in ("one", "two"):
        with watched(server.address, tmp_path / name) as seen:
            seen.client.prepare(512)
            list(seen.client.generate_ids(SAME_TOKEN, 20))
            assert masked_findings(seen.online, seen.spec) == []
            recordings += seen.online
            runs.append(b"".join(f.payload for f in masked_requests(seen.online)))
    assert shared_substrings(runs[0], runs[1], "runs")
    assert_found(masked_findings(recordings, seen.spec), "requests: ", "are close in")


def test_a_resend_that_is_masked_anew_under_the_same_slot(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A client that computes the message again instead of keeping its bytes."""
    real = ServerLink._restore
    real_exchange = ServerLink.exchange
    pending: dict[ServerLink, memoryview] = {}

    def exchange(self: ServerLink, frame: memoryview, *rest: Any) -> None:
        pending[self] = frame
        real_exchange(self, frame, *rest)

    def restore(self: ServerLink, cause: Any, *rest: Any) -> None:
        real(self, cause, *rest)
        if cause is not None and self in pending:
            octets = np.frombuffer(pending[self], np.uint8)
            octets[len(octets) % 4 + 64 :: 4] += 1  # rounded another way, behind the head

    with cutting_proxy(server.address) as proxy, Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        monkeypatch.setattr(ServerLink, "exchange", exchange)
        monkeypatch.setattr(ServerLink, "_restore", restore)
        proxy.cut_downward(90_001)
        list(client.generate_ids(OUTLIER_TOKENS, 20))
        online = [r for r in proxy.recordings if masked_requests([r])]
        assert_found(changed_resends(online), "no later connection repeats what")
        assert_found(masked_findings(online, client.bundle.spec), "are close in")


# -- uploads -------------------------------------------------------------------------------------


def upload_findings(server: LocalServer, store: Path) -> list[str]:
    with watched(server.address, store) as seen:
        seen.client.prepare(64)
        found = uploads(seen.preparations)
        findings = repeated_keys(seen.preparations)
        findings += repeated_blocks([upload.data for upload in found], "uploads")
        for upload in found:
            law = upload_law(parameters(seen.spec, upload.map_index), upload.upload_bytes)
            width = upload.upload_bytes
            findings += not_uniform(upload.data, f"{width} bytes", period=width, law=law)
        return findings


def in_the_clear(noise: bool, bits: int | None = None) -> Callable[..., NDArray[np.uint8]]:
    """An ``encrypt_block`` that leaves a t out: Delta r, with uniform low bits if ``noise``."""

    def encrypt(
        secret: BatchSecret,
        a_key: bytes,
        map_index: int,
        first: int,
        r_TJ: NDArray[Any],
        upload_bytes: int,
    ) -> NDArray[np.uint8]:
        params = secret.params
        b_JN = np.zeros((r_TJ.shape[1], params.ring_degree), np.uint64)
        shift = np.uint64(params.log2_q - params.log2_p)
        b_JN[:, : len(r_TJ)] = r_TJ.T.astype(np.uint64) << shift
        if noise:
            low = random_bytes(8 * b_JN.size).view(np.uint64).reshape(b_JN.shape)
            # Unused coefficients hold no pad, and are hidden whole.
            b_JN[:, len(r_TJ) :] = low[:, len(r_TJ) :]
            b_JN[:, : len(r_TJ)] |= low[:, : len(r_TJ)] >> (np.uint64(64) - shift)
        b_JN &= np.uint64((1 << (bits or params.log2_q)) - 1)
        b_JN >>= np.uint64(params.dropped_upload_bits(upload_bytes))
        octets = b_JN.view(np.uint8).reshape(*b_JN.shape, 8)[..., :upload_bytes]
        return np.ascontiguousarray(octets)

    return encrypt


def test_an_upload_without_encryption(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(preparation, "encrypt_block", in_the_clear(noise=False))
    findings = upload_findings(server, tmp_path)
    assert_found(findings, "6 bytes: byte 0", "7 bytes: byte 0", "4 bytes: byte 0", "repetitions")


def test_an_upload_that_only_looks_encrypted(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Uniform pads in the clear are uniform: only comparing two sets of pads shows them."""
    monkeypatch.setattr(preparation, "encrypt_block", in_the_clear(noise=True))
    zeros = upload_bytes_of_pads(server.address, tmp_path / "zeros", monkeypatch, 0)
    ones = upload_bytes_of_pads(server.address, tmp_path / "ones", monkeypatch, -1)
    for width, data in zeros.items():
        assert distinguishable(data, ones[width], f"{width} bytes", period=width)


def test_an_upload_with_bits_above_the_modulus(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The integer a t beyond q, which the RLWE assumption does not cover."""
    monkeypatch.setattr(preparation, "encrypt_block", in_the_clear(noise=True, bits=56))
    assert_found(upload_findings(server, tmp_path), "7 bytes: byte 6 of 7 has values it may not")


def test_an_a_key_that_is_used_twice(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(preparation.os, "urandom", lambda count: b"\x05" * count)
    assert_found(upload_findings(server, tmp_path), "a_keys are repetitions")


# -- shape ---------------------------------------------------------------------------------------


def test_a_client_that_sends_less_for_a_simple_prompt(
    server: LocalServer, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Messages whose size depends on the prompt, here to no one's advantage."""
    real = chunk_executor.ChunkExecutor.embed
    real_limit = chunk_executor.max_linear_rows
    simple = [False]

    def embed(self: chunk_executor.ChunkExecutor, token_ids: Sequence[int]) -> Any:
        simple[0] = len(set(token_ids)) == 1
        return real(self, token_ids)

    def limit(*shape: int) -> int:
        return 20 if simple[0] else real_limit(*shape)

    monkeypatch.setattr(chunk_executor.ChunkExecutor, "embed", embed)
    monkeypatch.setattr(chunk_executor, "max_linear_rows", limit)
    first, second = (
        conversation(server.address, tmp_path / str(number), prompt, 4)
        for number, prompt in enumerate((SAME_TOKEN, scattered(len(SAME_TOKEN))))
    )
    assert different_conversations(first.online, second.online)


def test_the_checks_refuse_to_judge_too_little() -> None:
    with pytest.raises(ValueError, match="too few for a chi-square test"):
        not_uniform(bytes(100), "short")
    with pytest.raises(ValueError, match="too few"):
        distinguishable(bytes(range(200)), bytes(range(200)), "short")
