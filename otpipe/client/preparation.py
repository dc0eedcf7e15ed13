"""Preprocessing, client side: fill the pad store with (r, W·r) before any prompt exists.

Oblivious linear evaluation with additively homomorphic RLWE encryption and plaintext int8 weights
(docs/protocol.md, "Preprocessing"). Each map is one exchange: the client uploads encryptions of its
pads block by block and receives packed encryptions of W·r. Nothing here depends on a prompt.

Several maps are exchanged at once, each by one thread over a connection of its own, so that
encryption, network, GEMM, decryption and disk overlap; a thread does not share its work, since the
others have theirs. Memory: per exchange one upload block with its pads, one answer frame with its
results (2 MiB each; at most 16 from another server), and the corrections of one map as the store
bounds them; never a whole map's ciphertexts.

Shapes: T slots, J coordinates of a block, N ring degree.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.map_exchanges import MapExchanges, ProgressMeter
from otpipe.client.store import PadStore
from otpipe.client.store_checksum import transpose_and_sum
from otpipe.client.store_writer import BatchWriter
from otpipe.crypto.noise import choose_upload_bytes
from otpipe.crypto.params import RlweParams, params_for_ring
from otpipe.crypto.rlwe import BatchSecret, decrypt_block, encrypt_block
from otpipe.errors import OtpipeError, ParameterError, ProtocolError
from otpipe.model.bundle import ModelBundle
from otpipe.model.spec import LinearMap
from otpipe.protocol.messages import (
    A_KEY_BYTES,
    MAX_OLE_BLOCK_BYTES,
    MessageType,
    OleAnswer,
    OleBegin,
    OleBlock,
    OleReady,
)
from otpipe.protocol.wire import Header

MAX_BATCH_SLOTS = 2048
MIN_BATCH_SLOTS = 64
"""Smallest batch worth its upload, which does not shrink with the number of slots. Wide maps may
need a larger one: packing many outputs into one ciphertext adds up their noise."""

BLOCK_COORDINATES = 128
EXCHANGES_AT_ONCE = min(8, max(2, os.cpu_count() or 1))
"""One core each while they encrypt or decrypt; each holds the memory stated above."""

QUEUE_TIMEOUT_S = 3600.0
"""How long an exchange waits for its turn on a rank that prepares for other clients."""


Progress = Callable[[int, int], None]
"""Called with (done, total) in units of bytes on the wire."""


@dataclass(frozen=True)
class PreparationReport:
    """What one preparation cost.

    Attributes:
        slots: slots that are now usable.
        seconds: wall time.
        bytes_sent, bytes_received: on the wire, all connections.
        stage_s: seconds by stage, those of all exchanges added up: "pads", "encrypt", "send",
            "wait" (for the server's turn, and for its first answer to a map), "receive",
            "decrypt", "store", and "commit" (once a batch, by itself).
    """

    slots: int
    seconds: float
    bytes_sent: int
    bytes_received: int
    stage_s: dict[str, float]


class TotalProgress:
    """Adds up what all exchanges of a preparation have sent and received. Thread-safe."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, num_bytes: int) -> None:
        """Count so many bytes, or less than none where a try is taken back, and tell of it."""
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)


def batch_sizes(num_slots: int, smallest: int, largest: int) -> list[int]:
    """Split a wish for slots into batches: powers of two in these bounds, at least as many."""
    full, rest = divmod(num_slots, largest)
    sizes = [largest] * full
    if rest:
        sizes.append(max(smallest, 1 << (rest - 1).bit_length()))
    return sizes


def _plan_within_budget(bundle: ModelBundle, num_slots: int) -> _Plan:
    """The plan of a batch of at least ``num_slots`` whose noise every map can bear.

    Raises:
        ParameterError: not even a full batch can: no supported model gets there.
    """
    while True:
        try:
            return _plan(bundle, num_slots)
        except ParameterError:
            if num_slots == MAX_BATCH_SLOTS:
                raise
            num_slots *= 2


