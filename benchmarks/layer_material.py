"""A private model of a published shape for benchmarks: noise as weights, and prepared slots for it.

Slots come from the exchange of docs/private_preprocessing.md, both parties over a channel, or from
an INSECURE dealer (the server sees the pads), whose slots cost online what real ones cost.

Shape suffixes: T slots, n inputs, m outputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from shapes import qwen_config
from torch import Tensor

from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivatePacking, choose_packing
from otpipe.crypto.private_rlwe import PrivateSecret, decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.crypto.randomness import KEY_BYTES, random_bytes
from otpipe.crypto.rlwe import BatchSecret
from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.kernels.ring_gemm import ring_gemm
from otpipe.model.private_description import (
    RING_BITS,
    PrivateDescription,
    PrivateMapShape,
    finest_exponent,
    segments_of,
)
from otpipe.model.private_weights import PrivateWeights
from otpipe.model.spec import LinearMap, ModelSpec
from otpipe.ot.channel import Channel
from otpipe.secure.shares import random_ring, reduced

Source = Literal["rlwe", "dealt"]
PARAMS = PRIVATE_PARAMS["private44"]
RING_BYTES = -(-RING_BITS // 8)
UPLOAD_BYTES = 4 << 20
ANSWER_BYTES = 2 << 20
"""Of one message each, as client and server of the product have them."""

WEIGHT_STD = 0.02
_INT8_STD = 73.3  # of integers uniform from -127 to 127
_EMBEDDING_EXPONENT = 18  # a table of magnitudes below 0.1
_CPU = torch.device("cpu")


def description_of(shape: str) -> PrivateDescription:
    """The published shape, with the scales that :func:`noise_weights` has."""
    spec = ModelSpec.from_config(qwen_config(shape).to_dict())
    return PrivateDescription.of(spec, {each.index: _exponents(spec, each) for each in spec.maps})


def noise_weights(description: PrivateDescription, index: int, device: str) -> PrivateWeights:
    """Uniform int8 weights and multipliers for a standard deviation near 0.02; small biases."""
    shape, linear_map = description.maps[index], description.spec.maps[index]
    n, m = shape.in_features, shape.out_features
    is_table = linear_map.kind == "embed"  # stored by token, as the product has it
    noise = torch.from_numpy(random_bytes(m * n)).view(torch.int8)
    weight = noise.clamp_(min=-127).view((n, m) if is_table else (m, n)).to(device)
    exponents = _exponents(description.spec, linear_map)
    if is_table:
        ones = torch.ones(m, dtype=torch.int64, device=device)
        return PrivateWeights(weight.t(), ones, None, exponents)
    typical = WEIGHT_STD * 2.0 ** exponents[0] / _INT8_STD
    low, high = max(1, round(typical / 2)), max(2, round(1.5 * typical))
    bias = None
    if linear_map.has_bias:
        bias = (torch.randn(m).double() * WEIGHT_STD * 2.0**shape.out_frac).long().to(device)
    return PrivateWeights(weight, torch.randint(low, high + 1, (m,)).to(device), bias, exponents)


def _exponents(spec: ModelSpec, linear_map: LinearMap) -> tuple[int, ...]:
    if linear_map.kind == "embed":
        return (_EMBEDDING_EXPONENT,)
    return (finest_exponent(linear_map.kind),) * len(segments_of(spec, linear_map))


# --- slots --------------------------------------------------------------------------------------


class Pads:
    """The client's part of one slot after the other; see ``private_maps.Pads``."""

    def __init__(self, slots: dict[int, tuple[Tensor, Tensor]]) -> None:
        """``slots``: by map, pads (T, n) and results c (W r) - s (T, m)."""
        self._slots = slots
        self._next = dict.fromkeys(slots, 0)

    def take(self, index: int, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        """The next slot of a map; a pass has one row."""
        slot = _next_slot(self._next, index, first_row, count)
        pads_Tn, results_Tm = self._slots[index]
        return pads_Tn[slot : slot + 1], results_Tm[slot : slot + 1]


class Masks:
    """The server's part of the same slots; see ``private_maps.Masks``."""

    def __init__(self, slots: dict[int, Tensor]) -> None:
        """``slots``: by map, masks s (T, m)."""
        self._slots = slots
        self._next = dict.fromkeys(slots, 0)

    def take(self, index: int, first_row: int, count: int) -> Tensor:
        """The next slot of a map; a pass has one row."""
        slot = _next_slot(self._next, index, first_row, count)
        return self._slots[index][slot : slot + 1]


def _next_slot(following: dict[int, int], index: int, first_row: int, count: int) -> int:
    if (first_row, count) != (0, 1):
        raise ValueError(f"Rows {first_row} and {count - 1} more are asked for in a pass of one.")
    following[index] += 1
    return following[index] - 1


@dataclass(frozen=True)
class Exchange:
    """Sizes of one map's exchange, which both parties know.

    Attributes:
        shape: of the map.
        packing: of its batch.
        used: slots that are kept, the first of the batch.
    """

    shape: PrivateMapShape
    packing: PrivatePacking
    used: int

    @classmethod
    def of(cls, shape: PrivateMapShape, num_slots: int, used: int) -> Exchange:
        """Of a batch of ``num_slots``."""
        packing = choose_packing(PARAMS, shape.in_features, shape.out_features, num_slots)
        return cls(shape, packing, used)

    @property
    def polynomial_bytes(self) -> int:
        """Of an uploaded polynomial."""
        return PARAMS.ring_degree * PARAMS.upload_bytes

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Uploads after the key: first polynomial, first coordinate, number of coordinates."""
        n, inputs = self.shape.in_features, self.packing.inputs
        step = max(1, UPLOAD_BYTES // self.polynomial_bytes) * inputs
        for first in range(0, n, step):
            yield 1 + first // inputs, first, min(step, n - first)

    def answers(self) -> Iterator[tuple[int, int]]:
        """Answers: first one and number of a message."""
        total = self.packing.num_answers(self.shape.out_features)
        step = max(1, ANSWER_BYTES // self.packing.answer_bytes)
        for first in range(0, total, step):
            yield first, min(step, total - first)


def ask(exchange: Exchange, channel: Channel, secret: PrivateSecret) -> tuple[Tensor, Tensor]:
    """The client's part of one map: pads (used, n) and results (used, m), int64."""
    packing, index, used = exchange.packing, exchange.shape.index, exchange.used
    a_key = os.urandom(KEY_BYTES)
    channel.send(f"slots.key@{index}", np.frombuffer(a_key, np.uint8).copy())
    channel.send(f"slots.upload@{index}.0", encrypt_key(secret, a_key, index).reshape(-1))
    pads = []
    for number, _, count in exchange.blocks():
        r_Tn = random_bytes(8 * packing.num_slots * count).view(np.uint64).reshape(-1, count)
        block = encrypt_block(secret, packing, a_key, index, number, r_Tn)
        channel.send(f"slots.upload@{index}.{number}", block.reshape(-1))
        pads.append(r_Tn[:used].copy())
    results = []
    for first, count in exchange.answers():
        size = count * packing.answer_bytes
        payload = channel.receive(f"slots.answers@{index}.{first}", size)
        outputs = min(
            count * packing.outputs, exchange.shape.out_features - first * packing.outputs
        )
        answers = payload.reshape(count, -1)
        results.append(decrypt_block(secret, packing, answers, outputs)[:, :used].copy())
    r_Tn = np.concatenate(pads, axis=1).view(np.int64)
    y_Tm = np.concatenate(results).T.copy().view(np.int64)
    return reduced(torch.from_numpy(r_Tn), RING_BITS), torch.from_numpy(y_Tm)


def answer(exchange: Exchange, channel: Channel, weights: PrivateWeights) -> Tensor:
    """The server's part of one map: masks (used, m), int64."""
    packing, index = exchange.packing, exchange.shape.index
    a_key = channel.receive(f"slots.key@{index}", KEY_BYTES).tobytes()
    masks = MaskStream(fresh_mask_key(), index, exchange.shape.out_features, RING_BITS)
    evaluator = PrivateEvaluator(weights.weight, weights.multipliers, packing, index, a_key, masks)
    blocks = [(0, 1)]
    for number, _, count in exchange.blocks():
        blocks.append((number, -(-count // packing.inputs)))
    for number, count in blocks:
        shape = (count, PARAMS.ring_degree, PARAMS.upload_bytes)
        label = f"slots.upload@{index}.{number}"
        block = channel.receive(label, count * exchange.polynomial_bytes)
        evaluator.add_block(number, torch.from_numpy(block.reshape(shape)))
    for first, answers in evaluator.answers(max(ANSWER_BYTES, packing.answer_bytes)):
        channel.send(f"slots.answers@{index}.{first}", answers.reshape(-1).numpy())
    return torch.from_numpy(masks.rows(0, exchange.used))


def new_secret() -> PrivateSecret:
    """Of one batch."""
    return BatchSecret.generate(PARAMS)


def ask_dealer(shape: PrivateMapShape, used: int, channel: Channel) -> tuple[Tensor, Tensor]:
    """INSECURE: as :func:`ask`, from a server that is shown the pads."""
    index = shape.index
    pads_Tn = random_ring((used, shape.in_features), RING_BITS, _CPU)
    channel.send(f"dealt.pads@{index}", pack_uints(pads_Tn, RING_BYTES).reshape(-1).numpy())
    size = used * shape.out_features * RING_BYTES
    results = torch.from_numpy(channel.receive(f"dealt.results@{index}", size))
    return pads_Tn, unpack_uints(results.view(used, shape.out_features, RING_BYTES))


def deal(shape: PrivateMapShape, used: int, channel: Channel, weights: PrivateWeights) -> Tensor:
    """INSECURE: as :func:`answer`, by multiplying the client's pads."""
    index, device = shape.index, weights.weight.device
    size = used * shape.in_features * RING_BYTES
    pads = torch.from_numpy(channel.receive(f"dealt.pads@{index}", size))
    pads_Tn = unpack_uints(pads.view(used, shape.in_features, RING_BYTES)).to(device)
    masks_Tm = random_ring((used, shape.out_features), RING_BITS, _CPU)
    product = ring_gemm(pads_Tn, weights.weight, RING_BITS) * weights.multipliers
    results = reduced(product.cpu() - masks_Tm, RING_BITS)
    channel.send(f"dealt.results@{index}", pack_uints(results, RING_BYTES).reshape(-1).numpy())
    return masks_Tm
