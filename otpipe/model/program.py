"""The decoder, written once, against operations on opaque values.

A value is whatever the executor computes with: a float tensor, a tensor whose linear maps are
evaluated by a server that sees only masks, or a share of a secret. So this file never looks into a
value and never branches on one; only lengths and the model's sizes steer it, and those are public.

Shapes below are (rows, features), one row a token position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from otpipe.errors import UsageError
from otpipe.model.spec import (
    FINAL_NORM,
    LinearMap,
    ModelSpec,
    input_norm_name,
    post_attention_norm_name,
)

V = TypeVar("V")  # the executor's value
C = TypeVar("C", bound="Cache")  # the executor's key/value cache

LogitsFor = Literal["all", "last", "none"]


class Cache(Protocol):
    """Keys and values of the positions so far, in the executor's own representation."""

    @property
    def length(self) -> int:
        """Number of positions that are complete in every layer."""

    def advance(self, num_rows: int) -> None:
        """Declare the next ``num_rows`` positions complete.

        Until then a repeated pass overwrites what an interrupted one left behind.
        """


class Executor(Protocol[V, C]):
    """The operations of the decoder. Every call may cost communication; there are few of them."""

    spec: ModelSpec

    def new_cache(self) -> C:
        """An empty cache."""

    def embed(self, token_ids: Sequence[int]) -> V:
        """(rows, hidden). The first operation of a pass: it fixes the number of rows."""

    def rms_norm(self, x: V, norm_name: str) -> V:
        """Root-mean-square norm of every row, times the gain of that name."""

    def linear(self, linear_map: LinearMap, x: V) -> V:
        """(rows, in_features) -> (rows, out_features), with the bias if the map has one."""

    def attention(self, layer: int, qkv: V, cache: C) -> V:
        """Rotary embedding, append to the cache, causal attention.

        (rows, q_size + 2 kv_size) -> (rows, q_size); row i is position ``cache.length`` + i.
        """

    def swiglu(self, gate_up: V) -> V:
        """(rows, 2 intermediate) -> (rows, intermediate): silu(first half) * second half."""

    def add(self, a: V, b: V) -> V:
        """Elementwise sum."""

    def last_rows(self, x: V, num_rows: int) -> V:
        """The last ``num_rows`` rows."""


def forward(
    executor: Executor[V, C],
    token_ids: Sequence[int],
    cache: C,
    logits_for: LogitsFor = "last",
) -> V | None:
    """Run the decoder over the next tokens of one sequence.

    Args:
        token_ids: the tokens at positions ``cache.length``, ``cache.length`` + 1, ...
        cache: holds the positions before; advanced by ``len(token_ids)`` on success only.
        logits_for: "all" rows, the "last" row, or "none" (all but the last part of a prompt).

    Returns:
        Logits (rows, vocab) or (1, vocab); None for "none".

    Raises:
        UsageError: no token, a token outside the vocabulary, or more positions than the model has.
    """
    check_tokens(executor.spec, token_ids, cache.length)
    x = decoder_layers(executor, executor.embed(token_ids), cache)
    logits = logits_of(executor, x, logits_for)
    cache.advance(len(token_ids))
    return logits


def decoder_layers(executor: Executor[V, C], x: V, cache: C) -> V:
    """All layers, one after the other, on the (rows, hidden) of the embedding."""
    spec = executor.spec
    for layer in range(spec.num_layers):
        h = executor.rms_norm(x, input_norm_name(layer))
        h = executor.linear(spec.map("qkv", layer), h)
        h = executor.attention(layer, h, cache)
        h = executor.linear(spec.map("o", layer), h)
        x = executor.add(x, h)
        h = executor.rms_norm(x, post_attention_norm_name(layer))
        h = executor.linear(spec.map("gate_up", layer), h)
        h = executor.swiglu(h)
        h = executor.linear(spec.map("down", layer), h)
        x = executor.add(x, h)
    return x


def logits_of(executor: Executor[V, C], x: V, logits_for: LogitsFor) -> V | None:
    """What :func:`forward` returns, from the (rows, hidden) of the last layer."""
    if logits_for == "none":
        return None
    if logits_for == "last":
        x = executor.last_rows(x, 1)
    x = executor.rms_norm(x, FINAL_NORM)
    return executor.linear(executor.spec.map("lm_head"), x)


def check_tokens(spec: ModelSpec, token_ids: Sequence[int], num_before: int) -> None:
    """Raise UsageError for tokens that :func:`forward` refuses; see there."""
    if not token_ids:
        raise UsageError("There is no token to process; give a prompt of at least one token.")
    for token in token_ids:
        if not 0 <= token < spec.vocab_size:
            raise UsageError(
                f"Token {token} is outside the vocabulary of {spec.vocab_size}; use the tokenizer"
                " of this model."
            )
    if num_before + len(token_ids) > spec.max_positions:
        raise UsageError(
            f"The text would reach {num_before + len(token_ids)} tokens, but the model has"
            f" {spec.max_positions} positions; shorten the prompt or generate fewer tokens."
        )
