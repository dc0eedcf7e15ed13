"""The whole decoder as one program of secure operations: for the client, the server, and plaintext.

Embedding (of a one-hot token), layers, final norm and head are stages; each belongs to one rank.
The client runs all of them, over the connection to the owner of each. A rank runs its own and
passes its share of the residual stream on to the owner of the next. Only public sizes steer it.

Shape suffixes: T rows (token positions), H hidden, V vocabulary, n inputs, m outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from otpipe.errors import UsageError
from otpipe.model.private_angles import rotary_rows
from otpipe.model.private_description import (
    FORMATS,
    REVEALED_LOGITS,
    RING_BITS,
    PrivateDescription,
)
from otpipe.model.private_maps import MAX_BLOCK_ELEMENTS, LinearMaps
from otpipe.model.private_quantize import join_embedding
from otpipe.model.program import LogitsFor, check_tokens
from otpipe.model.spec import MapKind, ModelSpec
from otpipe.secure.decoder import (
    AttentionProducts,
    HeadShapes,
    ShareCache,
    attention,
    rms_norm,
    swiglu,
    to_format,
)
from otpipe.secure.operations import SecureOperations
from otpipe.secure.product_blocks import ProductBlocks
from otpipe.secure.rlwe_products import AttentionSizes
from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share, concatenate


@dataclass(frozen=True)
class Stage:
    """A part of the program that one rank runs: "embed", one "layer", or "head"."""

    kind: Literal["embed", "layer", "head"]
    layer: int | None = None

    def map_indices(self, spec: ModelSpec) -> tuple[int, ...]:
        """Its linear maps in ``spec.maps``; they have one owner."""
        if self.kind == "layer":
            return tuple(each.index for each in spec.maps if each.layer == self.layer)
        return (spec.map_index("embed" if self.kind == "embed" else "lm_head"),)


def stages(spec: ModelSpec) -> tuple[Stage, ...]:
    """All stages in order."""
    layers = (Stage("layer", layer) for layer in range(spec.num_layers))
    return (Stage("embed"), *layers, Stage("head"))


@dataclass(frozen=True)
class Runner:
    """What runs a stage in one pass.

    Attributes:
        ops: a ``Party`` that is connected to the stage's owner (or is it), or plaintext.
        maps: linear maps of that pass.
        products: how attention multiplies its secrets; by OT if None, which no server does.
        measure: runs an operation of the program under a name, to count what it takes.
    """

    ops: SecureOperations
    maps: LinearMaps
    products: AttentionProducts | None = None
    measure: Callable[[str, Step[Share]], Step[Share]] = lambda _, operation: operation


class PrivateProgram:
    """The decoder of one description. Holds nothing secret; one object serves all sessions.

    Attributes:
        heads: of attention.
        product_blocks: how attention's products are prepared.
    """

    def __init__(self, description: PrivateDescription) -> None:
        self.description = description
        self.spec = spec = description.spec
        self.heads = HeadShapes(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.product_blocks = ProductBlocks(
            AttentionSizes(self.heads, FORMATS.score.bits, FORMATS.context_bits),
            spec.num_layers,
            self.max_positions,
        )

    def new_cache(self) -> ShareCache:
        """An empty cache: the client needs one for all layers, a rank one for those it owns.

        Layers take memory when they are first written, on the device of their shares.
        """
        return ShareCache(self.spec.num_layers)

    @property
    def max_positions(self) -> int:
        """The longest text: that of the model, or what the fixed-point formats hold."""
        return min(self.spec.max_positions, FORMATS.max_positions)

    def check_rows(self, num_rows: int, num_before: int) -> None:
        """Raise UsageError for a pass without rows or beyond :attr:`max_positions`."""
        if num_rows < 1 or num_before + num_rows > self.max_positions:
            raise UsageError(
                f"A pass of {num_rows} tokens after {num_before} was asked for, but with private "
                f"weights a text has 1 to {self.max_positions} tokens; shorten the prompt or "
                f"generate fewer tokens."
            )

    # --- all stages -----------------------------------------------------------------------------

    def forward(
        self,
        runner_of: Callable[[Stage], Runner],
        cache: ShareCache,
        token_ids: Sequence[int],
        logits_for: LogitsFor = "last",
    ) -> Tensor | None:
        """A pass of the client, or in plaintext. As ``model.program.forward``.

        Args:
            runner_of: who runs a stage: for the client, over the connection to its owner.
            cache: holds the positions before; advanced on success only.

        Returns:
            float32 logits (T, V) or (1, V); None for "none".

        Raises:
            UsageError: no token, a token outside the vocabulary, or more positions than the model
                has, before anything is sent.
        """
        check_tokens(self.spec, token_ids, cache.length)
        self.check_rows(len(token_ids), cache.length)
        x: Share | None = None
        logits = None
        for stage in stages(self.spec):
            runner = runner_of(stage)
            if stage.kind == "embed":
                x = runner.ops.run(self.embed(runner, len(token_ids), token_ids))
            elif stage.layer is not None:
                assert x is not None
                x = runner.ops.run(self.layer(runner, stage.layer, x, cache))
            elif logits_for != "none":
                assert x is not None
                logits = runner.ops.run(self.head(runner, x, logits_for))
        cache.advance(len(token_ids))
        return logits

    def serve(
        self,
        runner: Runner,
        cache: ShareCache,
        owned: Callable[[Stage], bool],
        num_rows: int,
        logits_for: LogitsFor,
        receive: Callable[[Stage], Tensor],
        send: Callable[[Stage, Tensor], None],
    ) -> None:
        """One rank's part of a pass.

        Args:
            owned: whether this rank runs a stage.
            num_rows: T.
            receive: own share of the residual stream, int64 (T, H) in [0, 2^44), from the rank that
                runs the stage before the given one, which is this rank's.
            send: hands that share to the owner of the given stage.

        Raises:
            UsageError: the rows do not fit behind those in the cache.
        """
        self.check_rows(num_rows, cache.length)
        x: Share | None = None
        order = stages(self.spec)
        for place, stage in enumerate(order):
            if stage.kind == "head" and logits_for == "none":
                break
            if owned(stage):
                if stage.kind != "embed" and not owned(order[place - 1]):
                    x = Share(receive(stage), RING_BITS, FORMATS.residual.frac)
                x = self._serve_stage(runner, stage, x, cache, num_rows, logits_for)
            elif x is not None and owned(order[place - 1]):
                send(stage, x.data)
                x = None
        cache.advance(num_rows)

    def _serve_stage(
        self,
        runner: Runner,
        stage: Stage,
        x: Share | None,
        cache: ShareCache,
        num_rows: int,
        logits_for: LogitsFor,
    ) -> Share | None:
        if stage.kind == "embed":
            return runner.ops.run(self.embed(runner, num_rows, None))
        assert x is not None, "the stage before made the residual stream"
        if stage.layer is not None:
            return runner.ops.run(self.layer(runner, stage.layer, x, cache))
        runner.ops.run(self.head(runner, x, logits_for))
        return None

    # --- stages ---------------------------------------------------------------------------------

    def embed(self, runner: Runner, num_rows: int, token_ids: Sequence[int] | None) -> Step[Share]:
        """Residual stream (T, H) of the tokens; None at the server, whose one-hot share is 0."""
        vocab = self.spec.vocab_size
        step = max(1, MAX_BLOCK_ELEMENTS // vocab)  # one-hot rows are made when they are needed
        parts = []
        for lo in range(0, num_rows, step):
            count = min(step, num_rows - lo)
            one_hot = torch.zeros((count, vocab), dtype=torch.int64, device=runner.ops.device)
            if token_ids is not None:
                one_hot[torch.arange(count), torch.tensor(token_ids[lo : lo + count])] = 1
            shared = Share(one_hot, RING_BITS)
            looked_up = runner.maps.linear(self.spec.map_index("embed"), shared, lo)
            digits = yield from runner.measure("embed", looked_up)
            parts.append(Share.of(join_embedding(digits.data), digits.bits, digits.frac))
        return concatenate(parts)

    def layer(self, runner: Runner, layer: int, x: Share, cache: ShareCache) -> Step[Share]:
        """One decoder layer, (T, H) -> (T, H), and its part of the cache."""
        spec, ops, measure = self.spec, runner.ops, runner.measure
        formats, norms = FORMATS, self.description.norm_formats(layer)
        cos, sin = rotary_rows(self.description.inverse_frequencies, cache.length, x.shape[0])

        def norm(x: Share) -> Step[Share]:
            return measure("rms_norm", rms_norm(ops, x, spec.rms_norm_eps, norms))

        def linear(kind: MapKind, x: Share) -> Step[Share]:
            return measure("linear", runner.maps.linear(spec.map_index(kind, layer), x))

        h = yield from norm(x)
        h = yield from linear("qkv", h)
        attended = attention(ops, layer, h, cache, self.heads, cos, sin, formats, runner.products)
        h = yield from measure("attention", attended)
        h = yield from linear("o", h)
        x = x + h
        h = yield from norm(x)
        h = yield from linear("gate_up", h)
        h = yield from measure("swiglu", swiglu(ops, h, formats))
        h = yield from linear("down", h)
        return x + h

    def head(self, runner: Runner, x: Share, logits_for: LogitsFor) -> Step[Tensor | None]:
        """Final norm, head, and the logits to the client alone: float32, None at the server.

        Only the bits that the client is to have leave the server: both parties drop the others
        from their shares first.
        """
        spec, ops = self.spec, runner.ops
        first = x.shape[0] - 1 if logits_for == "last" else 0
        norms = self.description.norm_formats(None)
        h = yield from runner.measure(
            "rms_norm", rms_norm(ops, x[first:], spec.rms_norm_eps, norms)
        )
        projected = runner.maps.linear(spec.map_index("lm_head"), h, first)
        logits = yield from runner.measure("linear", projected)
        short = yield from to_format(ops, logits, REVEALED_LOGITS)
        integers = yield from ops.reveal_to_client(short)
        return None if integers is None else integers.to(torch.float32) * 2.0**-short.frac
