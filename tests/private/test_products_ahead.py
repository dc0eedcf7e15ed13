"""Attention products of a session: prepared in blocks between passes, for one text, and bounded."""

from __future__ import annotations

import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from private_servers import PrivateServer, assert_nothing_is_left, eventually, private_server
from test_private_client import mode_of, plain_logits

from otpipe import Client
from otpipe.client import private_products
from otpipe.client.private_products import TextProducts
from otpipe.client.private_session import PRODUCTS_AHEAD, PrivateSession
from otpipe.errors import ConnectionLost, ServerRefused, UsageError
from otpipe.model.private_description import FORMATS
from otpipe.protocol.messages import MessageType
from otpipe.protocol.private_messages import Pass, Prepare
from otpipe.protocol.wire import Header
from otpipe.secure import Share, Step, cost_of, product_blocks
from otpipe.secure.cost import operand
from otpipe.secure.decoder import ShareCache, attention
from otpipe.secure.operations import SecureOperations
from otpipe.secure.product_blocks import ProductBlocks
from otpipe.secure.rlwe_products import AttentionSizes
from otpipe.server.private_rank import MAX_EXCHANGES_PER_RANK


@pytest.fixture(scope="module")
def client(private_serving: PrivateServer, private_store: Path) -> Iterator[Client]:
    with Client(private_serving.address, private_store) as client:
        yield client
    assert_nothing_is_left(private_serving)


def session_of(client: Client) -> PrivateSession:
    session = mode_of(client)._session
    assert session is not None
    return session


def products_of(client: Client) -> TextProducts:
    products = session_of(client)._products
    assert products is not None
    return products


def blocks_of(client: Client) -> ProductBlocks:
    return mode_of(client)._program.product_blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_blocks, "MIN_BLOCK", 2)
    monkeypatch.setattr(product_blocks, "MAX_BLOCK", 4)


# -- a text ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
def test_a_text_grows_by_blocks_and_is_what_the_program_computes(
    client: Client, private_serving: PrivateServer
) -> None:
    """Passes inside a block, to its end and over it, of a text of unknown length and of known."""
    for known in (False, True):
        mode, tokens = mode_of(client), [2, 61, 8, 28, 18, 4]
        cache, parts, prepared = mode.new_cache(), [], []
        if known:
            mode.expect(cache, len(tokens), None)
        for lo, hi in ((0, 1), (1, 2), (2, 3), (3, 6)):
            parts.append(mode.forward(tokens[lo:hi], cache, "all"))
            prepared.append(products_of(client).num_prepared)
        assert prepared == ([6, 6, 6, 6] if known else [2, 2, 4, 8])
        want = plain_logits(private_serving, tokens)
        got = torch.cat([part for part in parts if part is not None])
        torch.testing.assert_close(got, want, atol=0.03, rtol=0.01)


def test_a_new_text_has_masks_of_its_own(client: Client, private_serving: PrivateServer) -> None:
    """Both parties draw all anew, and drop what the text before had left."""
    seen: list[list[torch.Tensor]] = []
    former: list[weakref.ref[TextProducts]] = []
    for _ in range(2):
        client.forward([1, 2])
        assert all(each() is None for each in former)
        former = [weakref.ref(products_of(client))]
        states = [s for r in range(2) for s in products_of(client).of(r)._layers.values()]
        seen.append([mask for s in states for mask in (s.key_mask, s.value_mask)])
        seen[-1] += [mask for s in states for mask in (s.blocks[0].query, s.blocks[0].weight)]
        del states
    for first, second in zip(*seen, strict=True):
        assert first.shape == second.shape
        assert not ((first == second) & (first != 0)).any()
    held = [rank.product_memory.held_bytes for rank in private_serving.ranks]
    assert held == [products_of(client).of(rank).held_bytes for rank in range(2)]


def test_products_are_prepared_before_the_text_is_known(client: Client) -> None:
    client.warm_up(6)
    products = products_of(client)
    list(client.generate_ids([1, 2, 3], 4))
    assert products_of(client) is products
    assert client.last is not None
    stats, ahead = client.last.stats, client.last.operations[PRODUCTS_AHEAD]
    assert set(ahead.values()) == {0}
    assert stats.prepare_s == 0
    list(client.generate_ids([1, 2, 3], 1))
    assert products_of(client) is not products, "its masks are used"
    assert client.last.operations[PRODUCTS_AHEAD]["bytes_sent"] > 0
    assert client.last.stats.prepare_s > 0


