"""The server's public description of its model: from the cache on disk, or from the server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from otpipe.client.link import ServerLink
from otpipe.errors import ProtocolError
from otpipe.protocol.messages import Bundle, GetBundle, MessageType
from otpipe.protocol.wire import MAX_PAYLOAD_BYTES, Header


def load_bundle_bytes(link: ServerLink, directory: Path) -> bytes:
    """The bytes that the server's WELCOME announced, checked against the hash given there.

    Args:
        directory: where descriptions are kept, under their hash.

    Raises:
        ProtocolError: the server sends something else than it announced.
    """
    welcome = link.welcome
    path = directory / f"{welcome.bundle_sha256.hex()}.bundle"
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).digest() != welcome.bundle_sha256:
        data = _download(link, welcome.bundle_bytes, welcome.bundle_sha256)
        _write_atomically(path, data)
    return data


def check_name(announced: str, described: str) -> None:
    """Raise ProtocolError for a description of another model than the WELCOME announced."""
    if announced != described:
        raise ProtocolError(
            f"the server announced weights {announced[:16]} and described {described[:16]}; it "
            "contradicts itself, use another server"
        )


def _download(link: ServerLink, num_bytes: int, sha256: bytes) -> bytes:
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"the server announced a model description of {num_bytes} bytes; at most "
            f"{MAX_PAYLOAD_BYTES} are accepted"
        )

    def due(header: Header) -> int:
        Bundle.parse(header)
        return num_bytes

    data = link.request(GetBundle(), b"", MessageType.BUNDLE, due).tobytes()
    if hashlib.sha256(data).digest() != sha256:
        raise ProtocolError(
            "the model description does not have the hash that the server announced; try again"
        )
    return data


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
