"""Lost connections: the same tokens, no pad used twice, and a clear end when nobody comes back."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import build_checkpoint, relative_error
from click.testing import CliRunner
from cutting_proxy import CuttingProxy, cutting_proxy
from proxies import Recording, recording_proxy
from servers import SAMPLE, LocalServer, local_server

from otpipe import Client
from otpipe.cli import main as cli
from otpipe.client.link import LinkOptions, ServerAddress, ServerLink
from otpipe.errors import (
    ConnectionLost,
    FingerprintMismatch,
    OtpipeError,
    ProtocolError,
    ServerRefused,
    UsageError,
)
from otpipe.model.program import forward
from otpipe.model.reference import PlaintextExecutor
from otpipe.protocol.messages import (
    Error,
    Linear,
    Message,
    MessageType,
    Ping,
    Welcome,
    send_message,
)
from otpipe.protocol.wire import FrameConnection

PROMPT = [2, 71, 8, 28, 18, 28, 45, 90]
NUM_TOKENS = 12
POSITIONS = len(PROMPT) + NUM_TOKENS - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def reference(model: Path) -> PlaintextExecutor:
    return PlaintextExecutor.from_checkpoint(model, quantised=True)


@pytest.fixture(scope="module")
def expected(reference: PlaintextExecutor) -> list[int]:
    """The tokens of an uninterrupted generation."""
    tokens: list[int] = []
    cache, pending = reference.new_cache(), PROMPT
    for _ in range(NUM_TOKENS):
        logits = forward(reference, pending, cache)
        assert logits is not None
        tokens.append(int(logits[0].argmax()))
        pending = tokens[-1:]
    return tokens


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    with local_server(model) as serving:
        yield serving


@pytest.fixture
def proxy(server: LocalServer) -> Iterator[CuttingProxy]:
    with cutting_proxy(server.address) as cutting:
        yield cutting


def requests(recordings: list[Recording]) -> list[bytes]:
    """Payloads of all complete masked requests that left the client."""
    frames = [f for r in recordings for f in Recording.frames(r.to_server)]
    return [f.payload for f in frames if f.type == MessageType.LINEAR]


def token_bytes(client: Client, direction: str) -> int:
    return int(str(client.info()[f"bytes_{direction}_a_token"]))


# -- cut lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("upward", [True, False], ids=["request", "answer"])
@pytest.mark.parametrize("tokens_before", [0.3, 1.1, 9.7, 10.02])
def test_a_cut_inside_a_message_changes_nothing(
    upward: bool,
    tokens_before: float,
    proxy: CuttingProxy,
    expected: list[int],
    tmp_path: Path,
) -> None:
    with Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        size = token_bytes(client, "up" if upward else "down")
        arm = proxy.cut_upward if upward else proxy.cut_downward
        arm(int(tokens_before * size))
        assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected
        assert proxy.cuts == 1
        assert client.last is not None
        stats = client.last.stats
        assert client.free_slots == 64 - POSITIONS
        assert stats.slots_used == POSITIONS
        assert stats.round_trips == NUM_TOKENS * len(client.bundle.spec.maps)
        sent = requests(proxy.recordings)
        # At most the one request in flight is sent twice, and then with the same bytes.
        assert len(set(sent)) == stats.round_trips
        assert len(sent) <= stats.round_trips + 1


def test_many_cuts_during_one_generation(
    proxy: CuttingProxy, expected: list[int], tmp_path: Path
) -> None:
    """Also inside the greetings of the restored connections. Most messages get through."""
    with Client(proxy.address, tmp_path) as client:
        client.prepare(64)
        tokens = client.generate_ids(PROMPT, NUM_TOKENS)
        received = [next(tokens)]  # a prompt's requests are larger than the distance of the cuts
        proxy.cut_upward(*range(500, 60_000, 1301))
        proxy.cut_downward(*range(700, 60_000, 1709))
        received += tokens
        assert received == expected
        assert proxy.cuts > 40
        assert client.last is not None
        assert client.last.finish_reason == "length"
        assert client.last.stats.slots_used == POSITIONS
        assert client.free_slots == 64 - POSITIONS
        round_trips = NUM_TOKENS * len(client.bundle.spec.maps)
        assert client.last.stats.round_trips == round_trips
        assert len(set(requests(proxy.recordings))) == round_trips


def test_a_client_may_pause_longer_than_the_server_waits(
    model: Path, expected: list[int], tmp_path: Path
) -> None:
    with (
        local_server(model, idle_timeout_s=0.3) as server,
        Client(server.address, tmp_path) as client,
    ):
        client.prepare(64)
        time.sleep(0.8)
        tokens = client.generate_ids(PROMPT, NUM_TOKENS)
        received = [next(tokens)]
        time.sleep(0.8)
        assert received + list(tokens) == expected


def test_an_interrupted_request_leaves_no_answer_behind(
    server: LocalServer, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between request and answer; the next generation begins with the same kind of one."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with Client(server.address, tmp_path) as client:
        client.prepare(64)
        with monkeypatch.context() as patch:
            patch.setattr(FrameConnection, "receive_head", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(client.generate_ids(PROMPT[::-1], NUM_TOKENS))
        assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected
        assert client.free_slots == 64 - len(PROMPT) - POSITIONS


# -- replicas ------------------------------------------------------------------------------------


def test_another_replica_goes_on_in_mid_sentence(
    model: Path, expected: list[int], tmp_path: Path
) -> None:
    with (
        local_server(model) as first,
        local_server(model, world_size=2) as second,
        recording_proxy(first.address) as to_first,
        recording_proxy(second.address) as to_second,
        Client(f"{to_first.address}, {to_second.address}", tmp_path) as client,
    ):
        client.prepare(64)
        tokens = client.generate_ids(PROMPT, NUM_TOKENS)
        received = list(itertools.islice(tokens, 5))
        assert requests(to_first.recordings)
        assert not requests(to_second.recordings)
        first.gateway.close()
        received += tokens
        assert received == expected
        assert requests(to_second.recordings)
        assert client.last is not None
        assert client.last.stats.slots_used == POSITIONS
        both = requests(to_first.recordings) + requests(to_second.recordings)
        assert len(set(both)) == client.last.stats.round_trips


def test_a_replica_with_other_weights_is_refused(model: Path, tmp_path: Path) -> None:
    other_model = build_checkpoint(tmp_path / "other", seed=2)
    with (
        local_server(model) as first,
        local_server(other_model) as second,
        recording_proxy(second.address) as to_second,
        Client(f"{first.address},{to_second.address}", tmp_path) as client,
    ):
        client.prepare(64)
        tokens = client.generate_ids(PROMPT, NUM_TOKENS)
        received = list(itertools.islice(tokens, 3))
        first.gateway.close()
        with pytest.raises(FingerprintMismatch) as raised:
            list(tokens)
        assert str(raised.value) == (
            f"the server at {to_second.address} holds weights {second.bundle.fingerprint[:16]}, "
            f"but {first.bundle.fingerprint[:16]} are in use here; name a replica of those, or "
            "start anew to work with the others"
        )
        assert requests(to_second.recordings) == []
        assert client.last is not None
        assert client.last.token_ids == received


def test_a_foreign_replica_in_the_list_does_not_matter_while_a_good_one_is_there(
    model: Path, expected: list[int], tmp_path: Path
) -> None:
    other_model = build_checkpoint(tmp_path / "other", seed=2)
    with (
        local_server(model) as good,
        local_server(other_model) as foreign,
        cutting_proxy(good.address) as to_good,
    ):
        with Client(to_good.address, tmp_path) as client:
            client.prepare(64)
        with Client(f"{to_good.address},{foreign.address}", tmp_path) as client:
            to_good.cut_upward(9000)
            assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected
            assert to_good.cuts == 1


# -- nobody comes back ---------------------------------------------------------------------------


def test_a_server_that_stays_away_ends_the_generation_in_time(
    proxy: CuttingProxy, expected: list[int], tmp_path: Path
) -> None:
    with Client(proxy.address, tmp_path, retry_for_s=1.0) as client:
        client.prepare(64)
        proxy.cut_downward(int(11.5 * token_bytes(client, "down")), stay_away=True)
        received = []
        started_s = time.monotonic()
        with pytest.raises(ConnectionLost, match="; start it, or check address"):
            for token in client.generate_ids(PROMPT, NUM_TOKENS):
                received.append(token)
        assert time.monotonic() - started_s < 4
        assert 0 < len(received) < NUM_TOKENS
        assert received == expected[: len(received)]
        assert client.last is not None
        assert client.last.token_ids == received
        assert client.last.finish_reason == "connection_lost"
        assert client.last.stats.slots_used == len(PROMPT) + len(received)
        assert client.free_slots == 64 - len(PROMPT) - len(received)
        # When the server is back, the same client goes on, with fresh slots.
        proxy.refuse = False
        assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected
    with pytest.raises(ConnectionLost, match="this client is closed; open a new one"):
        client._link.request(Ping(), b"", MessageType.PONG, lambda header: 0)


def test_a_refusal_is_passed_on_and_the_next_request_works(
    server: LocalServer, expected: list[int], tmp_path: Path
) -> None:
    with Client(server.address, tmp_path) as client:
        with pytest.raises(ServerRefused, match="map 99 was asked for; this model has 0 to"):
            client._link.request(Linear(99, 1), b"1234", MessageType.RESULT, lambda header: 4)
        client.prepare(64)
        assert list(client.generate_ids(PROMPT, NUM_TOKENS)) == expected


def test_a_server_that_only_greets_is_given_up(proxy: CuttingProxy, tmp_path: Path) -> None:
    """It accepts connections and drops requests; the client does not go round for ever."""
    with Client(proxy.address, tmp_path, retry_for_s=1.0) as client:
        client.prepare(64)
        proxy.cut_downward(*range(1, 400_000, 400))  # more than WELCOME, less than an answer
        started_s = time.monotonic()
        with pytest.raises(ConnectionLost):
            client.forward(PROMPT)
        assert time.monotonic() - started_s < 6


def test_no_server_at_all(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"no server at 127\.0\.0\.1:9 answered within 0 s"):
        Client("127.0.0.1:9", tmp_path, retry_for_s=0.3)
    assert time.monotonic() - started_s < 3
    with pytest.raises(UsageError, match=r"'nowhere' is not HOST:PORT"):
        Client("nowhere", tmp_path)


def test_the_command_line_keeps_the_text_so_far(tmp_path: Path) -> None:
    command = ["generate", "--store", str(tmp_path), "--raw", "--max-new-tokens", "20"]
    command += ["--prompt", "And it came to pass", "--retry-for", "0.5"]
    with local_server(SAMPLE) as server, cutting_proxy(server.address) as proxy:
        with Client(proxy.address, tmp_path) as client:
            client.prepare(64)
            whole = "".join(client.generate("And it came to pass", 20, raw=True))
            size = token_bytes(client, "down")
        proxy.cut_downward(int(13.5 * size), stay_away=True)
        result = CliRunner().invoke(cli, [*command, "--server", proxy.address])
    assert result.exit_code == 1
    text = result.stdout.rstrip("\n")
    assert len(text) > 5
    assert whole.startswith(text)
    assert text != whole
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"otpipe: no server at {proxy.address} answered within")
    assert "Traceback" not in result.output


# -- preparation ---------------------------------------------------------------------------------


def test_an_interrupted_preparation_goes_on(
    proxy: CuttingProxy, reference: PlaintextExecutor, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    with Client(proxy.address, tmp_path, on_prepare=lambda *step: steps.append(step)) as client:
        total = client.prepare(64).bytes_sent
        steps.clear()
        # Cuts inside uploads, and inside the answers of others.
        proxy.cut_upward(*(int(total * part) for part in (0.1, 0.35, 0.7, 0.95)))
        proxy.cut_downward(150_000, 400_000)
        report = client.prepare(64)
        assert proxy.cuts == 6
        assert report.slots == 64
        assert report.bytes_sent > total
        assert client.free_slots == 128
        assert steps[-1][0] == steps[-1][1]
        assert all(0 <= done <= whole for done, whole in steps)
        client.forward(PROMPT * 8)  # the slots of the first batch
        tokens = (PROMPT * 8)[::-1]
        got = client.forward(tokens)
        want = forward(reference, tokens, reference.new_cache(), "all")
        assert want is not None
        assert relative_error(got, want) < 1e-3
        assert client.free_slots == 0
    begun = [
        frame
        for r in proxy.recordings
        for frame in Recording.frames(r.to_server)
        if frame.type == MessageType.OLE_BEGIN
    ]
    keys = [bytes(frame.header["a_key"]) for frame in begun]  # type: ignore[call-overload]
    assert len(begun) >= 2 * len(client.bundle.spec.maps) + 4
    assert len(set(keys)) == len(keys)


def test_finished_batches_survive_a_preparation_that_fails(
    proxy: CuttingProxy, reference: PlaintextExecutor, tmp_path: Path
) -> None:
    with Client(proxy.address, tmp_path, retry_for_s=0.5) as client:
        sent = client.prepare(64).bytes_sent
        proxy.cut_upward(sent // 2, stay_away=True)
        with pytest.raises(ConnectionLost):
            client.prepare(64)
        assert client.free_slots == 64
    proxy.refuse = False
    with Client(proxy.address, tmp_path) as client:
        assert client.free_slots == 64
        want = forward(reference, PROMPT, reference.new_cache(), "all")
        assert want is not None
        assert relative_error(client.forward(PROMPT), want) < 1e-3
        client.prepare(64)
        assert client.free_slots == 128 - len(PROMPT)
    assert not [path for path in tmp_path.rglob("*.partial") if path.is_dir()]


# -- the model's description ---------------------------------------------------------------------


def test_the_description_is_downloaded_once(server: LocalServer, tmp_path: Path) -> None:
    def downloads() -> int:
        with recording_proxy(server.address) as proxy:
            with Client(proxy.address, tmp_path) as client:
                assert client.fingerprint == server.bundle.fingerprint
            frames = [f for r in proxy.recordings for f in Recording.frames(r.to_server)]
        return sum(frame.type == MessageType.GET_BUNDLE for frame in frames)

    assert downloads() == 1
    assert downloads() == 0
    (cached,) = (tmp_path / "models").glob("*.bundle")
    good = cached.read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2], b""):
        cached.write_bytes(damaged)
        assert downloads() == 1
        assert cached.read_bytes() == good
        assert downloads() == 0


# -- text of the server that reaches a terminal ----------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07all is\r\nwell\x9b31m\u202e" + "x" * 900
FINGERPRINT = "ab" * 32


@contextmanager
def scripted_server(*answers: Message) -> Iterator[str]:
    """Greets every client, and answers its requests, with these messages in turn."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                connection = FrameConnection(sock)
                with contextlib.suppress(OtpipeError):
                    for answer in answers:
                        connection.receive_head()
                        send_message(connection, answer)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def welcome_of(server: str = "otpipe", weights: str = "public", fingerprint: str = "") -> Welcome:
    return Welcome(
        server=server,
        fingerprint=fingerprint or FINGERPRINT,
        weights=weights,
        num_ranks=1,
        bundle_bytes=1,
        bundle_sha256=bytes(32),
    )


