"""Everything public of a private model, as one message: sizes, scales and tokenizer files.

No digest, norm, gain, bias or fingerprint of the weights: each would tell something about them.
What takes the fingerprint's place is a random number that a server draws when it starts: pads are
bound to it, since the masks that answer them live as long as that process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from otpipe.errors import ProtocolError
from otpipe.model.bundle import (
    MAX_BUNDLE_BYTES,
    checked_files,
    decode_message,
    encode_message,
)
from otpipe.model.private_description import PrivateDescription
from otpipe.model.spec import ModelSpec

BUNDLE_VERSION = 1
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_NAMES = {"version", "fingerprint", "description", "files"}


def new_fingerprint() -> str:
    """The name of one start of one server: 32 bytes of the operating system, hex."""
    return os.urandom(32).hex()


@dataclass(frozen=True, eq=False)
class PrivateBundle:
    """The public description of one private model at one server.

    Attributes:
        fingerprint: random, of this start of the server; 64 hex digits.
        description: sizes, and the public scale of each segment.
        files: some of ``bundle.PUBLIC_FILES``.
    """

    fingerprint: str
    description: PrivateDescription
    files: Mapping[str, bytes]

    @property
    def spec(self) -> ModelSpec:
        """Sizes of the model."""
        return self.description.spec

    def to_bytes(self) -> bytes:
        """One msgpack message."""
        return encode_message(
            {
                "version": BUNDLE_VERSION,
                "fingerprint": self.fingerprint,
                "description": self.description.to_message(),
                "files": {name: self.files[name] for name in sorted(self.files)},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> PrivateBundle:
        """Read what :meth:`to_bytes` wrote, trusting nothing; raises ProtocolError."""
        if len(data) > MAX_BUNDLE_BYTES:
            raise _bad(f"{len(data)} bytes where at most {MAX_BUNDLE_BYTES} are allowed")
        try:
            message: Any = decode_message(data)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise _bad(f"no valid msgpack ({error!s:.60})") from None
        if not isinstance(message, dict) or set(message) != _NAMES:
            raise _bad("missing or unknown entries")
        if message["version"] != BUNDLE_VERSION:
            raise _bad(f"version {message['version']!r:.20}, not {BUNDLE_VERSION}")
        fingerprint = message["fingerprint"]
        if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
            raise _bad("a malformed fingerprint")
        return cls(
            fingerprint,
            PrivateDescription.from_message(message["description"]),
            checked_files(message["files"]),
        )


def _bad(found: str) -> ProtocolError:
    return ProtocolError(
        f"The private model bundle of the server has {found}; use a server of this version."
    )
