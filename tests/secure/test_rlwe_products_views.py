"""What each party is sent by the other while prepared attention products run: uniform values.

Shares of both parties are the same constants everywhere, so that everything that varies in a
message is its masks. Each party's messages are judged by themselves: a mask of which one party has
no share hides nothing from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from product_parties import multiply, prepared
from torch import Tensor
from two_parties import CPU, connect
from views import findings

from otpipe.secure import Party, Share, Step
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts
from otpipe.secure.shares import random_ring

SIZES = AttentionSizes(HeadShapes(6, 1, 32), 40, 51)
BLOCK = 6
ROLES = ("server", "client")
#: masks in the order in which a layer draws them
MASKS = ("key", "value", "query", "weight")
Message = tuple[Tensor, int]
#: what a mask should have been, which of ``MASKS``, whether the server's: what it is
Fault = Callable[[Tensor, str, bool], Tensor]


@dataclass
class Sent:
    """What one party sent in a text of two blocks: values and bits of each message."""

    scores: list[Message] = field(default_factory=list)
    context: list[Message] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        """What is not uniform, or comes twice: of some thousand values of 40 bits, none should."""
        found = findings(self.scores) + findings(self.context)
        for messages in (self.scores, self.context):
            values = torch.cat([values for values, _ in messages])
            if len(values.unique()) < len(values):
                found.append("a value was sent twice")
        return found


def run_text(monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None) -> dict[str, Sent]:
    """One pass a block, every share the middle of its ring; a fault spoils masks as drawn."""
    if fault:
        drawn: dict[bool, int] = {True: 0, False: 0}

        def spoiled(self: PreparedProducts, shape: Sequence[int], bits: int) -> Tensor:
            name = MASKS[drawn[self._is_server] % len(MASKS)]
            drawn[self._is_server] += 1
            return fault(random_ring(shape, bits, CPU), name, self._is_server)

        monkeypatch.setattr(PreparedProducts, "_random", spoiled)
    sent = {role: Sent() for role in ROLES}
    method = "scores"
    swap = Party.swap

    def recorded(self: Party, x: Share) -> Step[Tensor]:
        role = ROLES[0] if self.is_server else ROLES[1]
        getattr(sent[role], method).append((x.data, x.bits))
        return swap(self, x)

    monkeypatch.setattr(Party, "swap", recorded)

    def constant(shape: tuple[int, ...], bits: int) -> tuple[Share, Share]:
        share = Share(torch.full(shape, 1 << (bits - 1)), bits)
        return share, share

    parties = connect("ideal")
    made = prepared(parties, SIZES, BLOCK, BLOCK)
    group, size = SIZES.group, SIZES.heads.head_dim
    for stop in (BLOCK, 2 * BLOCK):
        method = "scores"
        q, cached = constant((1, BLOCK * group, size), 40), constant((1, stop, size), 40)
        multiply(parties, made, method, q, cached)
        method = "context"
        weights, cached = constant((1, BLOCK * group, stop), 51), constant((1, stop, size), 51)
        multiply(parties, made, method, weights, cached)
    return sent


def test_messages_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = run_text(monkeypatch)
    assert [len(sent[role].scores) + len(sent[role].context) for role in ROLES] == [4, 4]
    assert {role: sent[role].findings for role in ROLES} == {"server": [], "client": []}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kept", [0, 32], ids=["missing", "of 32 bits"])
def test_a_mask_that_one_party_lacks_is_found(
    kept: int, role: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(mask: Tensor, which: str, is_server: bool) -> Tensor:
        spoil = (which, is_server) == (name, role == "server")
        return mask & ((1 << kept) - 1) if spoil else mask

    sent = run_text(monkeypatch, fault)
    assert {role for role in ROLES if sent[role].findings} == {role}


@pytest.mark.parametrize("role", ROLES)
def test_one_row_of_masks_for_all_rows_is_found(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(mask: Tensor, which: str, is_server: bool) -> Tensor:
        spoil = (which, is_server) == ("weight", role == "server")
        return mask[:, :1].expand_as(mask).clone() if spoil else mask

    assert run_text(monkeypatch, fault)[role].findings


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_block_before_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[bool, Tensor] = {}

    def fault(mask: Tensor, which: str, is_server: bool) -> Tensor:
        if which != name:
            return mask
        before = first.setdefault(is_server, mask)
        again = mask.clone()
        again[..., : before.shape[2]] = before
        return again

    sent = run_text(monkeypatch, fault)
    assert all(sent[role].findings for role in ROLES)
