"""A client and ranks with private weights, in one process: results, turns, slots, and every end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trustme
from private_servers import (
    PrivateServer,
    assert_nothing_is_left,
    eventually,
    private_server,
)
from proxies import Proxy, Recording, recording_proxy
from tampering import Plan, Tamper, double, lose, tampering_proxy, truncate
from torch import Tensor

from otpipe import Client
from otpipe.client.link import LinkOptions, ServerAddress
from otpipe.client.private_mode import PrivateMode
from otpipe.client.private_session import PRODUCTS_AHEAD
from otpipe.errors import (
    ConnectionLost,
    FingerprintMismatch,
    ProtocolError,
    ServerRefused,
    SlotsExhausted,
    UsageError,
)
from otpipe.model.private_maps import PlainMaps
from otpipe.model.private_program import PrivateProgram, Runner
from otpipe.protocol.messages import MessageType
from otpipe.secure import PlainOperations
from otpipe.server.private_rank import MAX_EXCHANGES_PER_RANK

PROMPT = [2, 61, 8, 28, 18]


def plain_logits(server: PrivateServer, token_ids: list[int]) -> Tensor:
    """Of the same program on the secrets themselves."""
    description = server.bundle.description
    program = PrivateProgram(description)
    runner = Runner(PlainOperations(), PlainMaps(description, server.weights))
    logits = program.forward(lambda _: runner, program.new_cache(), token_ids, "all")
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def client(private_serving: PrivateServer, private_store: Path) -> Iterator[Client]:
    """For all tests: its session is set up once, unless a test breaks it."""
    with Client(private_serving.address, private_store) as client:
        yield client
    assert_nothing_is_left(private_serving)


def mode_of(client: Client) -> PrivateMode:
    assert isinstance(client.mode, PrivateMode)
    return client.mode


def test_generates_what_the_program_computes_in_plaintext(
    client: Client, private_serving: PrivateServer
) -> None:
    """Two ranks; a prompt in one pass, then tokens one by one, each through all layers."""
    before = client.free_slots
    tokens = list(client.generate_ids(PROMPT, 3))
    logits = plain_logits(private_serving, PROMPT + tokens[:-1])
    assert tokens == logits[len(PROMPT) - 1 :].argmax(dim=1).tolist()
    assert client.free_slots == before - len(PROMPT) - 2
    generation = client.last
    assert generation is not None
    operations = generation.to_dict()["operations"]
    assert isinstance(operations, dict)
    parts = {"COTs", "embed", "linear", "rms_norm", "attention", "swiglu", "logits"}
    assert set(operations) == {"setup", "turn", "COTs", PRODUCTS_AHEAD} | parts
    for name in ("embed", "linear"):
        assert operations[name]["bytes_received"] == operations[name]["rounds"] == 0, "one message"
    ahead = operations.pop(PRODUCTS_AHEAD)
    assert generation.stats.round_trips == sum(each["rounds"] for each in operations.values()) > 0
    for name in ("bytes_sent", "bytes_received"):
        assert getattr(generation.stats, name) == sum(each[name] for each in operations.values())
    assert generation.stats.prepare_s == ahead["seconds"]
    assert generation.stats.slots_used == len(PROMPT) + 2


def test_logits_of_every_position_in_passes_of_few_rows(
    client: Client, private_serving: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateMode, "prefill_rows", 3)
    logits = client.forward(PROMPT)
    torch.testing.assert_close(logits, plain_logits(private_serving, PROMPT), atol=0.03, rtol=0.01)


def test_one_rank(private_model: Path, tmp_path: Path) -> None:
    with private_server(private_model) as server, Client(server.address, tmp_path) as client:
        logits = client.forward([3, 4])  # prepares by itself
        torch.testing.assert_close(logits, plain_logits(server, [3, 4]), atol=0.03, rtol=0.01)
        assert client.free_slots == 256 - 2


def test_two_ranks_behind_tls(private_model: Path, tmp_path: Path) -> None:
    """The relay's client speaks TLS, the ranks behind it do not."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, ca = (tmp_path / name for name in ("chain.pem", "key.pem", "ca.pem"))
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    with (
        private_server(private_model, 2, tls_cert=chain, tls_key=key) as server,
        Client(server.address, tmp_path, ca=str(ca)) as client,
    ):
        client.prepare(16)
        want = plain_logits(server, [3, 4])
        torch.testing.assert_close(client.forward([3, 4]), want, atol=0.03, rtol=0.01)


def test_an_idle_client_gets_a_new_session(private_model: Path, tmp_path: Path) -> None:
    with (
        private_server(private_model, 2, idle_timeout_s=1.0) as server,
        Client(server.address, tmp_path) as client,
    ):
        client.prepare(16)
        client.forward([1])
        session = mode_of(client)._session
        assert session is not None
        assert eventually(lambda: not session.alive)
        assert_nothing_is_left(server)
        client.forward([1])
        assert mode_of(client)._session is not session


