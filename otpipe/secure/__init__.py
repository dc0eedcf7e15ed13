"""Secure operations on additive shares of two parties, by oblivious transfer.

The server holds one part of every secret, the client the other; both run the same program of
operations in lockstep. See docs/secure_operations.md.
"""

from otpipe.secure.cost import Cost, cost_of
from otpipe.secure.formats import DecoderFormats, Format
from otpipe.secure.operations import SecureOperations
from otpipe.secure.party import Party
from otpipe.secure.plain import PlainOperations
from otpipe.secure.rounds import Step, together
from otpipe.secure.shares import Share

__all__ = [
    "Cost",
    "DecoderFormats",
    "Format",
    "Party",
    "PlainOperations",
    "SecureOperations",
    "Share",
    "Step",
    "cost_of",
    "together",
]
