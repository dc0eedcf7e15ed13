"""Preparation with private weights: fill the store with (r, c (W r) - s) before any prompt exists.

Oblivious linear evaluation as docs/private_preprocessing.md has it, one exchange for each map with
the rank that owns it. Several run at once, each by one thread over a connection of its own, so that
encryption, network, the server's products, decryption and disk overlap. Memory: per exchange one
upload block with its pads, one answer frame with its results, and what the store collects.

Shapes: T slots, J polynomials of a block, m outputs, n inputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.map_exchanges import MapExchanges, ProgressMeter
from otpipe.client.preparation import (
    QUEUE_TIMEOUT_S,
    PayloadBuffer,
    PreparationReport,
    Progress,
    StageClock,
    TotalProgress,
    batch_sizes,
)
from otpipe.client.store import BatchWriter, PadStore
from otpipe.client.store_checksum import transpose_and_sum
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivatePacking, choose_packing
from otpipe.crypto.private_rlwe import PrivateSecret, decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.rlwe import BatchSecret
from otpipe.errors import OtpipeError, ProtocolError
from otpipe.model.private_description import PrivateDescription, PrivateMapShape
from otpipe.pipeline.placement import Placement
from otpipe.protocol.messages import (
    A_KEY_BYTES,
    MAX_OLE_BLOCK_BYTES,
    MessageType,
    OleAnswer,
    OleBlock,
    OleReady,
)
from otpipe.protocol.private_messages import MaskedBegin
from otpipe.protocol.wire import Header

PARAMS = PRIVATE_PARAMS["private44"]

MAX_BATCH_SLOTS = 2048
MIN_BATCH_SLOTS = 16
"""The server's products cost the same for a batch of any size."""

BLOCK_BYTES = 4 << 20
EXCHANGES_A_RANK = 2
"""One computes at the rank while the other's bytes travel."""

MAX_EXCHANGES = 8


@dataclass(frozen=True)
class _MapPlan:
    shape: PrivateMapShape
    packing: PrivatePacking
    rank: int

    @property
    def wire_bytes(self) -> int:
        up = self.packing.upload_total(self.shape.in_features)
        return up + self.packing.download_total(self.shape.out_features)


def wire_bytes_a_slot(description: PrivateDescription, num_slots: int) -> tuple[int, int]:
    """Bytes (up, down) that a slot of a batch of this size costs, payload only."""
    up = down = 0
    for shape in description.maps:
        packing = choose_packing(PARAMS, shape.in_features, shape.out_features, num_slots)
        up += packing.upload_total(shape.in_features)
        down += packing.download_total(shape.out_features)
    return up // num_slots, down // num_slots


def prepare_private_slots(
    store: PadStore,
    description: PrivateDescription,
    placement: Placement,
    options: LinkOptions,
    fingerprint: str,
    num_slots: int,
    progress: Progress | None = None,
) -> PreparationReport:
    """Prepare at least ``num_slots`` slots, batch by batch; finished batches stay on any error.

    Raises:
        StoreError: the disk is full or the store broke; finished batches are intact.
        ConnectionLost, ServerRefused, ProtocolError: the server's part failed.
        FingerprintMismatch: the server was restarted meanwhile.
    """
    started_s = time.monotonic()
    sizes = batch_sizes(num_slots, MIN_BATCH_SLOTS, MAX_BATCH_SLOTS)
    plans = [_plan(description, placement, size) for size in sizes]
    total = sum(each.wire_bytes for plan in plans for each in plan)
    advance = TotalProgress(total, progress).advance
    sent = received = 0
    clock = StageClock()
    for size, plan in zip(sizes, plans, strict=True):
        with store.begin_batch(size) as writer:
            batch = _Batch(plan, placement, options, fingerprint, writer, advance, clock)
            batch.run()
            with clock.stage("commit"):
                writer.commit()
        sent += batch.bytes_sent
        received += batch.bytes_received
    return PreparationReport(
        sum(sizes), time.monotonic() - started_s, sent, received, dict(clock.seconds)
    )


def _plan(
    description: PrivateDescription, placement: Placement, num_slots: int
) -> tuple[_MapPlan, ...]:
    """All maps, those with most bytes first, so that the last exchanges to finish are short."""
    plans = [
        _MapPlan(
            shape,
            choose_packing(PARAMS, shape.in_features, shape.out_features, num_slots),
            placement.owner_of_map[shape.index],
        )
        for shape in description.maps
    ]
    return tuple(sorted(plans, key=lambda plan: plan.wire_bytes, reverse=True))