def test_nothing_about_the_weights_is_published(
    client: Client, private_serving: PrivateServer
) -> None:
    assert client.info()["weights"] == "private"
    message = private_serving.bundle.description.to_message()
    assert set(message) == {"spec", "exponents", "inverse_frequencies"}
    bundle = private_serving.bundle.to_bytes()
    for weights in private_serving.weights.values():
        for secret in (weights.weight, weights.multipliers, weights.bias):
            if secret is not None:
                assert secret.reshape(-1)[:16].contiguous().numpy().tobytes() not in bundle
    with private_server(Path(__file__).parents[2] / "otpipe" / "sample") as other:
        assert other.bundle.fingerprint != private_serving.bundle.fingerprint


def test_what_the_server_sees_does_not_depend_on_the_tokens(
    private_serving: PrivateServer, tmp_path: Path
) -> None:
    """Same lengths, same frames: types, labels and sizes, in order, on the line to every rank."""
    with Client(private_serving.address, tmp_path) as preparing:
        preparing.prepare(16)
    seen = []
    for tokens in ([1, 2], [66, 66]):
        with recording_proxy(private_serving.address) as proxy:
            with Client(proxy.address, tmp_path) as watched:
                mode = mode_of(watched)
                mode.forward(tokens, mode.new_cache(), "last")
            frames = [Recording.frames(each.to_server) for each in proxy.recordings]
        seen.append([[frame.shape for frame in line if frame.type in WATCHED] for line in frames])
    assert seen[0] == seen[1]
    assert sum(map(len, seen[0])) > 100


WATCHED = (MessageType.CHANNEL, MessageType.PASS, MessageType.PASS_DONE, MessageType.ATTACH)


# -- texts and turns -------------------------------------------------------------------------------


def test_a_new_text_ends_the_one_before(client: Client) -> None:
    mode = mode_of(client)
    first, second = mode.new_cache(), mode.new_cache()
    mode.forward([1, 2], first, "none")
    mode.forward([3], second, "none")
    with pytest.raises(UsageError, match="one text at a time"):
        mode.forward([4], first, "none")
    mode.forward([4], second, "none")
    assert second.length == 2


