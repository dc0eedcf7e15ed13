"""Protocols as steps, so that independent ones share their rounds.

A protocol is a generator: each ``yield`` hands over the requests of one round and gets back their
results; its return value is the protocol's. :func:`together` runs several in lockstep and merges
their requests, so a round of all costs one trip over the network. A party runs the outermost step.

The plaintext reference needs no round: its steps return at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from torch import Tensor

from otpipe.ot import (
    ReceiveCorrelated,
    ReceiveOneOfMany,
    SendCorrelated,
    SendOneOfMany,
)

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, repr=False, eq=False)
class Swap:
    """Both parties tell each other ``values`` (int64, in [0, 2^bits)); the result is the peer's.

    As with ``Give`` and ``Tell``, no oblivious transfer hides them: only for values under a fresh
    mask.
    """

    values: Tensor
    bits: int


@dataclass(frozen=True, repr=False, eq=False)
class Tell:
    """The server tells the client ``values``; the client's are ignored and give the shape.

    The client's result is the server's values, the server's None.
    """

    values: Tensor
    bits: int


@dataclass(frozen=True, repr=False, eq=False)
class Give:
    """The client tells the server ``values``; the server's are ignored and give the shape.

    The server's result is the client's values, the client's None. A round of nothing else is one
    message without an answer: the client goes on at once.
    """

    values: Tensor
    bits: int


Values = Swap | Tell | Give
Request = SendCorrelated | SendOneOfMany | ReceiveCorrelated | ReceiveOneOfMany | Values
Step = Generator[list[Request], list[Any], T]


@dataclass(frozen=True)
class Pending(Generic[T]):
    """Requests of one round, and the local work that turns their results into a value."""

    requests: list[Request]
    finish: Callable[[list[Any]], T]


def in_one_round(*pending: Pending[Any]) -> Step[list[Any]]:
    """All of ``pending`` in one round; their values in order."""
    answers = yield [request for each in pending for request in each.requests]
    values, at = [], 0
    for each in pending:
        end = at + len(each.requests)
        values.append(each.finish(answers[at:end]))
        at = end
    return values


def together(*steps: Step[Any]) -> Step[list[Any]]:
    """Run independent steps side by side: as many rounds as the longest; their values in order."""
    values: list[Any] = [None] * len(steps)
    waiting: dict[int, list[Request]] = {}
    answers: dict[int, list[Any] | None] = dict.fromkeys(range(len(steps)))
    while answers:
        waiting = {}
        for index, answer in answers.items():
            try:
                step = steps[index]
                waiting[index] = next(step) if answer is None else step.send(answer)
            except StopIteration as stop:
                values[index] = stop.value
        if not waiting:
            break
        joint = yield [request for requests in waiting.values() for request in requests]
        answers, at = {}, 0
        for index, requests in waiting.items():
            answers[index] = joint[at : at + len(requests)]
            at += len(requests)
    return values


def immediate(function: Callable[P, T]) -> Callable[P, Step[T]]:
    """A function without communication as a step."""

    @functools.wraps(function)
    def step(*args: P.args, **kwargs: P.kwargs) -> Step[T]:
        return function(*args, **kwargs)
        yield []  # makes this a generator

    return step


def drive(step: Step[T], serve: Callable[[Sequence[Request]], list[Any]]) -> T:
    """Run ``step`` to its end; ``serve`` answers the requests of one round."""
    answers: list[Any] | None = None
    while True:
        try:
            requests = next(step) if answers is None else step.send(answers)
        except StopIteration as stop:
            return stop.value
        answers = serve(requests)
