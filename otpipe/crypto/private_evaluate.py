"""Server side of the preprocessing for private weights: answers that tell c (W r) - s only.

For every answer, with fresh u ternary, e_1 an error polynomial, f flooding and s masks,

    A = sum_u X^(u v T) c_i sum_j W_ij X^(-w T) a_J  +  u a_0 + e_1
    B = sum_u X^(u v T) c_i sum_j W_ij X^(-w T) b_J  +  u b_0 + f - Delta s,

both rounded: the products are ring GEMMs modulo 2^128 on digit planes of X^(-w T) a_J and
X^(-w T) b_J (Bae, Cheon, Hanrot, Park, Stehle, CRYPTO 2024); (u a_0 + e_1, u b_0 + f) is an
encryption of zero under the client's public key (Lyubashevsky, Peikert, Regev, EUROCRYPT 2010; Fan,
Vercauteren, ePrint 2012/144, section 3) whose second error is flooded, Gentry's way to circuit
privacy (A fully homomorphic encryption scheme, thesis, 2009). Without it A = sum W_ij a_J would
give W by linear algebra. The argument: docs/private_preprocessing.md and ``private_noise``.

Weights, multipliers, masks and everything drawn here are secret. Nothing that leaves, and no size
or order of it, depends on them except through A and B.

Two plans bound the memory (``PrivateEvaluator.peak_bytes``): few inputs stay as digit planes and
answers are made tile by tile; many are consumed by stages into 128-bit sums of all answers.

Shape suffixes: m outputs, n inputs, J polynomials of a block, N ring degree, G answers, g outputs
of one answer, T slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from otpipe.crypto.block_order import BlockOrder
from otpipe.crypto.private_backend import Backend
from otpipe.crypto.private_cpu import CompiledBackend
from otpipe.crypto.private_params import MAX_MULTIPLIER, PrivatePacking
from otpipe.crypto.private_secrets import MaskStream
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.rlwe import fill_a
from otpipe.kernels.ring_gemm import MAX_EXACT_INNER

#: input coordinates consumed at once when sums of all answers are kept
STAGE_INPUTS = {"cpu": 1024, "cuda": 4096}
_PARTS = 2  # A and B
_COEFFICIENT_BYTES = 16


class PrivateEvaluator:
    """Answers of one map to one batch of encrypted pads. Not thread-safe; one exchange.

    Args:
        weight: (m, n) int8 on the device that computes, any strides (not copied).
        multipliers: (m,) int64 c on the same device, 0 to ``MAX_MULTIPLIER``.
        packing: how slots, inputs and outputs share polynomials.
        map_index: which map, as the client used it.
        a_key: 32 bytes that the client chose for this attempt.
        masks: s of this exchange; spent here.

    Raises:
        MaskReused: the masks hid another exchange before.
    """

    def __init__(
        self,
        weight: Tensor,
        multipliers: Tensor,
        packing: PrivatePacking,
        map_index: int,
        a_key: bytes,
        masks: MaskStream,
    ) -> None:
        m, n = weight.shape
        if multipliers.shape != (m,) or multipliers.dtype != torch.int64:
            raise TypeError(
                f"Multipliers are int64 ({m},), got {multipliers.dtype} {tuple(multipliers.shape)}."
            )
        if bool(((multipliers < 0) | (multipliers > MAX_MULTIPLIER)).any()):
            raise ValueError(f"Channel multipliers must lie between 0 and {MAX_MULTIPLIER}.")
        params = packing.params
        if (masks.num_outputs, masks.bits) != (m, params.log2_p):
            raise ValueError(
                f"Masks of {masks.num_outputs} outputs mod 2^{masks.bits} came for {m} outputs mod "
                f"2^{params.log2_p}."
            )
        masks.spend()
        self.packing = packing
        self._params = params
        self._weight, self._multipliers, self._masks = weight, multipliers, masks
        self._m, self._n = m, n
        self._map_index, self._a_key = map_index, a_key
        self._backend = _backend(packing, weight.device)
        self._keep_inputs = _keeps_inputs(m, n, packing, weight.device.type)
        self._capacity = _capacity(m, n, packing, weight.device.type)
        self._planes = [self._backend.new_planes(self._capacity) for _ in range(_PARTS)]
        self._sums: Tensor | None = None
        if not self._keep_inputs:
            self._sums = self._backend.new_sums(packing.num_answers(m))
        self._order = BlockOrder(
            packing.num_polynomials(n), params.ring_degree, params.upload_bytes, "polynomial"
        )
        self._public = torch.empty(0, dtype=torch.int8)  # digits of a block, kept for the next
        self._staged = 0  # rows of the planes in use
        self._consumed = 0  # inputs that were accumulated before those

    @staticmethod
    def peak_bytes(m: int, n: int, packing: PrivatePacking, device: str) -> int:
        """Most memory beyond the weight: planes, sums, and the temporaries of one tile.

        planes: 32 N bytes per input kept; sums: 32 N bytes per answer, of all answers or of one
        tile; temporaries: as the backend says.
        """
        polynomial = _PARTS * _COEFFICIENT_BYTES * packing.params.ring_degree
        backend = TorchBackend if device == "cuda" else CompiledBackend
        tile = min(packing.num_answers(m), backend.tile_answers(packing))
        sums = tile if _keeps_inputs(m, n, packing, device) else packing.num_answers(m)
        planes = _capacity(m, n, packing, device)
        return polynomial * (planes + sums) + backend.tile_bytes(packing)

    def add_block(self, first: int, block: Tensor) -> None:
        """Take polynomials first, first + 1, ...; number 0 is the key.

        block: uint8 (J, N, 16), on the CPU or the weight's device.

        Raises:
            ProtocolError: the block is not the next one, or has another shape.
        """
        self._order.check(first, block)
        if first == 0:
            self._backend.set_key(self._expand(0, 1), block[:1])
            self._order.received, block = 1, block[1:]
        inputs = self.packing.inputs
        while len(block):
            room = min(len(block), (self._capacity - self._staged) // inputs)
            received = self._order.received
            public = self._expand(received, room)
            self._backend.stage_digits(public, self._planes[0], self._staged)
            self._backend.stage_bytes(block[:room], self._planes[1], self._staged)
            self._order.received += room
            self._staged += room * inputs
            block = block[room:]
            if self._sums is not None and self._staged == self._capacity:
                self._consume(self._sums)

    def answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """Answers in order, at most ``max_bytes`` (or one) at a time.

        Yields (first_answer, uint8 CPU tensor (G, answer_bytes)); answer i holds outputs i * g to
        i * g + g - 1, those beyond m being zero. The memory is freed at the end.

        Raises:
            ProtocolError: inputs are missing, or the answers were already taken.
        """
        self._order.start_answers()
        if self._sums is not None and self._staged:
            self._consume(self._sums)
        return self._answers(max_bytes)

    def _answers(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        packing, backend = self.packing, self._backend
        num_answers = packing.num_answers(self._m)
        step = max(1, max_bytes // packing.answer_bytes)
        tile = backend.tile_answers(packing)
        for first in range(0, num_answers, step):
            stop = min(num_answers, first + step)
            pieces = []
            for lo in range(first, stop, tile):
                hi = min(stop, lo + tile)
                if self._sums is None:
                    sums = backend.new_sums(hi - lo)
                    self._accumulate(lo, hi, sums)
                else:
                    sums = self._sums[lo:hi]
                pieces.append(backend.finish(sums, lo, self._masks))
            yield first, torch.cat(pieces)
        self._planes, self._sums, self._public = [], None, self._public[:0]

    def _expand(self, first: int, count: int) -> Tensor:
        """Public polynomials, int8 (J, D, N), valid until the next ones."""
        if len(self._public) < count:
            self._public = self._backend.new_public(count)
        fill_a(self._a_key, self._map_index, first, self._public[:count].numpy())
        return self._public[:count]

    def _consume(self, sums: Tensor) -> None:
        """Add the staged inputs to the sums of all answers."""
        num_answers, tile = len(sums), self._backend.tile_answers(self.packing)
        for lo in range(0, num_answers, tile):
            hi = min(num_answers, lo + tile)
            self._accumulate(lo, hi, sums[lo:hi])
        self._consumed += self._staged
        self._staged = 0

    def _accumulate(self, first_answer: int, stop_answer: int, sums: Tensor) -> None:
        """sums (G, parts, limbs, N) += outputs of these answers over the staged inputs."""
        outputs = self.packing.outputs
        lo, hi = first_answer * outputs, min(self._m, stop_answer * outputs)
        # The last polynomial may have room for inputs that the map does not have.
        stop = min(self._n, self._consumed + self._staged)
        weight = self._weight[lo:hi, self._consumed : stop]
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        for part in range(_PARTS):
            self._backend.accumulate(
                weight, self._multipliers[lo:hi], self._planes[part], sums, part
            )


def _backend(packing: PrivatePacking, device: torch.device) -> Backend:
    return CompiledBackend(packing) if device.type == "cpu" else TorchBackend(packing, device)


def _keeps_inputs(m: int, n: int, packing: PrivatePacking, device: str) -> bool:
    """Whether planes of all inputs take no more than a stage of them and sums of all answers."""
    return n <= min(packing.num_answers(m) + STAGE_INPUTS[device], MAX_EXACT_INNER)


def _capacity(m: int, n: int, packing: PrivatePacking, device: str) -> int:
    """Inputs that the planes hold: whole polynomials."""
    held = n if _keeps_inputs(m, n, packing, device) else min(n, STAGE_INPUTS[device])
    return -(-held // packing.inputs) * packing.inputs
