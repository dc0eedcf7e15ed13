"""Where the server agrees to listen, and TLS from both sides."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trustme
from checkpoints import build_checkpoint
from raw_client import HELLO, raw_client
from servers import LocalServer, local_server

from otpipe import Client
from otpipe.errors import OtpipeError, UsageError
from otpipe.protocol.messages import MessageType
from otpipe.server.gateway import Listener, ListenOptions
from otpipe.server.launch import RankOptions, RankPlan, choose_device

CLEARLY_WITHIN_S = 4.0


@dataclass(frozen=True)
class Identity:
    """PEM files of a server and its authority."""

    ca: Path
    cert: Path
    key: Path


def make_identity(directory: Path, name: str = "127.0.0.1") -> Identity:
    authority = trustme.CA()
    issued = authority.issue_cert(name)
    identity = Identity(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    authority.cert_pem.write_to_path(str(identity.ca))
    issued.private_key_pem.write_to_path(str(identity.key))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(identity.cert), append=True)
    return identity


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def tls_server(model: Path, identity: Identity) -> Iterator[LocalServer]:
    with local_server(
        model, tls_cert=identity.cert, tls_key=identity.key, stall_timeout_s=1.0
    ) as server:
        yield server


@pytest.fixture(scope="module")
def plain_server(model: Path) -> Iterator[LocalServer]:
    with local_server(model, stall_timeout_s=1.0) as server:
        yield server


def refusal(address: str, store: Path, ca: Path | None) -> str:
    """The sentence that a client gets, within seconds."""
    started_s = time.monotonic()
    with pytest.raises(OtpipeError) as caught:
        Client(address, store, ca=None if ca is None else str(ca))
    assert time.monotonic() - started_s < CLEARLY_WITHIN_S
    return str(caught.value)


# -- TLS -------------------------------------------------------------------------------------------


def test_tls_serves(tls_server: LocalServer, identity: Identity, tmp_path: Path) -> None:
    with Client(tls_server.address, tmp_path, ca=str(identity.ca)) as client:
        client.prepare(64)
        assert len(list(client.generate_ids([3, 5, 8], 4))) == 4


def test_tls_1_3_or_nothing(tls_server: LocalServer) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", tls_server.gateway.port)) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(sock)


def test_another_authority(tls_server: LocalServer, tmp_path: Path) -> None:
    other = make_identity(tmp_path)
    text = refusal(tls_server.address, tmp_path / "store", other.ca)
    assert "is not trusted" in text
    assert "--ca" in text


def test_another_host_name(model: Path, tmp_path: Path) -> None:
    identity = make_identity(tmp_path, "example.org")
    with local_server(model, tls_cert=identity.cert, tls_key=identity.key) as server:
        assert "127.0.0.1" in refusal(server.address, tmp_path / "store", identity.ca)


def test_plaintext_client_at_a_tls_server(tls_server: LocalServer, tmp_path: Path) -> None:
    """At once: it does not take this for a server that is away."""
    text = refusal(tls_server.address, tmp_path, None)
    assert "the first bytes are b'this', not b'OTPW'" in text
    assert "both or neither use TLS" in text


def test_tls_client_at_a_plaintext_server(
    plain_server: LocalServer, identity: Identity, tmp_path: Path
) -> None:
    """At once, too."""
    text = refusal(plain_server.address, tmp_path, identity.ca)
    assert "does not complete a TLS handshake" in text
    assert "leave out --ca if it serves plaintext" in text


@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01", HELLO, b"GET / HTTP/1.1\r\n\r\n"])
def test_a_handshake_that_fails_or_stalls_harms_nobody(
    tls_server: LocalServer, identity: Identity, tmp_path: Path, data: bytes
) -> None:
    """At most an alert, then the end, within the stall timeout."""
    with raw_client(tls_server.gateway.port, data, greet=False) as client:
        while client.sock.recv(1 << 12):
            pass
    Client(tls_server.address, tmp_path, ca=str(identity.ca)).close()


# -- where to listen -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_off_loopback_needs_tls(host: str, identity: Identity) -> None:
    sentence = rf"--host {host} is reachable .* --tls-cert and --tls-key, or --insecure-plaintext"
    with pytest.raises(UsageError, match=sentence):
        ListenOptions(host=host)
    ListenOptions(host=host, insecure_plaintext=True)
    ListenOptions(host=host, tls_cert=identity.cert, tls_key=identity.key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    ListenOptions(host=host)


def test_insecure_plaintext_serves(model: Path) -> None:
    with (
        local_server(model, host="0.0.0.0", insecure_plaintext=True) as server,
        raw_client(server.gateway.port, HELLO) as client,
    ):
        assert client.answer()[0] == MessageType.WELCOME


def test_ipv6(model: Path, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with local_server(model, host="::1") as server:
        assert server.gateway.address == f"[::1]:{server.gateway.port}"
        Client(server.gateway.address, tmp_path).close()


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError,
            match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; choose another",
        ):
            Listener(ListenOptions(port=port))


def test_a_port_that_is_taken_while_the_model_loads() -> None:
    first, second = Listener(ListenOptions(port=0)), None
    first.open()
    try:
        with pytest.raises(UsageError, match="Address already in use"):
            second = Listener(ListenOptions(port=first.port))
            second.open()
    finally:
        first.socket.close()
        if second is not None:
            second.socket.close()


def test_a_listener_refuses_until_it_is_opened() -> None:
    listener = Listener(ListenOptions(port=0))
    with listener.socket:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listener.port), 1)
        listener.open()
        socket.create_connection(("127.0.0.1", listener.port), 1).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range(port: int) -> None:
    with pytest.raises(UsageError, match=rf"--port is {port}; use 0 \(any free port\) to 65535"):
        ListenOptions(port=port)


def test_a_host_that_does_not_resolve() -> None:
    with pytest.raises(UsageError, match=r"--host no\.such\.invalid does not resolve"):
        ListenOptions(host="no.such.invalid")


def test_a_certificate_without_its_key(identity: Identity) -> None:
    for options in ({"tls_cert": identity.cert}, {"tls_key": identity.key}):
        with pytest.raises(UsageError, match="--tls-cert and --tls-key together, or neither"):
            ListenOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["missing", "garbage", "swapped", "foreign key"])
def test_a_bad_certificate(identity: Identity, tmp_path: Path, fault: str) -> None:
    cert, key = identity.cert, identity.key
    match fault:
        case "missing":
            cert = tmp_path / "none.pem"
        case "garbage":
            cert = tmp_path / "garbage.pem"
            cert.write_bytes(b"\x00\x01")
        case "swapped":
            cert, key = key, cert
        case "foreign key":
            key = make_identity(tmp_path).key
    with pytest.raises(UsageError, match=rf"--tls-cert {cert} with --tls-key {key} cannot be used"):
        Listener(ListenOptions(port=0, tls_cert=cert, tls_key=key))


# -- what else is checked before anything is loaded ------------------------------------------------


def rank_options(model: Path, **changes: object) -> RankOptions:
    options: dict[str, object] = {
        "model_dir": model,
        "rank": 0,
        "local_rank": 0,
        "world_size": 1,
        "device": "cpu",
        "transport": "auto",
        "threads": None,
        "audit": False,
        "listen": ListenOptions(port=0),
        **changes,
    }
    return RankOptions(**options)  # type: ignore[arg-type]


def test_a_plan_that_holds(model: Path) -> None:
    plan = RankPlan.check(rank_options(model))
    assert (plan.transport, plan.device.type) == ("gloo", "cpu")
    assert plan.listener is not None
    plan.listener.socket.close()
    assert RankPlan.check(rank_options(model, rank=1, world_size=2)).listener is None


def test_more_ranks_than_layers(model: Path) -> None:
    with pytest.raises(UsageError, match="3 ranks were started for a model of 2 layers"):
        RankPlan.check(rank_options(model, world_size=3))


def test_nccl_without_cuda(model: Path) -> None:
    with pytest.raises(UsageError, match="--transport nccl needs CUDA devices, and this rank"):
        RankPlan.check(rank_options(model, transport="nccl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device; use"):
        choose_device("cuda", 0)


def test_a_truncated_checkpoint(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OtpipeError, match=r"model\.safetensors.* bytes"):
        RankPlan.check(rank_options(tmp_path))
