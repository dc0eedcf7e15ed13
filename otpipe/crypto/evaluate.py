"""Server side of the preprocessing: sum_j W_ij (a_j, b_j) for every output i, packed and rounded.

Both sums are ring GEMMs with the int8 weights (Bae, Cheon, Hanrot, Park, Stehle, CRYPTO 2024): no
NTT, no keys. The a_j arrive as a seed and expand directly to digit planes; the b_j are split into
digits once. Nothing here is secret.

Two plans bound the memory (``LinearEvaluator.peak_bytes``):

- n <= m: keep the digit planes of all inputs, produce outputs by tiles of rows;
- n > m: keep 64-bit sums of all outputs, consume inputs by stages of ``STAGE_INPUTS``.

Shape suffixes: m outputs, n inputs, J inputs of a block, N ring degree, T slots, G groups (answer
ciphertexts), g = N / T outputs per group, D digit planes, R rows (outputs) of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numba as nb
import numpy as np
import torch
from torch import Tensor

from otpipe.crypto.params import RlweParams
from otpipe.crypto.rlwe import expand_a, fill_a
from otpipe.errors import ProtocolError
from otpipe.kernels.cpu import (
    Array,
    kernel,
    on_team,
    pack_words,
    parallel_for,
    team_kernel,
    unpack_words,
)
from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.kernels.ring_gemm import (
    MAX_EXACT_INNER,
    digit_planes_torch,
    int8_matmul,
    scratch_int32,
)

#: inputs consumed at once when outputs are accumulated
STAGE_INPUTS = 2048
#: outputs of one product: large enough for the int8 units, small enough for the caches (CPU) and
#: for temporary memory (CUDA)
_TILE_ROWS = {"cpu": 384, "cuda": 2048}


@dataclass(frozen=True)
class _Part:
    """One half of a ciphertext: digit planes kept, and the bits its digits are shifted up."""

    num_planes: int
    shift: int


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
        self.params = params
        self.pack = params.pack_factor(num_slots)
        self._weight = weight
        self._map_index, self._a_key = map_index, a_key
        self._upload_bytes = upload_bytes
        self._m, self._n = weight.shape
        self._parts = (
            _Part(params.num_planes, 0),
            _Part(upload_bytes, params.dropped_upload_bits(upload_bytes)),
        )
        self._keep_inputs = _keeps_inputs(self._m, self._n)
        self._capacity = self._n if self._keep_inputs else min(self._n, STAGE_INPUTS)
        self._planes = [self._new_planes(part.num_planes) for part in self._parts]
        self._sums: Tensor | None = None
        if not self._keep_inputs:
            self._sums = torch.zeros(
                (2, self._m, params.ring_degree), dtype=torch.int64, device=weight.device
            )
        self._staged = 0  # inputs in the planes
        self._received = 0  # inputs in all
        self._answered = False

    @staticmethod
    def peak_bytes(m: int, n: int, params: RlweParams, upload_bytes: int, device: str) -> int:
        """Most memory beyond the weight: planes, sums and the temporaries of one tile.

        planes: min(n, stage) * N * (D_a + upload_bytes); sums (n > m only): 2 m N * 8;
        tile: rows * N * (4 bytes a plane of int32 products, and on CUDA 3 int64 temporaries).
        """
        degree, most_planes = params.ring_degree, max(params.num_planes, upload_bytes)
        keep = _keeps_inputs(m, n)
        planes = (n if keep else min(n, STAGE_INPUTS)) * degree * (params.num_planes + upload_bytes)
        sums = 0 if keep else 2 * m * degree * 8
        rows = min(m, _TILE_ROWS[device])
        return planes + sums + rows * degree * (4 * most_planes + (24 if device == "cuda" else 0))

    def add_block(self, first_coord: int, block: Tensor) -> None:
        """Take encryptions of inputs first_coord .. first_coord + J - 1.

        block: uint8 (J, N, upload_bytes), on the CPU or the weight's device.

        Raises:
            ProtocolError: the block is not the next one, or has another shape.
        """
        degree = self.params.ring_degree
        count = block.shape[0] if block.dim() == 3 else 0
        if (
            block.dtype != torch.uint8
            or tuple(block.shape) != (count, degree, self._upload_bytes)
            or not 1 <= count <= self._n - self._received
        ):
            raise ProtocolError(
                f"A block of shape {tuple(block.shape)} ({block.dtype}) arrived; expected uint8 "
                f"(1 to {self._n - self._received}, {degree}, {self._upload_bytes})."
            )
        if first_coord != self._received or self._answered:
            raise ProtocolError(
                f"Block {first_coord} arrived out of order; coordinate {self._received} is next."
            )
        while count:
            room = min(count, self._capacity - self._staged)
            self._stage(self._received, block[:room])
            block = block[room:]
            count -= room
            if self._sums is not None and self._staged == self._capacity:
                self._accumulate(self._sums)

    def answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """Packed, rounded answers in order, at most ``max_bytes`` (or one group) at a time.

        Yields (first_group, uint8 CPU tensor (G, 2, N, answer_bytes)); group i holds outputs
        i * g .. i * g + g - 1, those beyond m being zero. The memory is freed at the end.

        Raises:
            ProtocolError: inputs are missing, or the answers were already taken.
        """
        if self._received != self._n or self._answered:
            raise ProtocolError(
                f"Answers were asked for after {self._received} of {self._n} inputs"
                f"{', a second time' if self._answered else ''}; send the inputs once, then ask."
            )
        self._answered = True
        if self._sums is not None and self._staged:
            self._accumulate(self._sums)
        return self._answers(max_bytes)

    def _answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        degree, num_bytes = self.params.ring_degree, self.params.answer_bytes
        num_groups = -(-self._m // self.pack)
        step = max(1, max_bytes // (2 * degree * num_bytes))
        tile_groups = max(1, _TILE_ROWS[self._weight.device.type] // self.pack)
        for first in range(0, num_groups, step):
            count = min(step, num_groups - first)
            answer = torch.empty((count, 2, degree, num_bytes), dtype=torch.uint8)
            num_tiles = -(-count // tile_groups)
            for tile in range(num_tiles):
                lo, hi = count * tile // num_tiles, count * (tile + 1) // num_tiles
                for half in (0, 1):
                    self._answer_groups(first + lo, hi - lo, half, answer, lo)
            yield first, answer
        self._planes, self._sums = [], None

    # --- inputs to digit planes ---

    def _new_planes(self, num_planes: int) -> Tensor:
        """CPU: (inputs, D, N). CUDA: (D, N, inputs), the layout its int8 units want."""
        degree, device = self.params.ring_degree, self._weight.device
        if device.type == "cpu":
            return torch.empty((self._capacity, num_planes, degree), dtype=torch.int8)
        stride = -(-self._capacity // 16) * 16  # rows of int8 operands start on 16 bytes
        return torch.empty((num_planes, degree, stride), dtype=torch.int8, device=device)

    def _stage(self, first_coord: int, block_JNB: Tensor) -> None:
        start, count = self._staged, block_JNB.shape[0]
        stop = start + count
        a_planes, b_planes = self._planes
        if self._weight.device.type == "cpu":
            fill_a(self._a_key, self._map_index, first_coord, a_planes[start:stop].numpy())
            split_packed(block_JNB, b_planes[start:stop])
        else:
            a = expand_a(self._a_key, self._map_index, first_coord, count, self.params)
            a_planes[:, :, start:stop] = (
                torch.from_numpy(a).to(self._weight.device).permute(1, 2, 0)
            )
            block = block_JNB.to(self._weight.device)
            b_planes[:, :, start:stop] = split_packed_torch(block).permute(1, 2, 0)
        self._staged = stop
        self._received += count

    # --- products ---

    def _products(self, half: int, first_row: int, stop_row: int) -> Tensor:
        """W[rows] times all staged digit planes of one half: int32 (R, D, N) view."""
        planes, used = self._planes[half], self._staged
        first_input = self._received - used
        weight = self._weight[first_row:stop_row, first_input : self._received]
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        num_rows, degree = stop_row - first_row, self.params.ring_degree
        num_planes = self._parts[half].num_planes
        if self._weight.device.type == "cpu":
            stacked = planes[:used].view(used, num_planes * degree)
            out = scratch_int32(num_rows, num_planes * degree)
            product = int8_matmul(weight, stacked, out=out)
        else:
            stacked = planes.view(num_planes * degree, -1)[:, :used]
            product = int8_matmul(weight, stacked.t())
        return product.view(num_rows, num_planes, degree)

    def _accumulate(self, sums: Tensor) -> None:
        step = _TILE_ROWS[self._weight.device.type]
        for half, part in enumerate(self._parts):
            for first in range(0, self._m, step):
                stop = min(self._m, first + step)
                products = self._products(half, first, stop)
                add_products(products, part.shift, sums[half, first:stop])
        self._staged = 0

    def _answer_groups(
        self, first_group: int, count: int, half: int, answer: Tensor, at: int
    ) -> None:
        """Write ``count`` groups of one half into ``answer`` (G, 2, N, B) from group ``at``."""
        first = first_group * self.pack
        stop = min(self._m, first + count * self.pack)
        on_cpu, shift = self._weight.device.type == "cpu", self._parts[half].shift
        if self._sums is not None:
            sums = self._sums[half, first:stop]
            if on_cpu:
                round_products(sums.unsqueeze(1), 0, self.pack, self.params, answer, at, half)
                return
        else:
            products = self._products(half, first, stop)
            if on_cpu:
                round_products(products, shift, self.pack, self.params, answer, at, half)
                return
            sums = products.new_zeros((stop - first, products.shape[2]), dtype=torch.int64)
            add_products(products, shift, sums)
        answer[at : at + count, half] = round_sums_torch(sums, self.pack, self.params).cpu()


def _keeps_inputs(m: int, n: int) -> bool:
    return n <= min(m, MAX_EXACT_INNER)


# --- elementwise passes: compiled for the CPU, torch twins for CUDA ---


def split_packed(block_JNB: Tensor, out_JDN: Tensor) -> None:
    """Signed base-256 digits of packed integers (J, N, B) uint8 into (J, B, N) int8; CPU."""
    num_bytes = block_JNB.shape[2]
    flat = block_JNB.contiguous().view(block_JNB.shape[0], -1).numpy()
    if flat.ctypes.data % 8:
        flat = flat.copy()
    words, target = flat.view(np.uint64), out_JDN.numpy()
    bias = int.from_bytes(b"\x80" * num_bytes, "little")
    parallel_for(lambda lo, hi: _split_words(words, num_bytes, bias, target, lo, hi), len(words), 8)


def split_packed_torch(block_JNB: Tensor) -> Tensor:
    """``split_packed`` in plain torch, on any device: (J, B, N) int8."""
    num_bytes = block_JNB.shape[2]
    return digit_planes_torch(unpack_uints(block_JNB), 8 * num_bytes).transpose(0, 1)


@kernel
def _split_words(words: Array, num_bytes: int, bias: int, out_JDN: Array, lo: int, hi: int) -> None:
    values = np.empty(out_JDN.shape[2], np.int64)
    for j in range(lo, hi):
        unpack_words(words[j], num_bytes, values)
        for i in range(num_bytes):
            row = out_JDN[j, i]
            for k in range(values.shape[0]):
                row[k] = np.int8(((values[k] + bias) >> np.int64(8 * i)) ^ np.int64(0x80))


def add_products(products_RDN: Tensor, shift: int, sums_RN: Tensor) -> None:
    """sums += sum_i products[:, i] << (8 i + shift), mod 2^64."""
    if products_RDN.is_cuda:
        add_products_torch(products_RDN, shift, sums_RN)
        return
    on_team(_add_products, products_RDN.numpy(), shift, sums_RN.numpy())


def add_products_torch(products_RDN: Tensor, shift: int, sums_RN: Tensor) -> None:
    """``add_products`` in plain torch, on any device."""
    for i in range(products_RDN.shape[1]):
        sums_RN.add_(products_RDN[:, i], alpha=1 << (8 * i + shift))


@team_kernel
def _add_products(products: Array, shift: int, sums: Array) -> None:
    for r in nb.prange(products.shape[0]):
        total = sums[r]
        for i in range(products.shape[1]):
            row, up = products[r, i], np.int64(8 * i + shift)
            for k in range(total.shape[0]):
                total[k] += np.int64(row[k]) << up


def round_products(
    products_RDN: Tensor,
    shift: int,
    pack: int,
    params: RlweParams,
    answer: Tensor,
    first_group: int,
    half: int,
) -> None:
    """Combine digit products, pack groups of ``pack`` outputs, round and write bytes; CPU.

    products: int32 or int64 (R, D, N), the digits of R outputs; a last group may be partly filled.
    Writes ceil(R / pack) groups of ``answer``, uint8 (G, 2, N, answer_bytes), from ``first_group``.
    """
    words = answer.view(*answer.shape[:2], -1).numpy().view(np.uint64)
    on_team(
        _round_products,
        products_RDN.numpy(),
        shift,
        pack,
        params.log2_q - params.answer_bits,
        params.answer_bytes,
        words,
        first_group,
        half,
    )


@team_kernel
def _round_products(
    products: Array,
    shift: int,
    pack: int,
    dropped: int,
    num_bytes: int,
    words: Array,
    first_group: int,
    half: int,
) -> None:
    num_rows, degree = products.shape[0], products.shape[2]
    slots = degree // pack
    one_half = np.int64(1) << np.int64(dropped - 1)
    for group in nb.prange((num_rows + pack - 1) // pack):
        total = np.zeros(degree, np.int64)
        first_row = group * pack
        for r in range(first_row, min(first_row + pack, num_rows)):
            # Times X^start: the coefficients that pass X^N come back negated.
            start = (r - first_row) * slots
            upper, lower = total[start:], total[:start]
            for i in range(products.shape[1]):
                up = np.int64(8 * i + shift)
                stay, wrap = products[r, i, : degree - start], products[r, i, degree - start :]
                for k in range(stay.shape[0]):
                    upper[k] += np.int64(stay[k]) << up
                for k in range(wrap.shape[0]):
                    lower[k] -= np.int64(wrap[k]) << up
        for k in range(degree):
            total[k] = (total[k] + one_half) >> np.int64(dropped)
        pack_words(total, num_bytes, words[first_group + group, half])


def round_sums_torch(sums_RN: Tensor, pack: int, params: RlweParams) -> Tensor:
    """Pack and round sums mod 2^64, in plain torch, on any device.

    sums: int64 (R, N). Returns uint8 (ceil(R / pack), N, answer_bytes).
    """
    degree = params.ring_degree
    slots, dropped = degree // pack, params.log2_q - params.answer_bits
    missing = -len(sums_RN) % pack
    if missing:
        sums_RN = torch.nn.functional.pad(sums_RN, (0, 0, 0, missing))
    sums_GgN = sums_RN.view(-1, pack, degree)
    total = sums_GgN[:, 0].clone()
    for u in range(1, pack):
        start = u * slots
        total[:, start:] += sums_GgN[:, u, : degree - start]
        total[:, :start] -= sums_GgN[:, u, degree - start :]
    total = (total + (1 << (dropped - 1))) >> dropped
    return pack_uints(total, params.answer_bytes)
