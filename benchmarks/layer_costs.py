"""What a token costs with private weights, operation by operation, from the code alone.

The program of the product runs as ``otpipe.secure.cost`` has it, on shares without data. Linear
maps and attention's products are replaced by what they send.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from otpipe.model.private_description import FORMATS, RING_BITS, PrivateDescription
from otpipe.model.private_program import PrivateProgram, Runner
from otpipe.secure import Share, cost_of
from otpipe.secure.cost import operand
from otpipe.secure.decoder import HeadShapes, ShareCache
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rlwe_products import AttentionSizes
from otpipe.secure.rounds import Step

PRODUCTS = "attention products"
COUNTERS = ("rounds", "cots", "to_server", "to_client")


@dataclass
class Counts:
    """Of a part of a token.

    Attributes:
        rounds: how often the client waits for an answer.
        cots: correlated OTs, made ahead of time.
        to_server, to_client: payload bytes online.
    """

    rounds: int = 0
    cots: int = 0
    to_server: int = 0
    to_client: int = 0

    def add(self, other: Counts, times: int = 1) -> None:
        """Add ``other``, ``times`` times."""
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


class _Maps:
    """Linear maps that only send, or only take: one gift to the server, no product."""

    def __init__(self, ops: SecureOperations, description: PrivateDescription) -> None:
        self._ops, self._maps = ops, description.maps

    def linear(self, index: int, x: Share, first_row: int = 0) -> Step[Share]:
        """See ``private_maps.LinearMaps``."""
        shape = self._maps[index]
        yield from self._ops.give_to_server(x.data, RING_BITS)
        return operand((x.shape[0], shape.out_features), RING_BITS, shape.out_frac)


class _Products:
    """Attention's products that only open: what one row and the new position bring."""

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``decoder.AttentionProducts``."""
        new = q_KRD.data.numel() + keys_KPD[:, -1:].data.numel()
        yield from ops.swap(operand((new,), bits))
        shape = (*q_KRD.shape[:2], keys_KPD.shape[1])
        return operand(shape, bits, q_KRD.frac + keys_KPD.frac)

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``decoder.AttentionProducts``."""
        new = weights_KRP.data.numel() + values_KPD[:, -1:].data.numel()
        yield from ops.swap(operand((new,), bits))
        shape = (*weights_KRP.shape[:2], values_KPD.shape[2])
        return operand(shape, bits, weights_KRP.frac + values_KPD.frac)


def attention_sizes(description: PrivateDescription) -> AttentionSizes:
    """Of every layer."""
    spec = description.spec
    heads = HeadShapes(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return AttentionSizes(heads, FORMATS.score.bits, FORMATS.context_bits)


def layer_counts(description: PrivateDescription, layer: int, positions: int) -> dict[str, Counts]:
    """One decoder layer and one token, the last of ``positions``, by operation.

    The bytes of attention's products are taken out of "attention" and stand under their own name;
    so does the round of the scores. That of the context is one which others take anyway.
    """
    spec = description.spec
    cached = (spec.num_kv_heads, positions - 1, spec.head_dim)

    def program(runner: Runner, x: Share) -> Step[Any]:
        cache = ShareCache(spec.num_layers, positions)
        keys, values = FORMATS.key, FORMATS.value
        cache.append(
            layer,
            operand(cached, keys.bits, keys.frac),
            operand(cached, values.bits, values.frac),
        )
        cache.advance(positions - 1)
        return PrivateProgram(description).layer(runner, layer, x, cache)

    counts = _counted(description, program)
    opened = attention_sizes(description).online_bytes(positions - 1, 1)
    counts[PRODUCTS] = Counts(1, 0, opened, opened)
    counts["attention"].add(counts[PRODUCTS], -1)
    return counts


def end_counts(description: PrivateDescription) -> dict[str, Counts]:
    """Embedding and head of one token."""
    program = PrivateProgram(description)

    def embed(runner: Runner, x: Share) -> Step[Any]:
        return program.embed(runner, 1, None)

    def head(runner: Runner, x: Share) -> Step[Any]:
        return program.head(runner, x, "last")

    return {
        name: _total(_counted(description, each))
        for name, each in (("embed", embed), ("head", head))
    }


def _total(counts: dict[str, Counts]) -> Counts:
    total = Counts()
    for each in counts.values():
        total.add(each)
    return total


def _counted(
    description: PrivateDescription, program: Callable[[Runner, Share], Step[Any]]
) -> dict[str, Counts]:
    """By name of operation; "rest" is what happens between them."""
    found: dict[str, Counts] = {}

    def run(ops: SecureOperations) -> Step[Any]:
        counter = cast(Any, ops)  # the counting party of ``cost_of``

        def measure(name: str, operation: Step[Share]) -> Step[Share]:
            before = [getattr(counter, each) for each in COUNTERS]
            result = yield from operation
            taken = [
                getattr(counter, each) - was for each, was in zip(COUNTERS, before, strict=True)
            ]
            found.setdefault(name, Counts()).add(Counts(*taken))
            return result

        residual = FORMATS.residual
        x = operand((1, description.spec.hidden_size), residual.bits, residual.frac)
        return program(Runner(ops, _Maps(ops, description), _Products(), measure), x)

    cost = cost_of(run)
    whole = Counts(cost.rounds, cost.cots, cost.to_server, cost.to_client)
    whole.add(_total(found), -1)
    found["rest"] = whole
    return found


def model_counts(description: PrivateDescription, positions: int) -> Counts:
    """A whole token, the last of ``positions``: all layers, embedding and head."""
    total = Counts()
    first, other = (_total(layer_counts(description, layer, positions)) for layer in (0, 1))
    total.add(first)
    total.add(other, description.spec.num_layers - 1)
    for each in end_counts(description).values():
        total.add(each)
    return total
