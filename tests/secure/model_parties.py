"""A private model with all of its parties in one process: ranks are threads, the client the caller.

Preparation is real (the oblivious linear evaluation of the product) or INSECURE (a dealer that sees
pads, masks and weights: for tests that are about something else). So is the oblivious transfer.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from two_parties import CPU, TwoParties, connect

from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import PRIVATE_PARAMS, choose_packing
from otpipe.crypto.private_rlwe import decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.crypto.rlwe import BatchSecret
from otpipe.kernels.ring_gemm import ring_gemm
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.private_description import RING_BITS, PrivateDescription
from otpipe.model.private_maps import ClientMaps, PlainMaps, ServerMaps
from otpipe.model.private_program import PrivateProgram, Runner, Stage
from otpipe.model.private_quantize import PrivateMap, dequantize_private, join_embedding
from otpipe.model.private_weights import PrivateWeights, load_private_maps
from otpipe.model.program import LogitsFor
from otpipe.model.reference import FloatMap, PlaintextExecutor
from otpipe.secure import Party, PlainOperations, SecureOperations, Share, Step
from otpipe.secure.decoder import AttentionProducts
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.shares import random_ring, reduced

PRIVATE44 = PRIVATE_PARAMS["private44"]
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Material:
    """What preparation gives for one map and some slots: int64 in [0, 2^44).

    Attributes:
        pads: (slots, n), the client's.
        prepared: (slots, m), the client's c (W r) - s.
        masks: (slots, m), the server's s.
    """

    pads: Tensor
    prepared: Tensor
    masks: Tensor


def insecure_dealer(index: int, weights: PrivateWeights, num_slots: int) -> Material:
    """INSECURE: one party that draws pads and masks and knows the weights."""
    m, n = weights.weight.shape
    pads, masks = (random_ring((num_slots, size), RING_BITS, CPU) for size in (n, m))
    product = ring_gemm(pads, weights.weight.cpu(), RING_BITS) * weights.multipliers.cpu()
    return Material(pads, reduced(product - masks, RING_BITS), masks)


def oblivious_dealer(index: int, weights: PrivateWeights, num_slots: int) -> Material:
    """The real exchange of both parties, one message after the other."""
    m, n = weights.weight.shape
    packing = choose_packing(PRIVATE44, n, m, num_slots)
    pads = random_ring((num_slots, n), RING_BITS, CPU)
    secret, a_key = BatchSecret.generate(PRIVATE44), os.urandom(32)
    masks = MaskStream(fresh_mask_key(), index, m, RING_BITS)
    evaluator = PrivateEvaluator(weights.weight, weights.multipliers, packing, index, a_key, masks)
    evaluator.add_block(0, torch.from_numpy(encrypt_key(secret, a_key, index)))
    r_Tn = pads.numpy().astype(np.uint64)
    evaluator.add_block(1, torch.from_numpy(encrypt_block(secret, packing, a_key, index, 1, r_Tn)))
    answers = np.concatenate([block.numpy() for _, block in evaluator.answers(1 << 22)])
    prepared = decrypt_block(secret, packing, answers, m).T.astype(np.int64)
    return Material(
        pads, torch.from_numpy(prepared.copy()), torch.from_numpy(masks.rows(0, num_slots))
    )


class InsecureProducts:
    """INSECURE: attention's matrix products by a dealer that sees the factors.

    Shares of the exact product, as by OT, at a fraction of the work: no result is another.
    """

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._lock = threading.Lock()
        self._factors: list[tuple[Share, Share]] = []
        self._mask: Tensor | None = None

    def scores(
        self, ops: SecureOperations, layer: int, q_KRD: Share, keys_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``AttentionProducts``."""
        return self._product(ops, q_KRD, keys_KPD.transpose(1, 2), bits)

    def context(
        self, ops: SecureOperations, layer: int, weights_KRP: Share, values_KPD: Share, bits: int
    ) -> Step[Share]:
        """See ``AttentionProducts``."""
        return self._product(ops, weights_KRP, values_KPD, bits)

    def _product(self, ops: SecureOperations, x: Share, y: Share, bits: int) -> Step[Share]:
        shape = (x.shape[0], x.shape[1], y.shape[2])
        with self._lock:
            self._factors.append((x, y))
        if self._barrier.wait(TIMEOUT_S) == 0:
            self._mask = random_ring(shape, bits, CPU)
        self._barrier.wait(TIMEOUT_S)
        (x_one, y_one), (x_other, y_other) = self._factors
        frac, mask = x.frac + y.frac, self._mask
        assert mask is not None
        result = mask
        if isinstance(ops, Party) and ops.is_server:
            whole = [
                reduced(one.data + other.data, bits)
                for one, other in ((x_one, x_other), (y_one, y_other))
            ]
            result = ring_matmul(whole[0], whole[1], bits) - mask
        if self._barrier.wait(TIMEOUT_S) == 0:
            self._factors.clear()
        self._barrier.wait(TIMEOUT_S)
        return Share.of(result, bits, frac)
        yield []  # makes this a generator