def prepare_slots(
    store: PadStore,
    bundle: ModelBundle,
    options: LinkOptions,
    num_slots: int,
    progress: Progress | None = None,
) -> PreparationReport:
    """Prepare at least ``num_slots`` slots, batch by batch; finished batches stay on any error.

    Raises:
        StoreError: the disk is full or the store broke; finished batches are intact.
        ConnectionLost, ServerRefused, ProtocolError: the server's part failed.
    """
    started_s = time.monotonic()
    sizes = batch_sizes(num_slots, MIN_BATCH_SLOTS, MAX_BATCH_SLOTS)
    plans = [_plan_within_budget(bundle, size) for size in sizes]
    advance = TotalProgress(sum(plan.wire_bytes for plan in plans), progress).advance
    sent = received = 0
    clock = StageClock()
    for plan in plans:
        writer = store.begin_batch(plan.num_slots)
        try:
            batch = _Batch(plan, bundle, options, writer, advance, clock)
            batch.run()
            with clock.stage("commit"):
                writer.commit()
        except BaseException:
            writer.abort()
            raise
        sent += batch.bytes_sent
        received += batch.bytes_received
    slots = sum(plan.num_slots for plan in plans)
    return PreparationReport(
        slots, time.monotonic() - started_s, sent, received, dict(clock.seconds)
    )


