"""Linear maps of the private decoder, for each executor: y = W x + bias on shares mod 2^44.

Online (docs/protocol.md, section 3; private_preprocessing.md, section 1) the client gives x_C - r,
its share less its pad. With its own share the server has x - r, which is uniform, and keeps

    y_S = c (W (x - r)) + s  (+ bias),    the client its prepared    y_C = c (W r) - s.

One message, client to server; no answer. Both then shift their shares to the output's scale.

Shape suffixes: T rows, n inputs, m outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from otpipe.kernels.ring_gemm import ring_gemm
from otpipe.model.private_description import RING_BITS, PrivateDescription, PrivateMapShape
from otpipe.model.private_weights import PrivateWeights
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rounds import Step
from otpipe.secure.shares import Share, concatenate, reduced

MAX_BLOCK_ELEMENTS = 1 << 22
"""Inputs or outputs of one product: 32 MB. Part of the protocol: a block is one message."""


class LinearMaps(Protocol):
    """The linear maps of one pass for one executor."""

    def linear(self, index: int, x: Share, first_row: int = 0) -> Step[Share]:
        """Map ``index`` of ``description.maps`` on rows of the running pass.

        Args:
            x: (T, n) mod 2^44 at the map's ``in_frac``.
            first_row: number in the pass of the first row of x.

        Returns:
            (T, m) mod 2^44 at the map's ``out_frac``, bias included. Exact, in the ring.
        """


class Pads(Protocol):
    """The client's prepared material for one pass: row i of the pass is its i-th slot."""

    def take(self, index: int, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        """Pads r (count, n) and prepared results c (W r) - s (count, m) of consecutive rows.

        int64 on the CPU, in [0, 2^44). Every row of a map is asked for once at most; must raise
        rather than give a pad that was used before.
        """


class Masks(Protocol):
    """The server's masks for one pass, of the exchange that the client's pads come from."""

    def take(self, index: int, first_row: int, count: int) -> Tensor:
        """Masks s (count, m) of consecutive rows: int64 on any device, in [0, 2^44).

        Every row of a map is asked for once at most; must raise rather than answer a slot twice.
        """


class PlainMaps:
    """On the secrets themselves. It protects nothing: the reference of the two others."""

    def __init__(
        self, description: PrivateDescription, weights: Mapping[int, PrivateWeights]
    ) -> None:
        self._maps, self._weights = description.maps, weights

    def linear(self, index: int, x: Share, first_row: int = 0) -> Step[Share]:
        """See :class:`LinearMaps`."""
        shape, weights = self._maps[index], self._weights[index]
        parts = []
        for rows in row_blocks(x, shape):
            y_Tm = _product(x.data[rows], weights)
            parts.append(_output(y_Tm, shape, weights.bias))
        return concatenate(parts)
        yield []  # makes this a generator


class ClientMaps:
    """The client's part: it gives its masked share and takes its prepared one."""

    def __init__(self, ops: SecureOperations, description: PrivateDescription, pads: Pads) -> None:
        """``ops``: the client's party that is connected to the server of these maps."""
        self._ops, self._maps, self._pads = ops, description.maps, pads

    def linear(self, index: int, x: Share, first_row: int = 0) -> Step[Share]:
        """See :class:`LinearMaps`."""
        shape = self._maps[index]
        _check(x, shape)
        parts = []
        for rows in row_blocks(x, shape):
            share_Tn = x.data[rows]
            r_Tn, prepared_Tm = self._pads.take(index, first_row + rows.start, len(share_Tn))
            yield from self._ops.give_to_server(share_Tn - r_Tn, RING_BITS)
            parts.append(_output(prepared_Tm, shape, None))
        return concatenate(parts)


class ServerMaps:
    """The server's part: weights, and the masks of the exchange."""

    def __init__(
        self,
        ops: SecureOperations,
        description: PrivateDescription,
        weights: Mapping[int, PrivateWeights],
        masks: Masks,
    ) -> None:
        """``ops``: the server's party; ``weights``: those of the maps this rank owns."""
        self._ops, self._maps = ops, description.maps
        self._weights, self._masks = weights, masks

    def linear(self, index: int, x: Share, first_row: int = 0) -> Step[Share]:
        """See :class:`LinearMaps`."""
        shape, weights = self._maps[index], self._weights[index]
        _check(x, shape)
        parts = []
        for rows in row_blocks(x, shape):
            share_Tn = x.data[rows]
            # Taken first: a slot that was answered before is refused before the client is heard.
            masks_Tm = self._masks.take(index, first_row + rows.start, len(share_Tn))
            given_Tn = yield from self._ops.give_to_server(share_Tn, RING_BITS)
            assert given_Tn is not None, "the server is given values"
            y_Tm = _product(reduced(share_Tn + given_Tn, RING_BITS), weights)
            y_Tm = reduced(y_Tm + masks_Tm.to(y_Tm.device), RING_BITS)
            parts.append(_output(y_Tm, shape, weights.bias))
        return concatenate(parts)


def row_blocks(x: Share, shape: PrivateMapShape) -> list[slice]:
    """How the rows of a pass are cut into messages; a function of public sizes."""
    widest = max(shape.in_features, shape.out_features)
    step = max(1, MAX_BLOCK_ELEMENTS // widest)
    return [slice(lo, lo + step) for lo in range(0, x.shape[0], step)]


def _check(x: Share, shape: PrivateMapShape) -> None:
    if (x.bits, x.frac, x.shape[1]) != (RING_BITS, shape.in_frac, shape.in_features):
        raise ValueError(
            f"Map {shape.index} takes {shape.in_features} features of {RING_BITS} bits at frac "
            f"{shape.in_frac}, got {x!r}."
        )


def _product(x_Tn: Tensor, weights: PrivateWeights) -> Tensor:
    """c (W x), int64 (T, m), below 2^50 in magnitude."""
    return ring_gemm(x_Tn.contiguous(), weights.weight, RING_BITS) * weights.multipliers


def _output(y_Tm: Tensor, shape: PrivateMapShape, bias_m: Tensor | None) -> Share:
    """Own results at the output's scale; products that wrap mod 2^64 keep their low bits."""
    parts = zip(y_Tm.split(shape.segments, dim=1), shape.shifts, strict=True)
    y_Tm = torch.cat([part << shift for part, shift in parts], dim=1)
    if bias_m is not None:
        y_Tm = y_Tm + bias_m
    return Share.of(y_Tm, RING_BITS, shape.out_frac)