def test_progress_is_told_as_that_of_slots(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(client, "_on_prepare", lambda done, total: told.append((done, total)))
    client.forward([1])
    total = 3 * sum(blocks_of(client).sizes.preparation_bytes(0, 16))
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert {each for _, each in told} == {total}


def test_no_turn_of_a_pass_is_held(client: Client, private_serving: PrivateServer) -> None:
    turns = private_serving.ranks[0].pass_turns
    assert turns.take(lambda: False)
    try:
        client.warm_up(3)
    finally:
        turns.give_back()
    assert client.forward([1, 2, 3]).shape == (3, 67)


# -- costs ----------------------------------------------------------------------------------------


class CountedProducts:
    """``AttentionProducts`` without values: what is opened of them."""

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes

    def scores(
        self, ops: SecureOperations, layer: int, q: Share, keys: Share, bits: int
    ) -> Step[Share]:
        heads = self._sizes.heads
        new = q.shape[1] // self._sizes.group * heads.num_kv_heads * heads.head_dim
        yield from ops.swap(operand((q.data.numel() + new,), bits))
        return operand((*q.shape[:2], keys.shape[1]), bits, q.frac + keys.frac)

    def context(
        self, ops: SecureOperations, layer: int, weights: Share, values: Share, bits: int
    ) -> Step[Share]:
        heads = self._sizes.heads
        rows, stop = weights.shape[1] // self._sizes.group, values.shape[1]
        visible = heads.num_heads * sum(range(stop - rows + 1, stop + 1))
        new = rows * heads.num_kv_heads * heads.head_dim
        yield from ops.swap(operand((visible + new,), bits))
        return operand((*weights.shape[:2], values.shape[2]), bits, weights.frac + values.frac)


def test_bytes_on_the_wire_are_those_of_the_code(
    private_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead: every byte. Online: all of attention but its OTs' extensions, which come in blocks."""
    with private_server(private_model) as server, Client(server.address, tmp_path) as client:
        client.prepare(16)
        client.warm_up(5)
        channel, blocks = session_of(client)._lines[0].channel, blocks_of(client)
        up, down = blocks.sizes.preparation_bytes(0, 16)
        assert channel.sent_bytes["products.upload"] == 3 * up
        assert channel.sent_bytes["products.key"] == 32
        assert channel.received_bytes["products.answers"] == 3 * down

        online: Counter[str] = Counter()
        meter = session_of(client)._meter
        measure = meter.measure

        def counted(name: str, operation: Step[Share]) -> Step[Share]:
            before = [Counter(each) for each in (channel.sent_bytes, channel.received_bytes)]
            result = yield from measure(name, operation)
            for way, past, now in zip(
                ("up", "down"), before, (channel.sent_bytes, channel.received_bytes), strict=True
            ):
                taken = Counter(now) - past
                online[f"{name} {way}"] += taken.total() - taken["ot.corrections"]
            return result

        monkeypatch.setattr(meter, "measure", counted)
        client.forward([1, 2, 3, 4, 5])

        program, heads = mode_of(client)._program, blocks.sizes.heads
        angles = torch.ones((5, 1, heads.head_dim))
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        cost = cost_of(
            lambda ops: attention(
                ops,
                0,
                operand((5, width), FORMATS.qkv.bits, FORMATS.qkv.frac),
                ShareCache(1),
                program.heads,
                angles,
                angles,
                FORMATS,
                CountedProducts(blocks.sizes),
            )
        )
        assert online["attention up"] == 3 * cost.to_server
        assert online["attention down"] == 3 * cost.to_client


class Unlimited:
    """A ``DistanceBudget`` of a client that does not keep to it."""

    def allows(self, squared: float) -> bool:
        return True

    def spend(self, first: int, stop: int) -> None:
        pass


# -- what is refused ------------------------------------------------------------------------------


def refused(client: Client, rank: int, message: Prepare | Pass, payload: bytes = b"") -> str:
    """What a rank says to a request that may not come."""

    def due(_header: Header) -> int:
        return 0

    link = session_of(client)._lines[rank].link
    link.send(message, payload)
    with pytest.raises(ServerRefused) as caught:
        link.receive(MessageType.PREPARE_READY, due)
    assert eventually(lambda: not session_of(client).alive)
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (Prepare(3, 16), "from position 3 on were asked for; due are those from 16 on"),
        (Prepare(16, 0), "products of 0 positions from 16 on .* a text has 1 to 512 positions"),
        (Prepare(16, 497), "products of 497 positions from 16 on .* a text has 1 to 512"),
        (Prepare(0, 2**40), "a text has 1 to 512 positions"),
    ],
)
def test_a_preparation_of_other_positions_is_refused(
    client: Client, message: Prepare, sentence: str
) -> None:
    client.warm_up(1)
    assert re.search(sentence, refused(client, 1, message))
    assert client.forward([1]).shape == (1, 67), "a new session"


