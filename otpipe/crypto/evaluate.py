"""Server side of the preprocessing: sum_j W_ij (a_j, b_j) for every output i, packed and rounded.

Both sums are ring GEMMs with the int8 weights (Bae, Cheon, Hanrot, Park, Stehle, CRYPTO 2024): no
NTT, no keys. The a_j arrive as a seed and expand directly to digit planes; the b_j are split into
digits once. Nothing here is secret.

Two plans bound the memory (``LinearEvaluator.peak_bytes``):

- n <= m: keep the digit planes of all inputs, produce outputs by tiles of rows;
- n > m: keep 64-bit sums of all outputs, consume inputs by stages of ``STAGE_INPUTS``.

What the device does is in ``CpuTiles`` here and ``evaluate_cuda.CudaTiles``.

Shape suffixes: m outputs, n inputs, J inputs of a block, N ring degree, T slots, G groups (answer
ciphertexts), g = N / T outputs per group, D digit planes, R rows (outputs) of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from otpipe.crypto.block_order import BlockOrder
from otpipe.crypto.ciphertext_ops import add_products, round_products, split_packed
from otpipe.crypto.evaluate_cuda import TILE_ROWS as CUDA_TILE_ROWS
from otpipe.crypto.evaluate_cuda import CudaTiles
from otpipe.crypto.evaluate_job import EvaluationJob
from otpipe.crypto.params import RlweParams
from otpipe.crypto.rlwe import fill_a
from otpipe.kernels.ring_gemm import MAX_EXACT_INNER, int8_matmul, scratch_int32

#: inputs consumed at once when outputs are accumulated
STAGE_INPUTS = 2048
#: outputs of one product on the CPU: large enough for its int8 units, small enough for its caches
TILE_ROWS = 384


class LinearEvaluator:
    """Homomorphic product of one map with one batch of encrypted pads.

    Blocks are added in order; then ``answers`` runs once. Not thread-safe.

    Args:
        weight: (m, n) int8 on the device that computes, any strides (not copied).
        params: the map's parameter set.
        map_index: which map, as the client used it.
        a_key: 32 bytes that the client chose for this attempt.
        num_slots: T.
        upload_bytes: width of the coefficients of b.

    Raises:
        ParameterError: num_slots or upload_bytes is not one of the set's.
    """

    def __init__(
        self,
        weight: Tensor,
        params: RlweParams,
        map_index: int,
        a_key: bytes,
        num_slots: int,
        upload_bytes: int,
    ) -> None:
        m, n = weight.shape
        keep = _keeps_inputs(m, n)
        job = EvaluationJob(
            weight,
            params,
            map_index,
            a_key,
            pack=params.pack_factor(num_slots),
            upload_bytes=upload_bytes,
            dropped_bits=params.dropped_upload_bits(upload_bytes),
            capacity=n if keep else min(n, STAGE_INPUTS),
            keeps_inputs=keep,
        )
        self._order = BlockOrder(n, params.ring_degree, upload_bytes, "coordinate")
        self._job = job
        self._tiles: CpuTiles | CudaTiles | None
        self._tiles = CudaTiles(job) if weight.is_cuda else CpuTiles(job)
        self._staged = 0  # inputs in the planes

    @staticmethod
    def peak_bytes(m: int, n: int, params: RlweParams, upload_bytes: int, device: str) -> int:
        """Most memory beyond the weight: planes, sums and the temporaries of one tile.

        planes: min(n, stage) * N * (D_a + upload_bytes); sums (n > m only): 2 m N * 8;
        tile: rows * N * (4 bytes a plane of int32 products, and on CUDA 3 int64 temporaries).
        Evaluators of one CUDA device take turns with the same tile.
        """
        degree, most_planes = params.ring_degree, max(params.num_planes, upload_bytes)
        keep = _keeps_inputs(m, n)
        planes = (n if keep else min(n, STAGE_INPUTS)) * degree * (params.num_planes + upload_bytes)
        sums = 0 if keep else 2 * m * degree * 8
        on_cuda = device == "cuda"
        rows = min(m, CUDA_TILE_ROWS if on_cuda else TILE_ROWS)
        return planes + sums + rows * degree * (4 * most_planes + (24 if on_cuda else 0))

    def add_block(self, first_coord: int, block: Tensor) -> None:
        """Take encryptions of inputs first_coord .. first_coord + J - 1.

        block: uint8 (J, N, upload_bytes), on the CPU or the weight's device. It is not needed any
        more when this returns.

        Raises:
            ProtocolError: the block is not the next one, or has another shape.
        """
        self._order.check(first_coord, block)
        assert self._tiles is not None, "the order ends before the memory is freed"
        count = block.shape[0]
        while count:
            room = min(count, self._job.capacity - self._staged)
            self._tiles.stage(self._order.received, self._staged, block[:room])
            self._staged += room
            self._order.received += room
            block = block[room:]
            count -= room
            if not self._job.keeps_inputs and self._staged == self._job.capacity:
                self._accumulate()

    def answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """Packed, rounded answers in order, at most ``max_bytes`` (or one group) at a time.

        Yields (first_group, uint8 CPU tensor (G, 2, N, answer_bytes)); group i holds outputs
        i * g .. i * g + g - 1, those beyond m being zero. A tensor may be overwritten when the next
        is asked for. The memory is freed at the end.

        Raises:
            ProtocolError: inputs are missing, or the answers were already taken.
        """
        self._order.start_answers()
        if not self._job.keeps_inputs and self._staged:
            self._accumulate()
        return self._answers(max_bytes)

    def _answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        assert self._tiles is not None, "answers are taken once"
        step = max(1, max_bytes // self._job.group_bytes)
        pieces = [
            (first, min(step, self._job.num_groups - first))
            for first in range(0, self._job.num_groups, step)
        ]
        yield from self._tiles.answers(pieces)
        self._tiles = None

    def _accumulate(self) -> None:
        assert self._tiles is not None, "nothing is accumulated after the answers"
        self._tiles.accumulate(self._order.received - self._staged, self._staged)
        self._staged = 0


def _keeps_inputs(m: int, n: int) -> bool:
    return n <= min(m, MAX_EXACT_INNER)


class CpuTiles:
    """The products on the CPU: digit planes (inputs, D, N), compiled passes around the GEMMs."""

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        degree = job.params.ring_degree
        self._planes = [
            torch.empty((job.capacity, part.num_planes, degree), dtype=torch.int8)
            for part in job.parts
        ]
        shape = (2, 0 if job.keeps_inputs else job.num_outputs, degree)
        self._sums = torch.zeros(shape, dtype=torch.int64)

    def stage(self, first_coord: int, at: int, block_JNB: Tensor) -> None:
        """Digits of the next inputs, into the planes from input ``at``."""
        a_planes, b_planes = (planes[at : at + len(block_JNB)] for planes in self._planes)
        fill_a(self._job.a_key, self._job.map_index, first_coord, a_planes.numpy())
        split_packed(block_JNB, b_planes)

    def accumulate(self, first_input: int, count: int) -> None:
        """Add the products of the staged inputs to the sums."""
        for half, part in enumerate(self._job.parts):
            for first in range(0, self._job.num_outputs, TILE_ROWS):
                stop = min(self._job.num_outputs, first + TILE_ROWS)
                products = self._products(half, first, stop, first_input, count)
                add_products(products, part.shift, self._sums[half, first:stop])

    def answers(self, pieces: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """The groups (first, count) of each piece."""
        job = self._job
        for first, count in pieces:
            answer = torch.empty((count, *job.group_shape), dtype=torch.uint8)
            for lo, hi in job.tiles(count, TILE_ROWS):
                rows = job.rows_of(first + lo, first + hi)
                for half, part in enumerate(job.parts):
                    if job.keeps_inputs:
                        products = self._products(half, *rows, 0, job.capacity)
                        shift = part.shift
                    else:
                        products = self._sums[half, rows[0] : rows[1]].unsqueeze(1)
                        shift = 0
                    round_products(products, shift, job.pack, job.params, answer, lo, half)
            yield first, answer

    def _products(
        self, half: int, first_row: int, stop_row: int, first_input: int, count: int
    ) -> Tensor:
        """W[rows] times the first ``count`` staged inputs of one half: int32 (R, D, N) view."""
        planes = self._planes[half]
        _, num_planes, degree = planes.shape
        weight = self._job.weight[first_row:stop_row, first_input : first_input + count]
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        stacked = planes[:count].view(count, num_planes * degree)
        out = scratch_int32(stop_row - first_row, num_planes * degree)
        return int8_matmul(weight, stacked, out=out).view(-1, num_planes, degree)
