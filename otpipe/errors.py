"""Every error a user can meet. ``str(error)`` is one sentence: what was seen, and the remedy.

The command line prints that sentence and exits non-zero; it never shows a traceback for these.
Anything else that escapes is a bug in otpipe.
"""

from __future__ import annotations


def one_line(text: object, limit: int = 160) -> str:
    """``text`` as one printable line of at most ``limit`` characters.

    For every text that a peer may have written, before it reaches a terminal or a log: control
    characters could rewrite what the user sees.
    """
    line = " ".join(str(text).split())
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= limit else printable[: limit - 3] + "..."


class OtpipeError(Exception):
    """Base class of all errors that are the fault of input, environment or peer."""


class UsageError(OtpipeError):
    """A flag, argument or file given by the user cannot be used."""


class CheckpointError(OtpipeError):
    """A checkpoint is missing, unsupported, truncated, or contradicts its own config."""


class ParameterError(OtpipeError):
    """Cryptographic parameters lie outside the published security table or noise bound."""


class ProtocolError(OtpipeError):
    """The peer sent something that the state of the conversation does not allow."""


class VersionMismatch(ProtocolError):  # noqa: N818 - reads as what it is
    """The peer speaks another version of the wire protocol."""


class FingerprintMismatch(OtpipeError):  # noqa: N818
    """The server holds other weights than the ones the pads were prepared for."""


class ServerRefused(OtpipeError):  # noqa: N818
    """The server answered a request with an error of its own."""


class ConnectionLost(OtpipeError):  # noqa: N818
    """The connection broke and could not be restored within the allowed time."""


class StoreError(OtpipeError):
    """The pad store cannot be used: damaged, full, unreadable or of another version."""


class StoreLocked(StoreError):  # noqa: N818
    """Another process holds the pad store."""


class SlotsExhausted(StoreError):  # noqa: N818
    """Fewer unused slots are left than the operation needs."""


class RankDied(OtpipeError):  # noqa: N818
    """One process of the pipeline died or fell silent."""
