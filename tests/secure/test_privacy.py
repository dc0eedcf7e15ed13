"""What each party receives does not depend on the other's secret.

The secrets go to both ends of their range while a party's own share stays as it is: the other
party's share takes the difference. On the ideal stack the client's results of all oblivious
transfers are looked at, on the real one every byte of both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from operation_cases import CASES, Case, case_of
from torch import Tensor
from two_parties import CPU, TwoParties, connect, integers, secret
from views import findings

from otpipe.ot import LocalChannel
from otpipe.ot.pads import TweakLedger
from otpipe.ot.pool import CotPool
from otpipe.secure import SecureOperations, Share, Step
from otpipe.secure.decoder import HeadShapes, ShareCache, attention, rms_norm, swiglu
from otpipe.secure.prepared import Mask, open_masked
from otpipe.secure.shares import random_ring

NUM_ELEMENTS = 2400
TALKING = [case for case in CASES if case.rounds]


def extremes(secrets: Sequence[Share]) -> list[list[Share]]:
    """All elements at the lowest, and at the highest value that the case has."""
    ends: list[list[Share]] = []
    for end in (torch.amin, torch.amax):
        values = [end(integers(x) if x.bits > 1 else x.data) for x in secrets]
        ends.append(
            [
                secret(torch.full(x.shape, int(value)), x.bits, x.frac)
                for x, value in zip(secrets, values, strict=True)
            ]
        )
    return ends


def run_with_client(
    parties: TwoParties, case: Case, secrets: Sequence[Share], client: Sequence[Share]
) -> None:
    """Run a case with given client's shares; the server's make up the secrets."""
    server = [x - mine for x, mine in zip(secrets, client, strict=True)]
    parties.run(case.program, server, list(client))


def client_view(case: Case, secrets: Sequence[Share], client: Sequence[Share]) -> Any:
    """What the client learned in one run on the ideal stack."""
    parties = connect("ideal")
    run_with_client(parties, case, secrets, client)
    assert parties.ideal is not None
    return parties.ideal.client_learned


@pytest.mark.parametrize("case", TALKING, ids=lambda case: case.name)
def test_the_client_learns_uniform_values(case: Case) -> None:
    """For both extremes, under one share that is the same in all elements and runs.

    With equal elements, masks that repeat would show as equal results.
    """
    secrets = case.secrets(NUM_ELEMENTS)
    if case.name in ("reciprocal", "reciprocal_sqrt"):
        secrets = case.secrets(NUM_ELEMENTS // 4)
    client = [
        Share(random_ring((1,), x.bits, CPU).expand(x.shape).contiguous(), x.bits, x.frac)
        for x in secrets
    ]
    for ends in extremes(secrets):
        view = client_view(case, ends, client)
        large = [(v, b) for v, b in view if len(v) >= 200]
        assert large and findings(large) == []


def attend(ops: SecureOperations, qkv: Share) -> Step[Share]:
    """Attention of one row over 256 positions; all of them the row itself."""
    cache, heads = ShareCache(1), HeadShapes(2, 1, 4)
    keys = qkv[:, 8:12].low_bits(40).reshape(1, 1, 4).expand(1, 255, 4)
    values = qkv[:, 12:].reshape(1, 1, 4).expand(1, 255, 4)
    cache.append(0, keys.at_frac(13), Share(values.data, 51, 11))
    cache.advance(255)
    angles = torch.ones((1, 1, 4))
    return attention(ops, 0, qkv, cache, heads, angles, angles)


@pytest.mark.parametrize(
    ("program", "width", "bits", "frac"),
    [
        (lambda ops, x: rms_norm(ops, x, 1e-6), 1000, 44, 26),
        (swiglu, 2000, 44, 31),
        (attend, 16, 44, 27),
    ],
    ids=["rms_norm", "swiglu", "attention"],
)
def test_the_client_learns_uniform_values_in_a_decoder_layer(
    program: Any, width: int, bits: int, frac: int
) -> None:
    """Whole parts of a layer, whatever the server's share is: 0, or the largest there is."""
    for value in (0, (1 << bits) - 1):
        parties = connect("ideal")
        server = Share(torch.full((1, width), value), bits, frac)
        client = Share(torch.full((1, width), (1 << bits) // 3), bits, frac)
        parties.run(program, [server], [client])
        assert parties.ideal is not None
        view = [(v, b) for v, b in parties.ideal.client_learned if len(v) >= 200]
        assert len(view) >= 7 and findings(view) == []


Fault = Callable[..., Tensor]
_KEPT: dict[tuple[int, int], Tensor] = {}


def no_mask(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.int64)


def one_mask_for_all_elements(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    return random_ring((1,), bits, device).expand(tuple(shape))


def the_mask_of_the_last_call(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    key = (int(np.prod(tuple(shape))), bits)
    return _KEPT.setdefault(key, random_ring(shape, bits, device))


def too_narrow_a_mask(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    return random_ring(shape, max(1, bits - 3), device)


def a_mask_without_its_top_bit(shape: Sequence[int], bits: int, device: torch.device) -> Tensor:
    return random_ring(shape, max(1, bits - 1), device)


@pytest.mark.parametrize(
    ("case", "module", "fault"),
    [
        ("lookup_all_bits", "transfers", no_mask),
        ("lookup_all_bits", "transfers", one_mask_for_all_elements),
        ("is_negative", "transfers", no_mask),
        ("is_negative_25_bits", "transfers", the_mask_of_the_last_call),
        ("silu", "transfers", no_mask),
        ("silu", "transfers", one_mask_for_all_elements),
        ("exp", "transfers", too_narrow_a_mask),
        ("max", "transfers", one_mask_for_all_elements),
        ("select_to_larger", "transfers", too_narrow_a_mask),
        ("select_to_larger", "transfers", a_mask_without_its_top_bit),
        ("exp", "transfers", a_mask_without_its_top_bit),
    ],
)
def test_a_planted_fault_is_found(
    case: str, module: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing, repeated, reused or short mask shows in the client's view."""
    _KEPT.clear()
    monkeypatch.setattr(f"otpipe.secure.{module}.random_ring", fault)
    chosen = case_of(case)
    secrets = chosen.secrets(NUM_ELEMENTS)
    client = [Share(torch.full(x.shape, (1 << x.bits) // 3), x.bits, x.frac) for x in secrets]
    found = [
        finding
        for ends in extremes(secrets)
        for finding in findings(
            [(v, b) for v, b in client_view(chosen, ends, client) if len(v) >= 200]
        )
    ]
    assert found


# --- every byte on the real stack ---------------------------------------------------------------


class Recording(LocalChannel):
    """A channel end that keeps what it sends."""

    def __init__(self, end: LocalChannel) -> None:
        self.__dict__.update(end.__dict__)
        self.payloads: list[bytes] = []

    def send(self, label: str, payload: np.ndarray) -> None:
        self.payloads.append(payload.tobytes())
        super().send(label, payload)


def traffic(case: Case, secrets: Sequence[Share], client: Sequence[Share]) -> list[bytes]:
    """All bytes that the client and the server sent in one run on the real stack."""
    parties = connect("real")
    ends = [Recording(parties.client_end), Recording(parties.server_end)]
    for end, party, session in zip(
        ends, (parties.client, parties.server), reversed(parties.sessions), strict=True
    ):
        party._channel = session._channel = end  # type: ignore[assignment]
    run_with_client(parties, case, secrets, client)
    return [b"".join(end.payloads) for end in ends]


def byte_findings(payload: bytes, other: bytes) -> list[str]:
    """Bytes of two runs: each flat, neighbours unrelated, and the two alike."""
    views = [
        torch.from_numpy(np.frombuffer(each, np.uint8).astype(np.int64))
        for each in (payload, other)
    ]
    found = findings([(view, 8) for view in views])
    counts = [torch.bincount(view, minlength=256).double() for view in views]
    total = counts[0] + counts[1]
    share = counts[0].sum() / total.sum()
    statistic = float(((counts[0] - share * total) ** 2 / (total * share * (1 - share))).sum())
    if statistic > 255 + 7 * (2 * 255) ** 0.5:
        found.append(f"two inputs are told apart, chi-square {statistic:.0f}")
    return found


@pytest.mark.parametrize(
    ("name", "num_elements"),
    [
        ("mul", 400),
        ("select_to_larger", 400),
        ("is_negative", 800),
        ("silu", 400),
        ("exp", 400),
        ("max", 400),
    ],
)
def test_bytes_of_both_directions_are_independent_of_the_secret(
    name: str, num_elements: int
) -> None:
    """Both extremes under the same client's share: the server's share differs, the bytes do not."""
    case = case_of(name)
    secrets = case.secrets(num_elements)  # whole bytes of choices in every request
    client = [Share(random_ring(x.shape, x.bits, CPU), x.bits, x.frac) for x in secrets]
    runs = [traffic(case, ends, client) for ends in extremes(secrets)]
    for one, other in zip(*runs, strict=True):
        assert min(len(one), len(other)) > 10_000
        assert byte_findings(one, other) == []


@pytest.mark.parametrize(
    ("name", "num_elements"),
    [("silu", 400), ("exp", 400), ("mul_rows", 400), ("square_sum", 800), ("less_than", 800)],
)
def test_bytes_of_the_client_are_independent_of_its_share(name: str, num_elements: int) -> None:
    """The server's share stays; the client's goes to both ends: what the server sees is flat."""
    case = case_of(name)
    secrets = case.secrets(num_elements)
    runs = [
        traffic(
            case,
            secrets,
            [
                Share(torch.full(x.shape, end * ((1 << x.bits) - 1)), x.bits, x.frac)
                for x in secrets
            ],
        )
        for end in (0, 1)
    ]
    for one, other in zip(*runs, strict=True):
        assert byte_findings(one, other) == []


def test_bytes_in_the_clear_are_found() -> None:
    """The check of bytes, on choices that nothing masks and on a share that is sent as it is."""
    clear = bytes(20_000)
    assert byte_findings(clear, clear)
    share = (np.arange(20_000) % 7).astype(np.uint8).tobytes()
    assert byte_findings(share, share)


def test_a_mask_that_opens_two_values_shows_their_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the single use of a mask prevents, with that rule taken out."""

    def openings(reuse: bool) -> list[tuple[Tensor, int]]:
        parties = connect("ideal")
        shape = (1, 60, 40)
        masks = [
            [Mask(party.random(shape, 41)) for _ in range(2)]
            for party in (parties.server, parties.client)
        ]
        view = []
        for turn in range(2):
            x = secret(torch.full(shape, 1000 + turn), 41)
            server_mask, client_mask = (mine[0 if reuse else turn] for mine in masks)
            zero = Share(torch.zeros_like(x.data), 41)
            opened, _ = parties.run(
                open_masked,
                [x, server_mask],
                [zero, client_mask],
            )
            view.append((opened.difference.reshape(-1), 41))
        return view

    assert findings(openings(reuse=False)) == []
    monkeypatch.setattr(Mask, "spend", lambda self: self.share)
    assert any("together" in finding for finding in findings(openings(reuse=True)))


def test_an_opening_without_a_mask_is_found() -> None:
    """A swap of the share itself, and of one whose mask is known to be zero in one party."""
    x = secret(torch.full((1, 60, 40), 1000), 41)
    for masked in (True, False):
        parties = connect("ideal")
        zero = Share(torch.zeros_like(x.data), 41)
        shares = [
            Mask(party.random(x.shape, 41) if masked else zero)
            for party in (parties.server, parties.client)
        ]
        opened, _ = parties.run(open_masked, [x, shares[0]], [zero, shares[1]])
        assert bool(findings([(opened.difference.reshape(-1), 41)])) != masked


def test_giving_a_share_without_a_pad_is_found() -> None:
    """The client's part of a masked linear map, with its pad and without."""
    x = torch.full((60, 40), 1000)
    for padded in (True, False):
        parties = connect("ideal")
        pad = random_ring(x.shape, 44, CPU) if padded else torch.zeros_like(x)
        given, _ = parties.run(lambda ops, d: ops.give_to_server(d, 44), [x * 0], [x - pad])
        assert bool(findings([(given.reshape(-1), 44)])) != padded


# --- oblivious transfers used twice -------------------------------------------------------------


def two_operations() -> list[Tensor]:
    """The xor of what each party sent in two multiplications of the same shares, one session."""
    parties = connect("real")
    ends = [Recording(parties.client_end), Recording(parties.server_end)]
    for end, session in zip(ends, reversed(parties.sessions), strict=True):
        session._channel = end
    x = secret(torch.full((800,), 77), 20, 3)
    zero = Share(torch.zeros_like(x.data), 20, 3)
    sent = []
    for _ in range(2):
        for end in ends:
            end.payloads.clear()
        parties.run(lambda ops, x: ops.mul(x, x, 30), [x], [zero])
        sent.append([end.payloads[-1] for end in ends])  # choices, answers; not corrections
    return [
        torch.from_numpy(np.bitwise_xor(*(np.frombuffer(each, np.uint8) for each in pair))).long()
        for pair in zip(*sent, strict=True)
    ]


def test_two_operations_have_nothing_in_common() -> None:
    for view in two_operations():
        assert len(view) > 2000 and findings([(view, 8)]) == []


def test_a_reused_transfer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """COTs and tweaks of the first operation again in the second: refused; if not, it shows."""
    kept: dict[int, Any] = {}
    original = CotPool.take

    def again(self: CotPool[Any], count: int) -> Any:
        return kept.setdefault(id(self), original(self, count))

    monkeypatch.setattr(CotPool, "take", again)
    with pytest.raises(RuntimeError, match="Hash tweak 0 was used before in this session"):
        two_operations()
    kept.clear()
    monkeypatch.setattr(TweakLedger, "claim", lambda *_: None)
    for view in two_operations():
        assert findings([(view, 8)])