def test_two_clients_take_turns(
    client: Client, private_serving: PrivateServer, tmp_path: Path
) -> None:
    with Client(private_serving.address, tmp_path) as other:
        other.prepare(16)
        results: list[Tensor] = []
        threads = [
            threading.Thread(target=lambda each=each: results.append(each.forward([7, 8])))  # type: ignore[misc]
            for each in (client, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    torch.testing.assert_close(results[0], results[1], atol=0.03, rtol=0.01)


def test_a_client_that_leaves_in_a_pass_gives_up_its_turn(
    client: Client, private_serving: PrivateServer, private_store: Path, tmp_path: Path
) -> None:
    """Cut in the middle of a pass: the ranks forget its shares, and the next one has its turn."""
    connections = len(private_serving.gateway._sockets)
    sessions = [len(rank.mailbox._open) for rank in private_serving.ranks]
    with (
        recording_proxy(private_serving.address) as proxy,
        Client(proxy.address, tmp_path) as leaving,
    ):
        leaving.prepare(16)
        leaving.warm_up(3)
        prepared = sum(len(r.to_server) for r in proxy.recordings)
        cut_after(proxy, prepared + 200_000)
        with pytest.raises(ConnectionLost):
            leaving.forward([1, 2, 3])
    assert eventually(lambda: len(private_serving.gateway._sockets) <= connections)
    assert eventually(
        lambda: [len(rank.mailbox._open) for rank in private_serving.ranks] == sessions
    )
    assert client.forward([5]).shape == (1, 67)


def cut_after(proxy: Proxy, num_bytes: int) -> None:
    """Cut all connections once so many bytes in all have gone to the server."""

    def cut(_number: int, _sent: int) -> bool:
        return sum(len(r.to_server) for r in proxy.recordings) > num_bytes

    proxy.cut = cut


def test_a_lost_session_cannot_be_resumed(client: Client) -> None:
    mode = mode_of(client)
    cache = mode.new_cache()
    mode.forward([1, 2], cache, "none")
    assert mode._session is not None
    mode._session._lines[1].link.close()
    with pytest.raises(ConnectionLost, match="the server's shares of this text; generate again"):
        mode.forward([3], cache, "none")
    assert client.forward([1]).shape == (1, 67)  # a new text gets a new session


def test_tokens_and_positions_are_checked_before_a_slot_is_spent(client: Client) -> None:
    before = client.free_slots
    mode = mode_of(client)
    for tokens, sentence in (
        ([], "no token"),
        ([67], "outside the vocabulary"),
        ([1] * 513, "512"),
    ):
        with pytest.raises(UsageError, match=sentence):
            mode.forward(tokens, mode.new_cache(), "none")
    assert client.free_slots == before


def test_a_text_goes_on_with_what_the_ranks_have_of_it(
    client: Client, private_serving: PrivateServer
) -> None:
    text = client.new_text()
    said = [*PROMPT[:3], *client.generate_ids(PROMPT[:3], 2, text=text)]
    before = client.free_slots
    (answer,) = client.generate_ids([*said, 9, 10], 1, text=text)
    assert before - client.free_slots == 3, "the last token generated, and the two new ones"
    assert answer == plain_logits(private_serving, [*said, 9, 10])[-1].argmax()
    with pytest.raises(UsageError, match="begin a new text"):
        client.generate_ids(said[1:], 1, text=text)


# -- slots ----------------------------------------------------------------------------------------


def test_a_slot_is_answered_once(
    client: Client, private_serving: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that names slots that were answered, or will never come, is refused."""
    mode = mode_of(client)
    mode.forward([1], mode.new_cache(), "none")
    import otpipe.client.private_session as session

    spans_of = session.spans_of
    used: list[object] = []

    def again(lease: object) -> object:
        used.append(spans_of(lease))  # type: ignore[arg-type]
        return used[0]

    monkeypatch.setattr(session, "spans_of", again)
    mode.forward([1], mode.new_cache(), "none")
    with pytest.raises(ServerRefused, match="a slot is answered once"):
        mode.forward([1], mode.new_cache(), "none")


def test_slots_of_an_earlier_start_are_refused(private_model: Path, tmp_path: Path) -> None:
    with private_server(private_model, 2) as server, Client(server.address, tmp_path) as client:
        client.prepare(16)
        assert client.free_slots == 16
        address = server.gateway.port
    with private_server(private_model, 2) as server:
        assert address
        with Client(server.address, tmp_path) as client:
            assert client.free_slots == 0, "pads are bound to a start of the server"
            with pytest.raises(SlotsExhausted):
                mode_of(client).forward([1], mode_of(client).new_cache(), "none")
        with pytest.raises(FingerprintMismatch):
            Client(server.address, tmp_path, fingerprint="0" * 64)


def test_a_server_that_forgot_the_masks_says_so(
    client: Client, private_serving: PrivateServer, tmp_path: Path
) -> None:
    with Client(private_serving.address, tmp_path) as forgotten:
        forgotten.prepare(16)
        batch = bytes.fromhex(forgotten._store.batches[0].path.name)
        for rank in private_serving.ranks:
            del rank.ledger._batches[batch]
        with pytest.raises(ServerRefused, match="prepare new slots"):
            forgotten.forward([1])


# -- preparation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tamper", [lose, double, truncate])
def test_a_wrong_block_ends_the_preparation(
    private_serving: PrivateServer, tmp_path: Path, tamper: Tamper
) -> None:
    connections = len(private_serving.gateway._sockets)
    with tampering_proxy(private_serving.address) as proxy:
        proxy.plan = Plan(1, True, 0, tamper, MessageType.OLE_BLOCK)
        with Client(proxy.address, tmp_path) as client:
            with pytest.raises((ServerRefused, ProtocolError), match=r"due|arrived|inside"):
                client.prepare(16)
            assert client.free_slots == 0
    assert eventually(lambda: len(private_serving.gateway._sockets) <= connections)
    for rank in private_serving.ranks:
        assert eventually(lambda rank=rank: rank.ole_turns.free == MAX_EXCHANGES_PER_RANK)  # type: ignore[misc]


def test_a_cut_line_repeats_the_exchange_under_fresh_masks(
    private_serving: PrivateServer, tmp_path: Path
) -> None:
    with recording_proxy(private_serving.address) as proxy:
        cuts: list[int] = []

        def cut(number: int, sent: int) -> bool:
            if sent > 700_000 and not cuts:
                cuts.append(number)
                return True
            return False

        proxy.cut = cut
        options = LinkOptions(ServerAddress.parse_list(proxy.address), retry_for_s=5)
        with Client(proxy.address, tmp_path, link_options=options) as client:
            client.prepare(16)
            assert cuts
            logits = client.forward(PROMPT[:2])
    want = plain_logits(private_serving, PROMPT[:2])
    torch.testing.assert_close(logits, want, atol=0.03, rtol=0.01)


# -- secrets ---------------------------------------------------------------------------------------


def test_logs_tell_no_secret(
    client: Client, private_serving: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        list(client.generate_ids(PROMPT, 2))
        session = mode_of(client)._session
    said = " ".join(record.getMessage() for record in caplog.records)
    assert session is not None
    keys = [
        key
        for rank in private_serving.ranks
        for batch in rank.ledger._batches.values()
        for key in batch.keys.values()
    ]
    assert keys
    for secret in keys:
        assert secret.hex() not in said
        assert repr(secret) not in said
    for rank in private_serving.ranks:
        for batch in rank.ledger._batches.values():
            assert not any(repr(key) in repr(batch) for key in batch.keys.values())
    assert "token" not in said
