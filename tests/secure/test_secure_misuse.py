"""Every misuse has its sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from two_parties import connect, secret

from otpipe.errors import ConnectionLost, ParameterError, ProtocolError
from otpipe.ot import local_channels
from otpipe.secure import DecoderFormats, Format, Party, Share, cost_of, together
from otpipe.secure.cost import operand
from otpipe.secure.operations import SecureOperations

X, Y = operand((4,), 20, 3), operand((4,), 21, 3)
ROWS = operand((2, 4), 20)

MISUSES: list[tuple[str, Callable[[SecureOperations], Any], str]] = [
    (
        "negative shift",
        lambda o: o.rescale(X, -1, 20),
        "-1 bits cannot be dropped",
    ),
    ("all dropped", lambda o: o.rescale(X, 18, 20), "18 bits cannot be dropped from a ring of 20"),
    (
        "no bit",
        lambda o: o.select(X, X, 20),
        r"Share\(\(4,\), 20 bits, frac 3\) cannot select",
    ),
    (
        "fewer bits",
        lambda o: o.select(operand((3,), 1), X, 20),
        "cannot select from .* one bit an element is needed",
    ),
    ("shapes", lambda o: o.mul(X, operand((5,), 20), 30), "differ in shape; use mul_rows"),
    (
        "too wide",
        lambda o: o.mul(X, Y, 42),
        "A product in 42 bits of .* is wider than both together",
    ),
    ("no factor", lambda o: o.mul_rows(X, ROWS, 40), "has no factor for each row of"),
    (
        "narrow factor",
        lambda o: o.mul_rows(operand((2,), 20), ROWS, 40),
        "must live in the ring of 40 bits; rescale them",
    ),
    ("square too wide", lambda o: o.square_sum(ROWS, 41), "want a ring of 21 to 40 bits"),
    ("square too narrow", lambda o: o.square_sum(ROWS, 20), "want a ring of 21 to 40 bits"),
    (
        "narrow matrix",
        lambda o: o.matmul(operand((1, 2, 2), 20), operand((1, 2, 2), 30), 30),
        "must both live in 30 bits; rescale them",
    ),
    (
        "no matrix product",
        lambda o: o.matmul(operand((1, 2, 3), 30), operand((1, 2, 2), 30), 30),
        "are no factors of a matrix product",
    ),
]


@pytest.mark.parametrize(
    ("misuse", "program", "sentence"), MISUSES, ids=[name for name, _, _ in MISUSES]
)
def test_misuse_raises_before_anything_is_sent(
    misuse: str, program: Callable[[SecureOperations], Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        cost_of(program)


def test_shares_of_different_rings_or_scales_do_not_mix() -> None:
    with pytest.raises(ValueError, match="differ in ring or scale; rescale one"):
        X + Y
    with pytest.raises(ValueError, match="differ in ring or scale; rescale one"):
        X - X.at_frac(4)
    with pytest.raises(
        ValueError, match="20 bits hold no 21 low bits; a larger ring needs rescale"
    ):
        X.low_bits(21)
    with pytest.raises(ValueError, match="A share lives in a ring of 1 to 62 bits, not 63"):
        Share(torch.zeros(1, dtype=torch.int64), 63)
    with pytest.raises(ValueError, match=r"A share is int64, not torch\.float32"):
        Share(torch.zeros(1), 20)


def test_the_data_of_a_share_does_not_show_in_its_text() -> None:
    assert repr(secret(torch.tensor([123456789]), 40, 2)) == "Share((1,), 40 bits, frac 2)"


def test_a_role_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="A party is the server or the client, not 'both'"):
        Party("both", None, None)  # type: ignore[arg-type]


def test_formats_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParameterError, match="A ring of 20 bits at scale 2\\^-10 holds magnitudes"):
        Format(20, 10, 300.0, True, "")
    with pytest.raises(ParameterError, match="A ring has 3 to 62 bits, not 63"):
        Format(63, 10, 300.0, True, "")
    good = DecoderFormats()
    wrong = {
        "swiglu_product has scale 2\\^-22; its factors give 2\\^-21": {
            "gate": Format(22, 10, 508.0, True, "")
        },
        "query lives in 41 bits; what uses it wants 40": {"query": Format(41, 15, 9.0, False, "")},
        "gate wants 22 bits at scale 2\\^-11, which a ring of 44": {
            "gate_up": Format(44, 36, 2.0**6, True, "")
        },
        "100000 positions of values up to 256 overflow the context": {"max_positions": 100_000},
    }
    for sentence, change in wrong.items():
        with pytest.raises(ParameterError, match=sentence):
            dataclasses.replace(good, **change)  # type: ignore[arg-type]


def test_parties_out_of_step_stop_with_an_error() -> None:
    """One multiplies where the other compares: no hang, and no result."""
    parties = connect("real")
    x = secret(torch.arange(4), 20)

    def program(ops: Party, x: Share) -> Any:
        return ops.mul(x, x, 30) if ops.is_server else ops.is_negative(x)

    with pytest.raises((ProtocolError, ConnectionLost)):
        parties.run(program, [x], [x])


def test_values_of_another_length_than_due_are_refused() -> None:
    """The peer's plain values are checked by length before they are read."""
    server, client = local_channels(5)
    party = Party("client", None, client)  # type: ignore[arg-type]
    server.send("secure.values@0", np.zeros(3, np.uint8))
    with pytest.raises(ProtocolError, match=r"3 bytes .* where 8 are due"):
        party.run(party.reveal_to_client(secret(torch.zeros(4), 16)))


