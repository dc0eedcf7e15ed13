"""What a program of secure operations costs, from shapes alone: rounds, bytes, OTs.

The program runs as the server, on shares without data (torch's meta device), against a session that
counts what it is asked for. So the counts are those of the code that runs; tests compare them with
what a channel carried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpipe.ot import DEFAULT_OT_PARAMS, OtParams, SendCorrelated, SendOneOfMany
from otpipe.ot.channel import Bytes
from otpipe.ot.costs import exchange_traffic
from otpipe.ot.plan import Shape
from otpipe.secure.operations import SecureOperations
from otpipe.secure.party import Party, value_bytes
from otpipe.secure.rounds import Give, Request, Step, Tell, Values
from otpipe.secure.shares import Share


@dataclass(frozen=True)
class Cost:
    """Of one run of a program.

    Attributes:
        rounds: how often the client waits for an answer to what it sent.
        cots: correlated OTs that it takes from the pool.
        extension_bytes: client to server, to make those, ahead of time or not.
        to_server, to_client: payload bytes in the rounds.
    """

    rounds: int
    cots: int
    extension_bytes: int
    to_server: int
    to_client: int

    @property
    def total_bytes(self) -> int:
        """Both directions, the making of the OTs included."""
        return self.extension_bytes + self.to_server + self.to_client


def cost_of(
    program: Callable[[SecureOperations], Step[Any]], params: OtParams = DEFAULT_OT_PARAMS
) -> Cost:
    """Cost of one run.

    Args:
        program: makes the step, from :func:`operand` shares.
        params: of the OT session. ``extension_bytes`` counts exactly the OTs used; a pool is made
            in blocks, so a session may make some more.
    """
    party = _CountingParty()
    party.run(program(party))
    return Cost(
        rounds=party.rounds,
        cots=party.cots,
        extension_bytes=-(-party.cots * params.extension_bits // 8),
        to_server=party.to_server,
        to_client=party.to_client,
    )


def operand(shape: Sequence[int], bits: int, frac: int = 0) -> Share:
    """A share without data, for :func:`cost_of`."""
    return Share(torch.empty(tuple(shape), dtype=torch.int64, device="meta"), bits, frac)


class _CountingParty(Party):
    """The server without a peer: every round is counted instead of served."""

    def __init__(self) -> None:
        super().__init__("server", _Nothing(), _Nothing(), "meta")
        self.rounds = self.cots = self.to_server = self.to_client = 0
        self._answered = False

    def _serve(self, requests: Sequence[Request]) -> list[Any]:
        if any(not isinstance(request, Tell) for request in requests):
            self._answered = False
        if any(not isinstance(request, Give) for request in requests):
            # Messages of one direction that follow each other are one trip.
            self.rounds += not self._answered
            self._answered = True
        return [self._counted(request) for request in requests]

    def _counted(self, request: Request) -> Tensor | None:
        if isinstance(request, Values):
            size = request.values.numel() * value_bytes(request.bits)
            self.to_client += 0 if isinstance(request, Give) else size
            self.to_server += 0 if isinstance(request, Tell) else size
            return None if isinstance(request, Tell) else torch.empty_like(request.values)
        assert isinstance(request, SendCorrelated | SendOneOfMany), "the server only sends"
        shape = _shape(request)
        traffic = exchange_traffic([shape])
        self.cots += shape.cots
        self.to_server += traffic.to_sender
        self.to_client += traffic.to_receiver
        if isinstance(request, SendCorrelated):
            return torch.empty_like(request.correlation)
        return None


class _Nothing:
    """Neither session nor channel: the counting party overrides what would use them."""

    def exchange(self, requests: Sequence[Any]) -> list[Any]:
        raise AssertionError("a counting party has no peer")

    def send(self, label: str, payload: Bytes) -> None:
        raise AssertionError("a counting party has no peer")

    def receive(self, label: str, num_bytes: int) -> Bytes:
        raise AssertionError("a counting party has no peer")


def _shape(request: SendCorrelated | SendOneOfMany) -> Shape:
    if isinstance(request, SendCorrelated):
        values = request.correlation
        words = 1 if values.ndim == 1 else values.shape[1]
        return Shape(True, len(values), request.factor_bits, words, request.bits)
    count, num_messages, words = request.messages.shape
    return Shape(False, count, num_messages.bit_length() - 1, words, request.bits)