def test_a_pass_beyond_what_is_prepared_is_refused(client: Client) -> None:
    client.warm_up(1)
    spans = bytes(16) + (0).to_bytes(4, "little") + (17).to_bytes(4, "little")
    session = session_of(client)
    said = refused(client, 1, Pass(session._passes, 0, 17, 0, 1), spans)
    assert "a pass goes up to 17 positions, and attention products are prepared for 16" in said


def test_memory_is_refused_before_it_is_taken(
    client: Client, private_serving: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.forward([1])
    memory = private_serving.ranks[0].product_memory
    monkeypatch.setattr(memory, "limit_bytes", memory.held_bytes + 1000)
    with pytest.raises(ServerRefused, match=r"MB on rank 0, which holds .* prepare fewer"):
        client.warm_up(512)
    for rank in private_serving.ranks:
        assert eventually(lambda rank=rank: not rank.product_memory.held_bytes)  # type: ignore[misc]


def test_what_preparations_of_a_session_may_tell_is_bounded(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client takes a new session in time; a server refuses one that does not."""
    client.warm_up(1)
    session = session_of(client)
    session._budget._spent = 2.0**-80
    client.warm_up(1)
    assert session_of(client) is session, "nothing more to prepare"
    client.forward([1])
    client.warm_up(1)
    assert session_of(client) is not session
    assert not session.alive

    client.forward([1])
    monkeypatch.setattr(session_of(client), "_budget", Unlimited())
    monkeypatch.setattr(product_blocks, "MAX_LOG2_DISTANCE", -60)
    with pytest.raises(ServerRefused, match="begin a new text in a new session"):
        client.forward([1])


# -- ends -----------------------------------------------------------------------------------------


def test_a_lost_connection_drops_everything_on_both_sides(
    client: Client, private_serving: PrivateServer
) -> None:
    mode = mode_of(client)
    cache = mode.new_cache()
    mode.forward([1, 2], cache, "none")
    session = session_of(client)
    session._lines[1].link.close()
    with pytest.raises(ConnectionLost, match="generate again"):
        mode.forward([3], cache, "none")
    client.forward([1])
    assert session._products is None
    assert session_of(client) is not session
    for rank in private_serving.ranks:
        held = products_of(client).of(rank.rank).held_bytes
        assert eventually(
            lambda rank=rank, held=held: rank.product_memory.held_bytes == held  # type: ignore[misc]
        )


def test_a_text_that_is_too_long_is_refused_before_anything_is_sent(client: Client) -> None:
    before = mode_of(client).current_traffic()
    for positions in (0, 513):
        with pytest.raises(UsageError, match="it has 1 to 512: shorten the prompt"):
            client.warm_up(positions)
    assert mode_of(client).current_traffic() == before


def test_a_rank_that_is_done_is_told_that_the_client_waits_for_another(
    private_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has no place for a while; rank 1, which is done, would drop a silent client."""
    monkeypatch.setattr(private_products, "PING_EVERY_S", 0.3)
    with (
        private_server(private_model, 2, idle_timeout_s=1.5) as server,
        Client(server.address, tmp_path) as client,
    ):
        turns = server.ranks[0].ole_turns
        for _ in range(MAX_EXCHANGES_PER_RANK):
            assert turns.take(lambda: False)
        hold_s = 6.0

        def release() -> None:
            for _ in range(MAX_EXCHANGES_PER_RANK):
                turns.give_back()

        threading.Timer(hold_s, release).start()
        client.warm_up(1)
        assert session_of(client).alive
