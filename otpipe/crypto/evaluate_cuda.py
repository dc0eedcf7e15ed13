"""The products of an evaluation on CUDA, with copies and expansion kept out of the GPU's way.

Digit planes are (D, N, inputs), the layout that int8 matrix units take as their second operand.

Whoever calls waits for as little as possible, since all exchanges of a device take turns. Blocks
come in over a copy stream of their own, so that a copy never stands behind products. The public
polynomials of the next block are expanded by a thread meanwhile. Answers are computed and copied to
pinned memory one piece ahead of the one that is asked for. All of it stays out of the default
stream, on which clients wait for their tokens.

Shape suffixes: J inputs of a block, N ring degree, B bytes, D digit planes, R rows (outputs) of a
tile, G groups (answer ciphertexts).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from otpipe.crypto.ciphertext_ops import add_products_torch, round_sums_torch, split_packed_torch
from otpipe.crypto.evaluate_job import EvaluationJob
from otpipe.crypto.rlwe import fill_a
from otpipe.kernels.cpu import in_this_thread
from otpipe.kernels.ring_gemm import int8_matmul

#: outputs of one product: enough for the int8 units, and not too much temporary memory
TILE_ROWS = 2048
_EXPANDING_THREADS = min(4, os.cpu_count() or 1)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies to the device, and for everything else."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@functools.cache
def _expanders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_EXPANDING_THREADS, thread_name_prefix="otpipe-expand")


class CudaTiles:
    """What ``evaluate.CpuTiles`` is, for a weight on CUDA."""

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        device, degree = job.weight.device, job.params.ring_degree
        self._copies, self._work = _streams(device)
        self._expanded = _Expanded(job)
        stride = -(-job.capacity // 16) * 16  # rows of int8 operands start on 16 bytes
        with torch.cuda.stream(self._work):
            self._planes = [
                torch.empty((part.num_planes, degree, stride), dtype=torch.int8, device=device)
                for part in job.parts
            ]
            shape = (2, 0 if job.keeps_inputs else job.num_outputs, degree)
            self._sums = torch.zeros(shape, dtype=torch.int64, device=device)

    def stage(self, first_coord: int, at: int, block_JNB: Tensor) -> None:
        """Digits of the next inputs, into the planes from input ``at``."""
        stop = at + len(block_JNB)
        expanded = self._expanded.take(first_coord, len(block_JNB))
        with torch.cuda.stream(self._copies):
            a = expanded.to(self._job.weight.device, non_blocking=True)
            b = block_JNB.to(self._job.weight.device, non_blocking=True)
            # The caller's buffer, and that of the expansion, are filled again after this.
            self._copies.synchronize()
        a.record_stream(self._work)
        b.record_stream(self._work)
        self._expanded.prepare(first_coord + len(block_JNB), len(block_JNB))
        with torch.cuda.stream(self._work):
            a_planes, b_planes = self._planes
            a_planes[:, :, at:stop] = a.permute(1, 2, 0)
            b_planes[:, :, at:stop] = split_packed_torch(b).permute(1, 2, 0)

    def accumulate(self, first_input: int, count: int) -> None:
        """Add the products of the staged inputs to the sums."""
        with torch.cuda.stream(self._work):
            for half, part in enumerate(self._job.parts):
                for first in range(0, self._job.num_outputs, TILE_ROWS):
                    stop = min(self._job.num_outputs, first + TILE_ROWS)
                    products = self._products(half, first, stop, first_input, count)
                    add_products_torch(products, part.shift, self._sums[half, first:stop])

    def answers(self, pieces: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """The groups (first, count) of each piece; a piece is overwritten by the next but one."""
        most = max(count for _, count in pieces)
        shape = (most, *self._job.group_shape)
        buffers = [
            torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            for _ in range(min(2, len(pieces)))
        ]
        done = self._compute(*pieces[0], buffers[0])
        for i, (first, count) in enumerate(pieces):
            ready = done
            if i + 1 < len(pieces):
                done = self._compute(*pieces[i + 1], buffers[(i + 1) % 2])
            ready.synchronize()
            yield first, buffers[i % 2][:count]

    def _compute(self, first: int, count: int, out_G2NB: Tensor) -> torch.cuda.Event:
        """Start the work on one piece; its bytes are in ``out`` after the event."""
        job, device = self._job, self._job.weight.device
        with torch.cuda.stream(self._work):
            answer = torch.empty((count, *job.group_shape), dtype=torch.uint8, device=device)
            for lo, hi in job.tiles(count, TILE_ROWS):
                rows = job.rows_of(first + lo, first + hi)
                for half, part in enumerate(job.parts):
                    sums = self._sums[half, rows[0] : rows[1]]
                    if job.keeps_inputs:
                        products = self._products(half, *rows, 0, job.capacity)
                        sums = sums.new_zeros((len(products), products.shape[2]))
                        add_products_torch(products, part.shift, sums)
                    answer[lo:hi, half] = round_sums_torch(sums, job.pack, job.params)
            out_G2NB[:count].copy_(answer, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._work)
        return done

    def _products(
        self, half: int, first_row: int, stop_row: int, first_input: int, count: int
    ) -> Tensor:
        """W[rows] times the first ``count`` staged inputs of one half: int32 (R, D, N) view."""
        planes = self._planes[half]
        num_planes, degree, stride = planes.shape
        weight = self._job.weight[first_row:stop_row, first_input : first_input + count]
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        stacked = planes.view(num_planes * degree, stride)[:, :count]
        return int8_matmul(weight, stacked.t()).view(-1, num_planes, degree)


class _Expanded:
    """Public polynomials in pinned memory, those of the next block ahead of time."""

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        self._buffer = torch.empty(0, dtype=torch.int8)
        self._ahead: tuple[int, int, Future[None]] | None = None

    def take(self, first_coord: int, count: int) -> Tensor:
        """int8 (J, D, N), valid until ``prepare``."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[2].result()
            if ahead[:2] == (first_coord, count):
                return self._rows(count)
        rows = self._rows(count)
        self._fill(first_coord, rows)
        return rows

    def prepare(self, first_coord: int, count: int) -> None:
        """Begin with the block that comes next if it is as long as the last."""
        count = min(count, self._job.weight.shape[1] - first_coord)
        if count > 0:
            future = _expanders().submit(self._fill, first_coord, self._rows(count))
            self._ahead = first_coord, count, future

    def _rows(self, count: int) -> Tensor:
        shape = (count, self._job.params.num_planes, self._job.params.ring_degree)
        size = shape[0] * shape[1] * shape[2]
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.int8, pin_memory=True)
        return self._buffer[:size].view(shape)

    def _fill(self, first_coord: int, rows_JDN: Tensor) -> None:
        with in_this_thread():
            fill_a(self._job.a_key, self._job.map_index, first_coord, rows_JDN.numpy())