def link_to(address: str) -> ServerLink:
    return ServerLink(LinkOptions(ServerAddress.parse_list(address), retry_for_s=0))


def test_the_greeting_is_printable() -> None:
    with scripted_server(welcome_of(server=EVIL, weights=EVIL)) as address:
        link = link_to(address)
        link.close()
    for text in (link.welcome.server, link.welcome.weights):
        assert text.isprintable()
        assert text.startswith("?[2J?]0;owned?all is well?31m?xxx")
        assert len(text) <= 160


@pytest.mark.parametrize("fingerprint", [EVIL, "ab" * 31, "AB" * 32, "ab" * 32 + "\n"])
def test_a_greeting_without_a_fingerprint(fingerprint: str) -> None:
    with (
        scripted_server(welcome_of(fingerprint=fingerprint)) as address,
        pytest.raises(ProtocolError, match="a fingerprint that is not 64 hex digits") as caught,
    ):
        link_to(address)
    assert str(caught.value).isprintable()


def test_refusals_are_printable() -> None:
    with scripted_server(Error(EVIL)) as address:
        with pytest.raises(ConnectionLost, match=r"refused: .*owned") as caught:
            link_to(address)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700
    with scripted_server(welcome_of(), Error(EVIL)) as address:
        link = link_to(address)
        with pytest.raises(ServerRefused, match=r"the server refused: .*owned") as refused:
            link.request(Ping(), b"", MessageType.PONG, lambda _: 0)
        link.close()
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 500


# -- the fingerprint that the user asks for --------------------------------------------------------


def test_a_fingerprint_is_pinned(server: LocalServer, tmp_path: Path) -> None:
    held = server.bundle.fingerprint
    for wanted in (held, held[:32], held[:40].upper()):
        Client(server.address, tmp_path, fingerprint=wanted).close()
    for wanted in (held[:31], held[:16], "", "x" * 64):
        with pytest.raises(UsageError, match="is not at least 32 hex digits; copy it from"):
            Client(server.address, tmp_path, fingerprint=wanted)
    other = held[:31] + ("0" if held[31] != "0" else "1")
    with pytest.raises(FingerprintMismatch, match=f"holds weights {held}, not the {other} that"):
        Client(server.address, tmp_path, fingerprint=other)