class StageClock:
    """Adds up what every stage takes, over all threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            taken_s = time.perf_counter() - started_s
            with self._lock:
                self.seconds[name] += taken_s


@dataclass(frozen=True)
class _MapPlan:
    linear_map: LinearMap
    params: RlweParams
    upload_bytes: int
    num_groups: int

    @property
    def wire_bytes(self) -> int:
        degree = self.params.ring_degree
        up = self.linear_map.in_features * degree * self.upload_bytes
        return up + self.num_groups * 2 * degree * self.params.answer_bytes


@dataclass(frozen=True)
class _Plan:
    num_slots: int
    maps: tuple[_MapPlan, ...]

    @property
    def wire_bytes(self) -> int:
        return sum(plan.wire_bytes for plan in self.maps)


def _plan(bundle: ModelBundle, num_slots: int) -> _Plan:
    maps = []
    for linear_map in bundle.spec.maps:
        params = params_for_ring(linear_map.ring_bits)
        pack = params.ring_degree // num_slots
        upload_bytes = choose_upload_bytes(
            params, bundle.maps[linear_map.index].max_row_l2, linear_map.in_features, pack
        )
        groups = -(-linear_map.out_features // pack)
        maps.append(_MapPlan(linear_map, params, upload_bytes, groups))
    # Longest first, so that the last exchanges to finish are short ones.
    maps.sort(key=lambda plan: plan.wire_bytes, reverse=True)
    return _Plan(num_slots, tuple(maps))


class _Batch(MapExchanges[_MapPlan]):
    """One batch under one secret key, which is dropped when the batch is done."""

    def __init__(
        self,
        plan: _Plan,
        bundle: ModelBundle,
        options: LinkOptions,
        writer: BatchWriter,
        advance: Callable[[int], None],
        clock: StageClock,
    ) -> None:
        super().__init__(options, bundle.fingerprint, advance)
        self._plan = plan
        self._writer = writer
        self._stage = clock.stage
        # A secret belongs to one parameter set, and lives as long as this object.
        self._secrets = {
            params.name: BatchSecret.generate(params)
            for params in {map_plan.params for map_plan in plan.maps}
        }

    def run(self) -> None:
        _compile(self._plan)
        # Any connection serves all maps: the gateway knows their ranks.
        self._run({0: self._plan.maps}, EXCHANGES_AT_ONCE)

    def _exchange(self, link: ServerLink, plan: _MapPlan, meter: ProgressMeter) -> None:
        """Upload one map's encrypted pads and store the decrypted answers.

        Every try draws a fresh ``a_key``: two ciphertexts with the same a and secret would reveal
        the difference of their errors and messages, and BatchSecret refuses to make them.
        """
        a_key = os.urandom(A_KEY_BYTES)
        secret = self._secrets[plan.params.name]
        index, n = plan.linear_map.index, plan.linear_map.in_features
        slots = self._plan.num_slots
        link.send(OleBegin(index, slots, plan.upload_bytes, a_key))

        def ready(header: Header) -> int:
            if OleReady.parse(header).map_index != index:
                raise ProtocolError(f"the server made ready for another map than {index}")
            return 0

        with self._stage("wait"):
            link.receive(MessageType.OLE_READY, ready, timeout_s=QUEUE_TIMEOUT_S)
        coordinate_bytes = plan.params.ring_degree * plan.upload_bytes
        step = min(BLOCK_COORDINATES, MAX_OLE_BLOCK_BYTES // coordinate_bytes)
        for first in range(0, n, step):
            if self._failure is not None:
                raise OtpipeError("preparation stopped")
            count = min(step, n - first)
            with self._stage("pads"):
                r_TJ = self._writer.pads(index, first, count)
            with self._stage("encrypt"):
                block = encrypt_block(secret, a_key, index, first, r_TJ, plan.upload_bytes)
            with self._stage("send"):
                link.send(OleBlock(first, count), block.reshape(-1))
            meter.add(count * coordinate_bytes)
        self._receive(link, plan, secret, meter)

    def _receive(
        self, link: ServerLink, plan: _MapPlan, secret: BatchSecret, meter: ProgressMeter
    ) -> None:
        params, slots = plan.params, self._plan.num_slots
        group_bytes = 2 * params.ring_degree * params.answer_bytes
        pack = params.ring_degree // slots
        buffer = PayloadBuffer()
        next_group = 0
        while next_group < plan.num_groups:

            def due(header: Header, first: int = next_group) -> int:
                answer = OleAnswer.parse(header)
                most = min(plan.num_groups - first, max(1, MAX_OLE_BLOCK_BYTES // group_bytes))
                if (
                    answer.map_index != plan.linear_map.index
                    or answer.first_group != first
                    or not 1 <= answer.groups <= most
                ):
                    raise ProtocolError(
                        f"the server answered map {answer.map_index} groups {answer.first_group}+"
                        f"{answer.groups}; due were map {plan.linear_map.index} from {first}"
                    )
                return answer.groups * group_bytes

            with self._stage("receive" if next_group else "wait"):
                payload = link.receive(MessageType.OLE_ANSWER, due, new_buffer=buffer)
            groups = len(payload) // group_bytes
            first_output = next_group * pack
            num_outputs = min(groups * pack, plan.linear_map.out_features - first_output)
            answer = payload.reshape(groups, 2, params.ring_degree, params.answer_bytes)
            with self._stage("decrypt"):
                c_mT: np.ndarray = decrypt_block(secret, params, answer, slots, num_outputs)
            with self._stage("store"):
                self._writer.put(plan.linear_map.index, first_output, c_mT)
            meter.add(len(payload))
            next_group += groups


def _compile(plan: _Plan) -> None:
    """Run every kernel of an exchange once, before a server waits for what they make.

    On a machine that has not run this release before they are compiled here, which may take longer
    than a server has patience with a client in the middle of an exchange.
    """
    slots = plan.num_slots
    for params, upload_bytes in {(m.params, m.upload_bytes) for m in plan.maps}:
        secret = BatchSecret.generate(params)
        pads = np.zeros((slots, 1), np.uint8 if params.log2_p == 8 else np.uint32)
        encrypt_block(secret, os.urandom(A_KEY_BYTES), 0, 0, pads, upload_bytes)
        answer = np.zeros((1, 2, params.ring_degree, params.answer_bytes), np.uint8)
        c_mT = decrypt_block(secret, params, answer, slots, 1)
        sums, weights = np.zeros(slots, np.uint64), np.zeros(1, np.uint64)
        transpose_and_sum(c_mT, np.empty_like(c_mT.T, order="C"), 0, weights, sums)


class PayloadBuffer:
    """Memory for one payload after another: fresh pages would cost as much as filling them."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def __call__(self, num_bytes: int) -> np.ndarray:
        if self._held.size < num_bytes:
            self._held = np.empty(num_bytes, np.uint8)
        return self._held[:num_bytes]
