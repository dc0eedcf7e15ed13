"""CUDA's part in ``PrivateEvaluator``: large int8 products and elementwise torch operations.

Shape suffixes: J polynomials of a block, N ring degree, M = N/2, R outputs, G answers, g outputs of
one answer, T slots, D = 16 digits. A leading 2 is the limb axis.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto import negacyclic_wide, private_secrets
from otpipe.crypto.private_backend import QUARTERS
from otpipe.crypto.private_params import FLOOD_WORDS, PrivatePacking
from otpipe.crypto.private_secrets import AnswerSecrets, MaskStream
from otpipe.kernels import wide
from otpipe.kernels.cpu import Array
from otpipe.kernels.packing import pack_uints
from otpipe.kernels.ring_gemm import int8_matmul

#: outputs of one product: bounds the temporary memory
_ROWS = 512
#: answers that are hidden at once
_ANSWERS = 256


class TorchBackend:
    """``Backend`` for a weight on any device."""

    def __init__(self, packing: PrivatePacking, device: torch.device) -> None:
        params = packing.params
        self._packing, self._params, self._device = packing, params, device
        self._degree = params.ring_degree
        self._limbs = negacyclic_wide.limbs(params.log2_q, self._degree)
        self._key = torch.empty(0)
        self._held: list[Tensor] = []

    @staticmethod
    def tile_answers(packing: PrivatePacking) -> int:
        return max(1, _ROWS // packing.outputs)

    @staticmethod
    def tile_bytes(packing: PrivatePacking) -> int:
        """Products and 128-bit sums of one tile, with as much again for operands of an addition."""
        degree = packing.params.ring_degree
        rows = _ROWS * degree * (wide.QUARTER_DIGITS * 4 + 4 * 16)
        transforms = _ANSWERS * degree // 2 * 16 * 8
        return rows + transforms

    def new_planes(self, inputs: int) -> Tensor:
        stride = -(-inputs // 16) * 16  # rows of int8 operands start on 16 bytes
        return torch.empty(
            (wide.NUM_DIGITS, self._degree, stride), dtype=torch.int8, device=self._device
        )

    def new_public(self, count: int) -> Tensor:
        shape = (count, wide.NUM_DIGITS, self._degree)
        return torch.empty(shape, dtype=torch.int8, pin_memory=self._device.type == "cuda")

    def new_sums(self, num_answers: int) -> Tensor:
        shape = (num_answers, 2, 2, self._degree)
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def set_key(self, public_digits: Tensor, packed: Tensor) -> None:
        public = wide.from_digits(public_digits.to(self._device))
        uploaded = wide.from_bytes(packed.to(self._device))
        values = torch.cat([public, uploaded], 1)
        self._key = negacyclic_wide.limb_spectra_torch(values, *self._limbs)

    def stage_digits(self, digits_JDN: Tensor, planes: Tensor, first_row: int) -> None:
        self._stage(wide.from_digits(digits_JDN.to(self._device)), planes, first_row)

    def stage_bytes(self, packed_JNB: Tensor, planes: Tensor, first_row: int) -> None:
        self._stage(wide.from_bytes(packed_JNB.to(self._device)), planes, first_row)

    def _stage(self, values_JN: Tensor, planes: Tensor, first_row: int) -> None:
        turns, degree = self._packing.inputs, self._degree
        stop = first_row + values_JN.shape[1] * turns
        for turn in range(turns):
            back = turn * self._packing.num_slots
            moved = values_JN
            if back:  # X^(-s) = -X^(N - s)
                moved = wide.negated(wide.times_power(values_JN, degree - back))
            digits_DJN = wide.to_digits(moved)
            planes[:, :, first_row + turn : stop : turns] = digits_DJN.transpose(1, 2)

    def accumulate(
        self, weight_Rn: Tensor, multipliers_R: Tensor, planes: Tensor, sums: Tensor, part: int
    ) -> None:
        used, packing, degree = weight_Rn.shape[1], self._packing, self._degree
        for lo in range(0, len(weight_Rn), _ROWS):
            weight = weight_Rn[lo : lo + _ROWS]
            rows = torch.zeros((2, len(weight), degree), dtype=torch.int64, device=self._device)
            for quarter in range(QUARTERS):
                digits = planes[wide.QUARTER_DIGITS * quarter :][: wide.QUARTER_DIGITS]
                operand = digits.view(wide.QUARTER_DIGITS * degree, -1)[:, :used]
                products = int8_matmul(weight, operand.t()).view(len(weight), -1, degree)
                wide.add_quarter_torch(products, multipliers_R[lo : lo + _ROWS], quarter, rows)
            target = sums[:, part].transpose(0, 1)
            wide.add_groups_torch(rows, lo, packing.outputs, packing.stride, target)

    def finish(self, sums: Tensor, first_answer: int, masks: MaskStream) -> Tensor:
        out = torch.empty((len(sums), self._packing.answer_bytes), dtype=torch.uint8)
        for lo in range(0, len(sums), _ANSWERS):
            first, second = self.hidden(sums[lo : lo + _ANSWERS], first_answer + lo, masks)
            out[lo : lo + _ANSWERS].copy_(self.rounded(first, second))
        return out

    def hidden(self, sums: Tensor, first_answer: int, masks: MaskStream) -> tuple[Tensor, Tensor]:
        """A and B before they are rounded: int64 (2, G, N) and, its useful part, (2, G, g, T)."""
        packing, params = self._packing, self._params
        count = len(sums)
        secrets, tiles = self._room(count)
        private_secrets.draw_secrets(packing, secrets)
        masks.tiles(first_answer, packing, tiles)
        ternary_GM = negacyclic_wide.spectrum_torch(self._move(secrets.ternary))
        first, second = (
            negacyclic_wide.product_torch(self._key[part], ternary_GM, self._limbs[1])
            for part in range(2)
        )
        wide.add_(first, sums[:, 0].transpose(0, 1))
        wide.add_(first, wide.from_signed(self._move(secrets.error).long()))
        wide.add_(second, sums[:, 1].transpose(0, 1))
        useful = second.view(2, count, packing.outputs, packing.stride)
        useful = useful[..., : packing.num_slots].contiguous()
        words = self._move(secrets.flood).view(count, FLOOD_WORDS, *useful.shape[2:])
        flood = wide.from_signed(words[:, 0])
        for i in range(1, FLOOD_WORDS):
            wide.add_(flood, wide.from_signed(words[:, i]))
        wide.add_(useful, wide.shifted_left(flood, params.flood_shift))
        useful[1] -= self._move(tiles) << (params.delta_shift - 64)
        return first, useful

    def rounded(self, first: Tensor, second: Tensor) -> Tensor:
        """The bytes of answers: uint8 (G, answer_bytes)."""
        params, count = self._params, first.shape[1]
        high = wide.rounded_down(first, params.log2_q - params.first_bits)
        low = wide.rounded_down(second, params.log2_q - params.second_bits)
        parts = [pack_uints(high, params.first_bytes), pack_uints(low, params.second_bytes)]
        return torch.cat([part.reshape(count, -1) for part in parts], 1)

    def _room(self, count: int) -> tuple[AnswerSecrets, Array]:
        """Host memory for secrets and masks of ``count`` answers, pinned for CUDA and kept."""
        if not self._held:
            secrets = private_secrets.empty_secrets(_ANSWERS, self._packing)
            shape = (_ANSWERS, self._packing.outputs, self._packing.num_slots)
            for array in (*secrets, np.empty(shape, np.int64)):
                held = torch.from_numpy(array)
                self._held.append(held.pin_memory() if self._device.type == "cuda" else held)
        *secrets_held, masks_held = (held[:count].numpy() for held in self._held)
        return AnswerSecrets(*secrets_held), masks_held

    def _move(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)
