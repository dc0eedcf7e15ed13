"""The matrix products of attention from masks whose products were prepared by RLWE.

Every query, key, weight and value is opened under a mask that nobody knows (``prepared``: Beaver,
CRYPTO 1991; matrices: SecureML, IEEE S&P 2017, section 4.1), which takes one round a product and a
few bytes an entry. The products of the *masks* are made before the text is known, for a block of
positions at a time: their cross terms by oblivious linear evaluation (``cross_products``).

    a b = a_S b_S + a_C b_C + [a_S b_C] + [a_C b_S],      [.]: shared, by RLWE

Position i of the text has the masks of number i. Queries of a block meet the keys of their own and
of all earlier blocks, whose masks both parties keep, so a text grows by preparing another block.
Each mask opens one value: the counters below only go up.

Shape suffixes: K key/value heads, G query heads per key/value head, D head size, P positions,
B positions of a block, R = T G rows of a call (T positions), r a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from otpipe.crypto.private_matmul import ProductPlan, params_for_bits
from otpipe.crypto.private_matmul_noise import check_preparation
from otpipe.errors import UsageError
from otpipe.ot.channel import Channel
from otpipe.secure.cross_products import CrossProducts
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.operations import SecureOperations
from otpipe.secure.party import Role, value_bytes
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share, random_ring, reduced


@dataclass(frozen=True)
class AttentionSizes:
    """Public sizes of the products of one layer.

    Attributes:
        heads: query heads, key/value heads, head size.
        score_bits: ring of queries, keys and scores.
        context_bits: ring of weights, values and the context.
    """

    heads: HeadShapes
    score_bits: int
    context_bits: int

    @property
    def group(self) -> int:
        """G."""
        return self.heads.num_heads // self.heads.num_kv_heads

    def plans(
        self, first: int, stop: int
    ) -> tuple[ProductPlan, ProductPlan, ProductPlan, ProductPlan]:
        """The four cross terms of one key/value head for positions first .. stop - 1.

        In order: server's queries with the client's keys; server's keys with the client's queries;
        server's weights with the client's values; server's values with the client's weights.
        """
        rows, size = self.group * (stop - first), self.heads.head_dim
        scores, context = params_for_bits(self.score_bits), params_for_bits(self.context_bits)
        return (
            ProductPlan(scores, rows, size, stop),
            ProductPlan(scores, stop, size, rows),
            ProductPlan(context, rows, stop, size),
            ProductPlan(context, size, stop, rows),
        )

    def preparation_bytes(self, first: int, stop: int) -> tuple[int, int]:
        """Payload (to server, to client) of preparing positions first .. stop - 1 of one layer."""
        plans = self.plans(first, stop)
        heads = self.heads.num_kv_heads
        return (
            heads * sum(plan.upload_bytes for plan in plans),
            heads * sum(plan.download_bytes for plan in plans),
        )

    def block_bytes(self, first: int, stop: int) -> int:
        """Memory of one party for positions first .. stop - 1 of one layer, while they are unused.

        Of int64: masks of queries and weights, both products of masks; masks of the new keys and
        values, and what will be opened of them.
        """
        shapes = self.heads
        rows = self.group * (stop - first)
        block = 2 * rows * shapes.head_dim + 2 * rows * stop
        return 8 * shapes.num_kv_heads * (block + 4 * (stop - first) * shapes.head_dim)

    def online_bytes(self, first: int, rows: int) -> int:
        """Payload of both products of one layer in each direction, in two rounds.

        first: cached positions before. rows: T, positions of the pass, if it is one block.
        """
        shapes, total = self.heads, 0
        new = rows * shapes.num_kv_heads * shapes.head_dim
        queries = rows * shapes.num_heads * shapes.head_dim
        weights = shapes.num_heads * sum(range(first + 1, first + rows + 1))
        total += value_bytes(self.score_bits) * (queries + new)
        total += value_bytes(self.context_bits) * (weights + new)
        return total


@dataclass(frozen=True, eq=False, repr=False)
class _Block:
    """Shares of one block of positions first .. stop - 1: row masks, and products of masks.

    query (K, B G, D), weight (K, B G, stop), scores (K, B G, stop), context (K, B G, D).
    """

    first: int
    stop: int
    query: Tensor
    weight: Tensor
    scores: Tensor
    context: Tensor


@dataclass(eq=False, repr=False)
class _Layer:
    """One layer: masks of keys and values (K, P, D), what was opened, how far rows have come.

    under_way: messages may have left whose answers did not come.
    """

    key_mask: Tensor
    value_mask: Tensor
    keys: Tensor  # opened differences (K, P, D)
    values: Tensor
    blocks: list[_Block] = field(default_factory=list)
    scored: int = 0
    weighed: int = 0
    under_way: bool = False

    @property
    def num_bytes(self) -> int:
        """With room for what the masks of keys and values have not opened yet."""
        masks = self.key_mask.nbytes + self.value_mask.nbytes
        blocks = (
            tensor
            for block in self.blocks
            for tensor in (block.query, block.weight, block.scores, block.context)
        )
        return 2 * masks + sum(tensor.nbytes for tensor in blocks)


class PreparedProducts:
    """``AttentionProducts`` of one text, for the layers of one rank. One thread at a time.

    Both parties make one, prepare the same blocks, and run the same programs. Positions are those
    of the text from 0; every position is queried once in every layer, in order, as the decoder
    does. After an error in a pass or a preparation the object is worthless, as the cache is, and
    says so: a mask may have left.

    Entries that a row must not see (positions after its own) are 0 in the scores, and must be 0 in
    both parties' weights.
    """

    def __init__(
        self,
        role: Role,
        channel: Channel,
        sizes: AttentionSizes,
        layers: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            role: of this party.
            channel: to the other one; that of its ``Party``, or one of its own.
            sizes: of every layer.
            layers: indices of the layers whose products are made here.
            device: of the shares; "cpu" for the client.

        Raises:
            ParameterError: no parameter set has messages of that many bits.
        """
        self._is_server = role == "server"
        self._channel, self._sizes = channel, sizes
        self._device = torch.empty(0, device=device).device
        self._prepared = self._preparations = 0
        sizes.plans(0, 1)
        empty = torch.empty(
            (sizes.heads.num_kv_heads, 0, sizes.heads.head_dim),
            dtype=torch.int64,
            device=self._device,
        )
        self._layers = {layer: _Layer(empty, empty, empty, empty) for layer in layers}

    @property
    def num_prepared(self) -> int:
        """Positions that a text may have so far."""
        return self._prepared

    @property
    def is_used(self) -> bool:
        """Whether a mask has opened something: the text has begun, and no other may."""
        return any(state.scored or state.weighed for state in self._layers.values())

    @property
    def held_bytes(self) -> int:
        """Memory of all masks and products, and of what key and value masks will have opened."""
        return sum(state.num_bytes for state in self._layers.values())

    # --- ahead of time --------------------------------------------------------------------------

    def prepare(self, num_positions: int) -> None:
        """Make the masks of the next positions and their products, with the other party.

        Not while a step runs. Cost: ``AttentionSizes.preparation_bytes`` for every layer.

        Raises:
            ParameterError: so many positions at once would tell too much, or a side is too long.
            UsageError: a pass or preparation before ended in an error.
            ProtocolError, ConnectionLost: as the channel.
        """
        first, stop = self._prepared, self._prepared + num_positions
        plans = self._sizes.plans(first, stop)
        count = len(self._layers) * self._sizes.heads.num_kv_heads
        check_preparation((plan, count) for plan in plans)
        with self._exchange(*self._layers.values()):
            cross = CrossProducts(self._is_server, self._channel, self._preparations)
            self._preparations += 1
            for layer in self._layers.values():
                self._prepare_layer(layer, cross, first, stop)
        self._prepared = stop

    def _prepare_layer(self, layer: _Layer, cross: CrossProducts, first: int, stop: int) -> None:
        sizes, heads = self._sizes, self._sizes.heads
        K, D, rows = heads.num_kv_heads, heads.head_dim, sizes.group * (stop - first)
        new = (K, stop - first, D)
        layer.key_mask = torch.cat([layer.key_mask, self._random(new, sizes.score_bits)], 1)
        layer.value_mask = torch.cat([layer.value_mask, self._random(new, sizes.context_bits)], 1)
        query = self._random((K, rows, D), sizes.score_bits)
        weight = self._random((K, rows, stop), sizes.context_bits)
        weight = torch.where(self._visible(first, stop, stop), weight, 0)
        scores = ring_matmul(query, layer.key_mask.transpose(1, 2), sizes.score_bits)
        context = ring_matmul(weight, layer.value_mask, sizes.context_bits)
        plans = sizes.plans(first, stop)
        for k in range(K):
            keys, values = layer.key_mask[k], layer.value_mask[k]
            # Each party puts in the factor that is its own in that term.
            if self._is_server:
                own = (query[k], keys, weight[k], values.t())
            else:
                own = (keys.t(), query[k].t(), values, weight[k].t())
            terms = cross.multiply(list(zip(plans, own, strict=True)))
            direct, turned, weighed, turned_back = (term.to(self._device) for term in terms)
            scores[k] += direct + turned.t()
            context[k] += weighed + turned_back.t()
        scores = reduced(scores, sizes.score_bits)
        context = reduced(context, sizes.context_bits)
        layer.blocks.append(_Block(first, stop, query, weight, scores, context))

    # --- online ---------------------------------------------------------------------------------

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``AttentionProducts``; 0 for positions after a row's own. 1 round.

        Raises:
            UsageError: the text is longer than what was prepared, or a pass or preparation before
                ended in an error.
            ValueError: rows or rings are not those of the next positions.
        """
        self._check(bits, self._sizes.score_bits, q_KRD, keys_KPD)
        state, P = self._layers[layer], keys_KPD.shape[1]
        first, stop = self._rows(state.scored, q_KRD.shape[1], P)
        state.scored = stop
        parts = self._parts(state, first, stop)
        mask = torch.cat([block.query[:, rows] for block, rows in parts], 1)
        known = state.keys.shape[1]
        with self._exchange(state):
            q, new = yield from self._open(
                ops, bits, (q_KRD, mask), (keys_KPD[:, known:], state.key_mask[:, known:P])
            )
            state.keys = torch.cat([state.keys, new], 1)
        prepared = torch.cat([_padded(block.scores[:, rows, :P], P) for block, rows in parts], 1)
        total = prepared + self._local(q, mask, state.keys, state.key_mask[:, :P], bits, turn=True)
        seen = torch.where(self._visible(first, stop, P), total, 0)
        self._drop_used(state)
        return Share.of(seen, bits, q_KRD.frac + keys_KPD.frac)

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``AttentionProducts``. 1 round.

        Raises:
            UsageError: the text is longer than what was prepared, or a pass or preparation before
                ended in an error.
            ValueError: rows or rings are not those of the next positions.
        """
        self._check(bits, self._sizes.context_bits, weights_KRP, values_KPD)
        state, P = self._layers[layer], values_KPD.shape[1]
        first, stop = self._rows(state.weighed, weights_KRP.shape[1], P)
        state.weighed = stop
        parts = self._parts(state, first, stop)
        mask = torch.cat([_padded(block.weight[:, rows, :P], P) for block, rows in parts], 1)
        known, seen_RP = state.values.shape[1], self._visible(first, stop, P)
        seen = Share(weights_KRP.data[:, seen_RP], bits)
        with self._exchange(state):
            w, new = yield from self._open(
                ops,
                bits,
                (seen, mask[:, seen_RP]),
                (values_KPD[:, known:], state.value_mask[:, known:P]),
            )
            state.values = torch.cat([state.values, new], 1)
        opened = torch.zeros_like(mask)
        opened[:, seen_RP] = w
        prepared = torch.cat([block.context[:, rows] for block, rows in parts], 1)
        local = self._local(opened, mask, state.values, state.value_mask[:, :P], bits, turn=False)
        self._drop_used(state)
        return Share.of(prepared + local, bits, weights_KRP.frac + values_KPD.frac)

    def _open(
        self, ops: SecureOperations, bits: int, *pairs: tuple[Share, Tensor]
    ) -> Step[list[Tensor]]:
        """Values less their masks, known to both parties, of several tensors in one round."""
        own = [reduced(value.data - mask, bits) for value, mask in pairs]
        joint = Share(torch.cat([part.reshape(-1) for part in own]), bits)
        opened = yield from ops.swap(joint)
        sizes = [part.numel() for part in own]
        return [part.view(like.shape) for part, like in zip(opened.split(sizes), own, strict=True)]

    def _local(
        self, x: Tensor, a: Tensor, y: Tensor, b: Tensor, bits: int, *, turn: bool
    ) -> Tensor:
        """Own share of x y + x b + a y, x and y opened, a and b own shares of their masks."""
        if turn:
            y, b = y.transpose(1, 2), b.transpose(1, 2)
        second = reduced(b + y, bits) if self._is_server else b
        return ring_matmul(x, second, bits) + ring_matmul(a, y, bits)

    # --- bookkeeping ----------------------------------------------------------------------------

    @contextmanager
    def _exchange(self, *layers: _Layer) -> Iterator[None]:
        """Messages under masks of these layers; if it does not end, there are no more of them."""
        if any(layer.under_way for layer in layers):
            raise UsageError(
                "A pass or preparation of this text ended in an error, and its masks may have been "
                "used; start the text again with new products."
            )
        for layer in layers:
            layer.under_way = True
        yield
        # Not after an error: the keys and values of that round would open under the same masks.
        for layer in layers:
            layer.under_way = False

    def _rows(self, done: int, num_rows: int, num_positions: int) -> tuple[int, int]:
        """Positions of the next rows."""
        stop = done + num_rows // self._sizes.group
        if num_positions > self._prepared:
            raise UsageError(
                f"The text has {num_positions} positions, but products of attention are prepared "
                f"for {self._prepared}; prepare more before you go on."
            )
        if num_rows % self._sizes.group or not done < stop <= num_positions:
            raise ValueError(
                f"{num_rows} rows of {self._sizes.group} heads a position came after {done} of "
                f"{num_positions} positions; every position is queried once, in order."
            )
        return done, stop

    def _parts(self, state: _Layer, first: int, stop: int) -> list[tuple[_Block, slice]]:
        """Blocks of positions first .. stop - 1, with their rows in each."""
        group, found = self._sizes.group, []
        for block in state.blocks:
            lo, hi = max(first, block.first), min(stop, block.stop)
            if lo < hi:
                rows = slice((lo - block.first) * group, (hi - block.first) * group)
                found.append((block, rows))
        return found

    def _drop_used(self, state: _Layer) -> None:
        """Free blocks whose masks have all been used."""
        used = min(state.scored, state.weighed)
        state.blocks = [block for block in state.blocks if block.stop > used]

    def _visible(self, first: int, stop: int, num_positions: int) -> Tensor:
        """bool (R, P): which positions the rows of first .. stop - 1 see."""
        position_R = torch.arange(first, stop, device=self._device)
        position_R = position_R.repeat_interleave(self._sizes.group)
        return torch.arange(num_positions, device=self._device) <= position_R[:, None]

    def _random(self, shape: Sequence[int], bits: int) -> Tensor:
        return random_ring(shape, bits, self._device)

    def _check(self, bits: int, expected: int, *factors: Share) -> None:
        if any(ring != expected for ring in (bits, *(factor.bits for factor in factors))):
            raise ValueError(
                f"Products were prepared mod 2^{expected}, but {factors!r} are to be multiplied "
                f"mod 2^{bits}."
            )

    def __repr__(self) -> str:
        return f"PreparedProducts({self._prepared} positions, {len(self._layers)} layers)"


def _padded(x: Tensor, width: int) -> Tensor:
    """x with columns of 0 up to ``width``."""
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