class PassMaterial:
    """``Pads`` and ``Masks`` of one pass: its rows are the slots from ``first_slot`` on."""

    def __init__(self, material: Mapping[int, Material], first_slot: int) -> None:
        self._material, self._first = material, first_slot
        self._taken: set[tuple[int, int]] = set()

    def _rows(self, index: int, first_row: int, count: int) -> slice:
        rows = {(index, row) for row in range(first_row, first_row + count)}
        assert not rows & self._taken, f"rows {first_row}.. of map {index} are taken twice"
        self._taken |= rows
        end = self._first + first_row + count
        assert end <= len(self._material[index].pads), "not enough slots were prepared"
        return slice(end - count, end)


class PassPads(PassMaterial):
    """See ``private_maps.Pads``."""

    def take(self, index: int, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        rows = self._rows(index, first_row, count)
        return self._material[index].pads[rows], self._material[index].prepared[rows]


class PassMasks(PassMaterial):
    """See ``private_maps.Masks``."""

    def take(self, index: int, first_row: int, count: int) -> Tensor:
        return self._material[index].masks[self._rows(index, first_row, count)]


class PlainModel:
    """The program on plaintext integers."""

    def __init__(
        self, description: PrivateDescription, weights: Mapping[int, PrivateWeights]
    ) -> None:
        self.program = PrivateProgram(description)
        self._runner = Runner(PlainOperations(), PlainMaps(description, weights))
        self._cache = self.program.new_cache()

    def forward(self, token_ids: Sequence[int], logits_for: LogitsFor = "all") -> Tensor | None:
        """The next tokens of the one sequence."""
        return self.program.forward(lambda _: self._runner, self._cache, token_ids, logits_for)


class PrivateModel:
    """The program as a client and some ranks, layer i on rank i mod W, on one sequence.

    Attributes:
        connections: one a rank.
        material: of every map.
        deal_of: how it is made, by name.
    """

    deal_of: ClassVar[dict[str, Callable[[int, PrivateWeights, int], Material]]] = {
        "ideal": insecure_dealer,
        "real": oblivious_dealer,
    }

    def __init__(
        self,
        description: PrivateDescription,
        weights: Mapping[int, PrivateWeights],
        num_slots: int,
        *,
        transfers: str = "ideal",
        preparation: str = "ideal",
        attention: str = "transfers",
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            weights: on the ranks' device.
            transfers, preparation: "real", or "ideal" (INSECURE).
            attention: "transfers", or "ideal" (INSECURE).
        """
        self.description, self._weights = description, weights
        self.program = PrivateProgram(description)
        self.connections: list[TwoParties] = [connect(transfers, device) for _ in range(world_size)]
        deal = self.deal_of[preparation]
        self.material = {index: deal(index, each, num_slots) for index, each in weights.items()}
        self._products: list[AttentionProducts | None] = [
            InsecureProducts() if attention == "ideal" else None for _ in range(world_size)
        ]
        self._client_cache = self.program.new_cache()
        self._server_caches = [self.program.new_cache() for _ in range(world_size)]
        self._next_slot = 0

    def forward(self, token_ids: Sequence[int], logits_for: LogitsFor = "all") -> Tensor | None:
        """The next tokens of the one sequence; the first error of any party raises."""
        errors: list[BaseException] = []
        between: dict[Stage, queue.Queue[Tensor]] = {
            stage: queue.Queue() for stage in map(self._stage, range(self._num_layers + 2))
        }

        def rank_main(rank: int) -> None:
            party = self.connections[rank].server
            owned = [i for i in self._weights if self._owner_of_map(i) == rank]
            masks = PassMasks(self.material, self._next_slot)
            maps = ServerMaps(party, self.description, {i: self._weights[i] for i in owned}, masks)
            try:
                self.program.serve(
                    Runner(party, maps, self._products[rank]),
                    self._server_caches[rank],
                    lambda stage: self.owner(stage) == rank,
                    len(token_ids),
                    logits_for,
                    lambda stage: between[stage].get(timeout=TIMEOUT_S),
                    lambda stage, share: between[stage].put(share),
                )
            except BaseException as error:
                errors.append(error)
                for each in self.connections:
                    each.server_end.close()

        threads = [
            threading.Thread(target=rank_main, args=(rank,))
            for rank in range(len(self.connections))
        ]
        for thread in threads:
            thread.start()
        logits: Any = None
        try:
            logits = self._client_pass(token_ids, logits_for)
        except BaseException as error:
            errors.append(error)
            for each in self.connections:
                each.client_end.close()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self._next_slot += len(token_ids)
        return logits

    def owner(self, stage: Stage) -> int:
        """The rank that runs a stage."""
        return self._owner_of_map(stage.map_indices(self.description.spec)[0])

    def _client_pass(self, token_ids: Sequence[int], logits_for: LogitsFor) -> Tensor | None:
        pads = PassPads(self.material, self._next_slot)
        runners = [
            Runner(each.client, ClientMaps(each.client, self.description, pads), products)
            for each, products in zip(self.connections, self._products, strict=True)
        ]
        return self.program.forward(
            lambda stage: runners[self.owner(stage)], self._client_cache, token_ids, logits_for
        )

    @property
    def _num_layers(self) -> int:
        return self.description.spec.num_layers

    def _stage(self, place: int) -> Stage:
        if place == 0:
            return Stage("embed")
        return Stage("head") if place > self._num_layers else Stage("layer", place - 1)

    def _owner_of_map(self, index: int) -> int:
        linear_map = self.description.spec.maps[index]
        if linear_map.kind == "embed":
            return 0
        layer = self._num_layers - 1 if linear_map.layer is None else linear_map.layer
        return layer % len(self.connections)


def load(
    directory: Path, device: str = "cpu"
) -> tuple[PrivateDescription, dict[int, PrivateWeights]]:
    """A checkpoint as a private model."""
    checkpoint = Checkpoint.open(directory)
    weights = load_private_maps(checkpoint, range(len(checkpoint.spec.maps)), device)
    exponents = {index: each.exponents for index, each in weights.items()}
    return PrivateDescription.of(checkpoint.spec, exponents), weights


def float_reference(
    description: PrivateDescription, weights: Mapping[int, PrivateWeights]
) -> PlaintextExecutor:
    """The same quantised weights in float32, to compare the program's arithmetic with."""
    spec = description.spec
    maps = {}
    for index, each in weights.items():
        shape = description.maps[index]
        whole = PrivateMap(each.weight, each.multipliers, each.exponents, shape.segments)
        if index == 0:
            table = join_embedding(each.weight.t().long()) * 2.0 ** -each.exponents[0]
            maps[index] = FloatMap(table.float().t(), None)
            continue
        bias = None if each.bias is None else (each.bias * 2.0**-shape.out_frac).float()
        maps[index] = FloatMap(dequantize_private(whole), bias)
    gains = {name: torch.ones(spec.hidden_size) for name in spec.norm_names}
    return PlaintextExecutor(spec, gains, maps)
