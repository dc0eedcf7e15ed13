"""What one rank offers to its clients with private weights; shared by all of its sessions."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.crypto.private_noise import check_batch
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivateParams
from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.model.private_description import RING_BITS, PrivateDescription
from otpipe.model.private_program import PrivateProgram, Stage, stages
from otpipe.model.private_weights import PrivateWeights
from otpipe.pipeline.jobs import JobHeader, Op
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.pipeline.residuals import Mailbox, ShareKey
from otpipe.server.mask_ledger import MaskLedger
from otpipe.server.memory_budget import MemoryBudget
from otpipe.server.service import Audit
from otpipe.server.turns import Turns

PARAMS: PrivateParams = PRIVATE_PARAMS["private44"]

MAX_EXCHANGES_PER_RANK = 2
"""Exchanges and preparations that may hold memory on one rank at a time; further ones wait."""

MAX_PASSES_AT_ONCE = 1
"""Over all ranks: the tables of one pass may fill a device's memory."""

MAX_PRODUCT_BYTES = 8 << 30
"""Of attention products that the texts on one rank have prepared and not used yet."""

SHARE_BYTES = -(-RING_BITS // 8)
_SESSION = struct.Struct("<qq")

HandOver = Callable[[int, JobHeader, Tensor], None]
"""``Transport.hand_over``."""


class PrivateRank:
    """One rank's weights, masks and place in the pipeline. Thread-safe.

    Attributes:
        ole_turns: places for exchanges, and for preparations of attention products, on this rank.
        pass_turns: places for passes over all ranks; the gateway's count.
        product_memory: of prepared attention products.
        layers: the decoder layers that this rank runs.
    """

    def __init__(
        self,
        rank: int,
        description: PrivateDescription,
        weights: Mapping[int, PrivateWeights],
        placement: Placement,
        device: torch.device,
        hand_over: HandOver,
        on_device_lost: Callable[[Exception], None],
        audit: Audit | None = None,
    ) -> None:
        """
        Args:
            weights: by map index, of the maps that ``placement`` gives to this rank.
            hand_over: carries a share to another rank.
            on_device_lost: told when the device fails, which is the end of this process.
            audit: collects what clients send, or None.

        Raises:
            ParameterError: a batch for this model would tell too much about its weights.
        """
        check_batch(PARAMS, [(m.in_features, m.out_features) for m in description.maps])
        self.rank = rank
        self.description = description
        self.weights = weights
        self.device = device
        self.program = PrivateProgram(description)
        self.ledger = MaskLedger({i: description.maps[i].out_features for i in weights}, RING_BITS)
        self.mailbox = Mailbox()
        self.ole_turns = Turns(MAX_EXCHANGES_PER_RANK)
        self.pass_turns = Turns(MAX_PASSES_AT_ONCE)
        self.product_memory = MemoryBudget(MAX_PRODUCT_BYTES)
        self.on_device_lost = on_device_lost
        self._hand_over = hand_over
        self._audit = audit
        self._stages = stages(description.spec)
        self._owners = tuple(
            placement.owner_of_map[stage.map_indices(description.spec)[0]] for stage in self._stages
        )
        self.layers = tuple(
            stage.layer
            for stage, owner in zip(self._stages, self._owners, strict=True)
            if stage.layer is not None and owner == rank
        )
        self._current = threading.local()

    @property
    def is_gateway(self) -> bool:
        """Whether this rank hands out turns."""
        return self.rank == GATEWAY_RANK

    @property
    def predecessors(self) -> frozenset[int]:
        """The other ranks that hand over shares to this one."""
        return frozenset(
            before
            for before, owner in zip(self._owners, self._owners[1:], strict=False)
            if owner == self.rank and before != self.rank
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 weights that this rank holds."""
        return sum(each.weight.untyped_storage().nbytes() for each in self.weights.values())

    def owns(self, stage: Stage) -> bool:
        """Whether this rank runs a stage."""
        return self._owners[self._stages.index(stage)] == self.rank

    def key(self, session: bytes, pass_number: int, stage: Stage) -> ShareKey:
        """The name of the share that goes into a stage."""
        return ShareKey(session, pass_number, self._stages.index(stage))

    def send_share(self, key: ShareKey, share_TH: Tensor) -> None:
        """Hand a share of the residual stream, int64 (T, H), to the owner of its stage."""
        first, second = _SESSION.unpack(key.session)
        header = JobHeader(
            Op.HAND_OVER,
            map_index=key.stage,
            rows=len(share_TH),
            session=first,
            first=key.pass_number,
            extra=second,
        )
        payload = pack_uints(share_TH, SHARE_BYTES).reshape(-1)
        self._hand_over(self._owners[key.stage], header, payload)

    def deliver(self, header: JobHeader, payload: Tensor) -> None:
        """Put what another rank handed over, uint8 (bytes,), into the mailbox."""
        session = _SESSION.pack(header.session, header.extra)
        key = ShareKey(session, header.first, header.map_index)
        self.mailbox.put(key, unpack_uints(payload.view(header.rows, -1, SHARE_BYTES)))

    def audit(self, payload: NDArray[np.uint8]) -> None:
        """Count what a client sent, where that was asked for."""
        if self._audit is not None:
            self._audit.add(payload)

    def make_current(self) -> None:
        """Name the process's one device to CUDA: what is current belongs to threads."""
        if self.device.type == "cuda" and not hasattr(self._current, "device"):
            torch.cuda.set_device(self.device)
            self._current.device = self.device