def test_the_server_alone_learns_a_given_value_and_the_client_does_not_wait() -> None:
    """A message without an answer: the client is done before the server has begun."""
    server_end, client_end = local_channels(5)
    values = torch.tensor([0, 70000, (1 << 44) - 1, -1, 1 << 44])
    client = Party("client", None, client_end)  # type: ignore[arg-type]
    assert client.run(client.give_to_server(values, 44)) is None
    server = Party("server", None, server_end)  # type: ignore[arg-type]
    got = server.run(server.give_to_server(torch.zeros_like(values), 44))
    assert got is not None
    assert got.tolist() == [0, 70000, (1 << 44) - 1, (1 << 44) - 1, 0]
    assert not server_end.sent_bytes and client_end.sent_bytes["secure.values"] == 5 * 6


def test_values_given_beside_a_product_take_no_round_of_their_own() -> None:
    """Given alone, then together with a product and a revealed share, as costs and counts say."""
    x, y = secret(torch.arange(8), 20), secret(torch.arange(8), 20)

    def program(ops: Any, x: Share, y: Share) -> Any:
        first = yield from ops.give_to_server(x.data, 20)
        second, product = yield from together(ops.give_to_server(y.data, 20), ops.mul(x, y, 30))
        shown = yield from ops.reveal_to_client(product)
        return first, second, shown

    parties = connect("ideal")
    zero = secret(torch.zeros(8), 20)
    server, client = parties.run(program, [zero, zero], [x, y])
    assert server[0].tolist() == server[1].tolist() == list(range(8)) and server[2] is None
    assert client[:2] == (None, None) and client[2].tolist() == [i * i for i in range(8)]
    cost = cost_of(lambda ops: program(ops, operand((8,), 20), operand((8,), 20)))
    counted = parties.traffic()
    assert cost.rounds == counted["rounds"] == 1
    assert (cost.to_server, cost.to_client) == (counted["to_server"], counted["to_client"])


def test_the_client_alone_learns_a_revealed_value() -> None:
    parties = connect("real")
    x = secret(torch.tensor([-3, 70000, -(1 << 39)]), 44)
    share = secret(torch.tensor([11, 12, 13]), 44)
    server, client = parties.run(lambda ops, x: ops.reveal_to_client(x), [x - share], [share])
    assert server is None
    assert client.tolist() == [-3, 70000, -(1 << 39)]
    assert parties.client_end.sent_bytes["secure.values"] == 0
