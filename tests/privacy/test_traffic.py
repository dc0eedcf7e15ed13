"""The server sees lengths and noise: statistics of recorded traffic of the real client.

The checks are in traffic_checks.py; test_traffic_broken.py shows that they notice broken clients.
Statistics of ciphertexts support the protocol's argument (docs/protocol.md), they do not replace
it: what hides the pads in an upload is the RLWE assumption, and no histogram proves that.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from cutting_proxy import cutting_proxy
from proxies import Recording, recording_proxy
from servers import LocalServer
from traffic_checks import (
    changed_resends,
    different_conversations,
    distinguishable,
    exchange_outlines,
    masked_requests,
    not_uniform,
    repeated_blocks,
    repeated_keys,
    shared_substrings,
    upload_law,
    without_resends,
)
from traffic_runs import (
    MIN_ROWS,
    OUTLIER_TOKENS,
    SAME_TOKEN,
    STREAMS,
    conversation,
    masked_findings,
    masked_input_bytes,
    parameters,
    rows_by_map,
    scattered,
    upload_bytes_of_pads,
    uploads,
    watched,
)

from otpipe import Client
from otpipe.crypto.params import params_for_ring
from otpipe.protocol.messages import MessageType

# -- what is sent online -------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [SAME_TOKEN, OUTLIER_TOKENS * 20], ids=["same", "outliers"])
def test_masked_rows_are_uniform_noise(
    prompt: list[int], server: LocalServer, tmp_path: Path
) -> None:
    """Prefill and decoding of the prompts that would show most if anything were left unmasked."""
    with watched(server.address, tmp_path) as seen:
        list(seen.client.generate_ids(prompt, 40))
        assert seen.client.last is not None
        assert seen.client.last.stats.slots_used == len(prompt) + 39
        assert masked_findings(seen.online, seen.spec) == []


def test_two_runs_of_one_prompt_have_nothing_in_common(server: LocalServer, tmp_path: Path) -> None:
    payloads, by_map, recordings = [], [], []
    for run in ("one", "two"):
        with watched(server.address, tmp_path / run) as seen:
            seen.client.prepare(512)
            assert len(list(seen.client.generate_ids(SAME_TOKEN, 20))) == 20
            recordings += seen.online
            frames = masked_requests(seen.online)
            payloads.append(b"".join(frame.payload for frame in frames))
            by_map.append(rows_by_map(frames, seen.spec))
    # No repetition, and no two rows of a map that are close, in all that was sent together.
    assert masked_findings(recordings, seen.spec) == []
    assert shared_substrings(payloads[0], payloads[1], "runs") == []
    for index, first in by_map[0].items():
        difference = first - by_map[1][index]  # mod 2^8 or 2^32
        if len(difference) >= MIN_ROWS:
            period = difference.dtype.itemsize
            assert not_uniform(difference.tobytes(), f"map {index}", period=period) == []


def test_a_restarted_client_uses_no_pad_again(server: LocalServer, tmp_path: Path) -> None:
    """Three clients with one store; the second leaves in the middle of its generation."""
    with recording_proxy(server.address) as proxy:
        for run in range(3):
            with Client(proxy.address, tmp_path) as client:
                spec = client.bundle.spec
                if run == 0:
                    client.prepare(512)
                tokens = client.generate_ids(SAME_TOKEN[:100], 20)
                for _ in range(5 if run == 1 else 20):
                    next(tokens)
                assert client.free_slots == 512 - (119, 223, 342)[run]
        online = [r for r in proxy.recordings if masked_requests([r])]
        assert len(online) == 3 * STREAMS
        assert masked_findings(online, spec) == []
        assert masked_requests(online) == without_resends(online)


@pytest.mark.parametrize("upward", [True, False], ids=["requests", "answers"])
def test_after_a_cut_the_very_same_bytes_are_sent_again(
    upward: bool, server: LocalServer, tmp_path: Path
) -> None:
    with cutting_proxy(server.address) as proxy, Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        cut = proxy.cut_upward if upward else proxy.cut_downward
        cut(1_500, 40_000, 90_001, 100_500, 101_000, 150_003)
        list(client.generate_ids(OUTLIER_TOKENS, 20))
        assert proxy.cuts == 6
        online = [r for r in proxy.recordings if masked_requests([r])]
        assert len(online) >= 5
        assert changed_resends(online) == []
        assert masked_findings(online, client.bundle.spec) == []
        sent, once = masked_requests(online), without_resends(online)
        maps = len(client.bundle.spec.maps)
        # The prompt's rows go in STREAMS parts, but for the last map, which only one row needs.
        assert len(once) == 20 * maps + (STREAMS - 1) * (maps - 1)
        assert len(sent) > len(once) or upward


# -- what is uploaded in the preparation ---------------------------------------------------------


def test_uploads_are_uniform_residues(server: LocalServer, tmp_path: Path) -> None:
    """All three widths. Every byte has the law of a uniform residue mod q, rounded and packed.

    53 bits in 7 bytes leave three bits, which are always zero; in 6 bytes the rounding (ties to
    even) makes even bytes 1/32 likelier in the lowest position, exactly as for uniform residues.
    """
    with watched(server.address, tmp_path) as seen:
        seen.client.prepare(64)
        seen.client.prepare(2048)
        found = uploads(seen.preparations)
        assert len(found) == 2 * len(seen.spec.maps)
        assert {upload.upload_bytes for upload in found} == {4, 6, 7}
        findings = repeated_keys(seen.preparations)
        findings += repeated_blocks([upload.data for upload in found], "uploads")
        for upload in found:
            law = upload_law(parameters(seen.spec, upload.map_index), upload.upload_bytes)
            findings += not_uniform(
                upload.data,
                f"{seen.spec.maps[upload.map_index].name}, {upload.num_slots} slots",
                period=upload.upload_bytes,
                law=law,
            )
        for upload in found[1:]:
            if upload.upload_bytes == found[0].upload_bytes:
                size = min(len(upload.data), len(found[0].data), 1 << 20)
                findings += shared_substrings(found[0].data[:size], upload.data[:size], "uploads")
        assert findings == []


def test_the_law_of_rounded_residues_is_noticed_when_it_is_wrong() -> None:
    """The bias of ties to even, 1/32 in the lowest byte, is real and the test can see it."""
    residues = np.random.default_rng(0).integers(0, 1 << 53, 1 << 21)
    rounded = ((residues + 15 + ((residues >> 5) & 1)) >> 5) & ((1 << 48) - 1)
    packed = rounded.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :6].tobytes()
    assert not_uniform(packed, "rounded", period=6, law=upload_law(params_for_ring(32), 6)) == []
    assert not_uniform(packed, "rounded", period=6) != []


# -- the shape of a conversation -----------------------------------------------------------------


def test_the_shape_of_a_conversation_depends_on_lengths_only(
    server: LocalServer, tmp_path: Path
) -> None:
    """Types, header bytes, sizes, counts and order of all frames, in both directions."""
    prompts = [SAME_TOKEN, scattered(len(SAME_TOKEN)), (OUTLIER_TOKENS * 24)[: len(SAME_TOKEN)]]
    runs = [
        conversation(server.address, tmp_path / f"store{number}", prompt, 12)
        for number, prompt in enumerate(prompts)
    ]
    assert len(runs[0].online) == STREAMS
    for run in runs[1:]:
        for upward in (True, False):
            assert different_conversations(runs[0].online, run.online, upward=upward) == []
        assert exchange_outlines(runs[0].preparations) == exchange_outlines(run.preparations)
    shorter = conversation(server.address, tmp_path / "shorter", SAME_TOKEN[1:], 12)
    assert different_conversations(runs[0].online, shorter.online)


def test_a_hidden_length_shows_the_limit_only(server: LocalServer, tmp_path: Path) -> None:
    """Answers that end at once, later and never; without ``hide_length`` the end can be seen."""
    online = []
    with watched(server.address, tmp_path / "first") as seen:
        answer = list(seen.client.generate_ids(OUTLIER_TOKENS, 10))
    stops: list[tuple[int, ...]] = [(), (answer[0],), (next(t for t in answer if t != answer[0]),)]
    for number, stop in enumerate([*stops, stops[1]]):
        with watched(server.address, tmp_path / str(number)) as seen:
            hide = number < len(stops)
            list(
                seen.client.generate_ids(OUTLIER_TOKENS, 10, stop_token_ids=stop, hide_length=hide)
            )
            online.append(seen.online)
    assert different_conversations(online[0], online[1]) == []
    assert different_conversations(online[0], online[2]) == []
    assert different_conversations(online[0], online[3])


PRIVATE_MODE = {
    MessageType.ATTACH,
    MessageType.JOIN,
    MessageType.PASS,
    MessageType.PASS_DONE,
    MessageType.MASKED_BEGIN,
    MessageType.CHANNEL,
    MessageType.PREPARE,
}
"""Never sent with public weights; ``tests/private`` has the tests of their contents."""


def test_only_known_messages_are_sent(server: LocalServer, tmp_path: Path) -> None:
    """Each request type is constant but for the payloads and a_key that other tests judge."""
    recordings = conversation(server.address, tmp_path, SAME_TOKEN[:20], 4).proxy.recordings
    sent = [frame for r in recordings for frame in Recording.frames(r.to_server)]
    kinds = {frame.type for frame in sent}
    judged = {MessageType.LINEAR, MessageType.OLE_BEGIN, MessageType.OLE_BLOCK}
    assert kinds == judged | {MessageType.HELLO, MessageType.GET_BUNDLE}
    assert {t for t in MessageType if t < 128} - kinds == {MessageType.PING, *PRIVATE_MODE}
    for frame in sent:
        if frame.type not in judged:
            assert frame.payload == b""
            assert frame.header in ({}, {"client": "otpipe"})
        elif frame.type != MessageType.OLE_BEGIN:
            assert all(type(value) is int for value in frame.header.values())


# -- distributions do not depend on secrets ------------------------------------------------------


def test_requests_do_not_tell_zeros_from_extreme_inputs(
    server: LocalServer, tmp_path: Path
) -> None:
    zeros = masked_input_bytes(server.address, tmp_path / "zeros", extreme=False)
    extreme = masked_input_bytes(server.address, tmp_path / "extreme", extreme=True)
    assert zeros.keys() == extreme.keys()
    for index, data in zeros.items():
        period = 1 if index == 0 else 4
        assert distinguishable(data, extreme[index], f"map {index}", period=period) == []
        assert not_uniform(data, f"map {index}", period=period) == []


def test_uploads_do_not_tell_what_the_pads_are(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = upload_bytes_of_pads(server.address, tmp_path / "zeros", monkeypatch, 0)
    ones = upload_bytes_of_pads(server.address, tmp_path / "ones", monkeypatch, -1)
    assert zeros.keys() == ones.keys() == {4, 6, 7}
    for width, data in zeros.items():
        assert distinguishable(data, ones[width], f"{width} bytes", period=width) == []


def test_answers_depend_on_the_requests_alone(server: LocalServer, tmp_path: Path) -> None:
    """Weights are public and the server keeps nothing: the same bytes get the same bytes.

    So what a client receives says nothing about other clients, one of which is at work meanwhile.
    """
    with watched(server.address, tmp_path / "one") as seen:
        seen.client.prepare(64)
        list(seen.client.generate_ids(OUTLIER_TOKENS, 4))
        recordings = list(seen.proxy.recordings)
    with Client(server.address, tmp_path / "other") as other:
        tokens = other.generate_ids(SAME_TOKEN[:8], 10)
        for recording in recordings:
            next(tokens)
            assert replay(server, recording) == bytes(recording.to_client)


def replay(server: LocalServer, recording: Recording) -> bytes:
    """As many bytes as before of what the server answers when a client's bytes arrive again."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", server.gateway.port), 10) as sock:
        sending = threading.Thread(target=sock.sendall, args=(bytes(recording.to_server),))
        sending.start()
        while len(received) < len(recording.to_client):
            received += sock.recv(1 << 16)
        sending.join()
    return bytes(received)
