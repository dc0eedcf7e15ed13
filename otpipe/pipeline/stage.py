"""What one rank computes: masked linear maps, and its half of the preprocessing.

Every byte that enters here from a client is a uniform ring element or an RLWE ciphertext.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import msgpack
import torch
from torch import Tensor

from otpipe.crypto.evaluate import LinearEvaluator
from otpipe.crypto.params import params_for_ring
from otpipe.errors import OtpipeError, ProtocolError
from otpipe.kernels.ring_gemm import ring_gemm, ring_gemm_bytes
from otpipe.model.bundle import PublicMap
from otpipe.model.quantize import QuantizedMap
from otpipe.model.spec import LinearMap
from otpipe.pipeline.bulk import BULK_BYTES, BulkProducts
from otpipe.pipeline.graphs import GraphedMaps, RowLine
from otpipe.pipeline.jobs import EMPTY, JobHeader, Op
from otpipe.protocol.messages import MAX_OLE_BLOCK_BYTES


class Stage:
    """The maps of one rank on its one device. One job at a time; on CUDA bulk products beside it.

    Args:
        maps: this rank's maps by index, weights on ``device``.
        linear_maps: the whole model's table, indexed by map.
        device: the only device that this process touches.
    """

    def __init__(
        self,
        maps: dict[int, QuantizedMap],
        linear_maps: tuple[LinearMap, ...],
        device: torch.device,
    ) -> None:
        self._maps = maps
        self._linear_maps = linear_maps
        self.device = device
        self._graphs: GraphedMaps | None = None
        self._bulk: BulkProducts | None = None
        if device.type == "cuda":
            # Tensor cores want each output's weights side by side; the embedding comes transposed.
            self._maps = {i: replace(m, weight=m.weight.contiguous()) for i, m in maps.items()}
            self._bulk = BulkProducts(device)
            self._graphs = GraphedMaps(self._product, linear_maps, tuple(maps), device)
        self._evaluators: dict[int, LinearEvaluator] = {}
        self._answers: dict[int, Iterator[tuple[int, Tensor]]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 weights that this rank holds; storage shared by two maps counts once."""
        storages = {m.weight.untyped_storage().data_ptr(): m.weight for m in self._maps.values()}
        return sum(w.untyped_storage().nbytes() for w in storages.values())

    @property
    def row_lines(self) -> Sequence[RowLine]:
        """What serves few rows without Python, after :meth:`warm_up`; none on a CPU."""
        return () if self._graphs is None else self._graphs.lines

    def handle(self, job: JobHeader, payload: Tensor) -> tuple[JobHeader, Tensor]:
        """Do one job. Errors come back as a FAILED answer whose payload is the sentence.

        Args:
            job: what to do.
            payload: uint8 (bytes,) on any device.
        """
        try:
            match job.op:
                case Op.LINEAR:
                    result = self.linear(job.map_index, job.rows, payload)
                    return JobHeader(Op.DONE, job.map_index, job.rows), result
                case Op.OLE_BEGIN:
                    self._ole_begin(job, payload)
                case Op.OLE_BLOCK:
                    self._ole_block(job, payload)
                case Op.OLE_NEXT:
                    return self._ole_next(job)
                case Op.OLE_DROP:
                    self._answers.pop(job.session, None)
                    self._evaluators.pop(job.session, None)
                case Op.DESCRIBE:
                    return JobHeader(Op.DONE), self._describe()
                case _:
                    raise ProtocolError(f"job {job.op} is unknown; run one otpipe release on all")
        except (OtpipeError, torch.OutOfMemoryError, MemoryError) as error:
            text = torch.frombuffer(bytearray(str(error).encode()), dtype=torch.uint8)
            return JobHeader(Op.FAILED), text
        return JobHeader(Op.DONE), EMPTY

    def warm_up(self) -> None:
        """Do what a first request would otherwise wait for."""
        if self._graphs is not None:
            self._graphs.record()

    def linear(self, map_index: int, rows: int, payload: Tensor) -> Tensor:
        """W (x - r) for ``rows`` masked rows.

        Args:
            payload: uint8 (rows * n * ring_bytes,): little-endian ring elements.

        Returns:
            uint8 (rows * m * ring_bytes,), on the CPU or on this rank's device.
        """
        if payload.is_cuda:
            return self._product(map_index, rows, payload)
        if self._bulk is not None and payload.numel() >= BULK_BYTES:
            return self._bulk.run(partial(self._product, map_index, rows), payload)
        if self._graphs is not None and self._graphs.recorded(map_index, rows):
            return torch.from_numpy(self._graphs.linear(map_index, rows, payload.numpy()))
        return self._product(map_index, rows, payload.to(self.device, non_blocking=True))

    def _product(self, map_index: int, rows: int, payload: Tensor) -> Tensor:
        """:meth:`linear` on this rank's device."""
        linear_map = self._linear_maps[map_index]
        shape = (rows, linear_map.in_features)
        weight = self._maps[map_index].weight
        if linear_map.ring_bits == 8:
            y_Tm = ring_gemm_bytes(payload.view(torch.int8).view(shape), weight)
        else:
            y_Tm = ring_gemm(payload.view(torch.int32).view(shape), weight, linear_map.ring_bits)
        return y_Tm.reshape(-1).view(torch.uint8)

    def _ole_begin(self, job: JobHeader, a_key: Tensor) -> None:
        linear_map = self._linear_maps[job.map_index]
        self._evaluators[job.session] = LinearEvaluator(
            self._maps[job.map_index].weight,
            params_for_ring(linear_map.ring_bits),
            job.map_index,
            bytes(a_key.cpu().numpy()),
            job.rows,
            job.extra,
        )

    def _ole_block(self, job: JobHeader, payload: Tensor) -> None:
        linear_map = self._linear_maps[job.map_index]
        ring_degree = params_for_ring(linear_map.ring_bits).ring_degree
        self._evaluators[job.session].add_block(
            job.first, payload.view(job.rows, ring_degree, job.extra)
        )

    def _ole_next(self, job: JobHeader) -> tuple[JobHeader, Tensor]:
        if job.session not in self._answers:
            self._answers[job.session] = iter(
                self._evaluators[job.session].answers(MAX_OLE_BLOCK_BYTES)
            )
        piece = next(self._answers[job.session], None)
        if piece is None:
            del self._answers[job.session], self._evaluators[job.session]
            return JobHeader(Op.DONE, job.map_index, first=-1), EMPTY
        first_group, answer = piece
        return (
            JobHeader(Op.DONE, job.map_index, rows=answer.shape[0], first=first_group),
            answer.reshape(-1),
        )

    def _describe(self) -> Tensor:
        public = {index: PublicMap.of(loaded).to_message() for index, loaded in self._maps.items()}
        return torch.frombuffer(bytearray(msgpack.packb(public)), dtype=torch.uint8)