class _Batch(MapExchanges[_MapPlan]):
    """One batch under one secret key, which is dropped when the batch is done."""

    def __init__(
        self,
        plan: tuple[_MapPlan, ...],
        placement: Placement,
        options: LinkOptions,
        fingerprint: str,
        writer: BatchWriter,
        advance: Callable[[int], None],
        clock: StageClock,
    ) -> None:
        super().__init__(options, fingerprint, advance)
        self._writer = writer
        self._stage = clock.stage
        self._secret: PrivateSecret = BatchSecret.generate(PARAMS)
        self._plans: dict[int, list[_MapPlan]] = {
            rank: [each for each in plan if each.rank == rank]
            for rank in range(placement.world_size)
        }

    def run(self) -> None:
        _compile(self._writer.num_slots)
        num_ranks = len(self._plans)
        a_rank = EXCHANGES_A_RANK if EXCHANGES_A_RANK * num_ranks <= MAX_EXCHANGES else 1
        self._run(self._plans, a_rank)

    def _connected(self, link: ServerLink, rank: int) -> None:
        link.attach(rank)

    def _exchange(self, link: ServerLink, plan: _MapPlan, meter: ProgressMeter) -> None:
        """Upload one map's encrypted pads and store the decrypted answers.

        Every try draws a fresh ``a_key``, as in public mode; the server draws fresh masks.
        """
        a_key = os.urandom(A_KEY_BYTES)
        index, packing = plan.shape.index, plan.packing
        batch_id = bytes.fromhex(self._writer.batch_id)
        link.send(MaskedBegin(index, packing.num_slots, batch_id, a_key))

        def ready(header: Header) -> int:
            if OleReady.parse(header).map_index != index:
                raise ProtocolError(f"the server made ready for another map than {index}")
            return 0

        with self._stage("wait"):
            link.receive(MessageType.OLE_READY, ready, timeout_s=QUEUE_TIMEOUT_S)
        polynomial_bytes = PARAMS.ring_degree * PARAMS.upload_bytes
        link.send(OleBlock(0, 1), encrypt_key(self._secret, a_key, index).reshape(-1))
        meter.add(polynomial_bytes)
        number = 1
        step = max(1, BLOCK_BYTES // polynomial_bytes) * packing.inputs
        for first in range(0, plan.shape.in_features, step):
            if self._failure is not None:
                raise OtpipeError("preparation stopped")
            count = min(step, plan.shape.in_features - first)
            with self._stage("pads"):
                r_Tn = self._writer.pads(index, first, count)
            with self._stage("encrypt"):
                block = encrypt_block(self._secret, packing, a_key, index, number, r_Tn)
            with self._stage("send"):
                link.send(OleBlock(number, len(block)), block.reshape(-1))
            meter.add(block.nbytes)
            number += len(block)
        self._receive(link, plan, meter)

    def _receive(self, link: ServerLink, plan: _MapPlan, meter: ProgressMeter) -> None:
        packing, shape = plan.packing, plan.shape
        num_answers = packing.num_answers(shape.out_features)
        buffer = PayloadBuffer()
        done = 0
        while done < num_answers:

            def due(header: Header, first: int = done) -> int:
                answer = OleAnswer.parse(header)
                most = max(1, MAX_OLE_BLOCK_BYTES // packing.answer_bytes)
                most = min(num_answers - first, most)
                if (answer.map_index, answer.first_group) != (shape.index, first) or not (
                    1 <= answer.groups <= most
                ):
                    raise ProtocolError(
                        f"the server sent answers {answer.first_group}+{answer.groups} of map "
                        f"{answer.map_index}; due were those of map {shape.index} from {first}"
                    )
                return answer.groups * packing.answer_bytes

            with self._stage("receive" if done else "wait"):
                payload = link.receive(MessageType.OLE_ANSWER, due, new_buffer=buffer)
            answers = payload.reshape(-1, packing.answer_bytes)
            first_output = done * packing.outputs
            num_outputs = min(len(answers) * packing.outputs, shape.out_features - first_output)
            with self._stage("decrypt"):
                results_mT = decrypt_block(self._secret, packing, answers, num_outputs)
            with self._stage("store"):
                self._writer.put(shape.index, first_output, results_mT)
            meter.add(len(payload))
            done += len(answers)


def _compile(num_slots: int) -> None:
    """Run every kernel of an exchange once, before a server waits for what they make."""
    secret: PrivateSecret = BatchSecret.generate(PARAMS)
    packing = PrivatePacking(PARAMS, num_slots, 1)
    a_key = os.urandom(A_KEY_BYTES)
    encrypt_key(secret, a_key, 0)
    encrypt_block(secret, packing, a_key, 0, 1, np.zeros((num_slots, 1), np.uint64))
    answer = np.zeros((1, packing.answer_bytes), np.uint8)
    results_mT = decrypt_block(secret, packing, answer, 1)
    sums, weights = np.zeros(num_slots, np.uint64), np.zeros(1, np.uint32)
    transpose_and_sum(results_mT, np.empty_like(results_mT.T, order="C"), 0, weights, sums)
