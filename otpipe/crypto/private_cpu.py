"""The CPU's part in ``PrivateEvaluator``: int8 products by torch, everything else compiled.

Shape suffixes: J polynomials of a block, N ring degree, M = N/2, R outputs, G answers, g outputs of
one answer, T slots, L limbs, D = 16 digits, C chunks of K = N / C coefficients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto import negacyclic, negacyclic_wide, private_secrets
from otpipe.crypto.private_backend import QUARTERS
from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import AnswerSecrets, MaskStream
from otpipe.kernels import wide
from otpipe.kernels.cpu import Array, kernel, pack_words, parallel_for
from otpipe.kernels.ring_gemm import int8_matmul, scratch_int32

#: outputs and coefficients of one product: small enough for the caches
_ROWS, _CHUNK = 512, 1024
#: answers whose secrets are drawn at once: enough that threads rarely meet in Python
_ANSWERS = 8


class CompiledBackend:
    """``Backend`` for a weight on the CPU."""

    def __init__(self, packing: PrivatePacking) -> None:
        params = packing.params
        self._packing, self._params = packing, params
        self._degree = params.ring_degree
        self._chunk = min(_CHUNK, self._degree)
        self._limbs = negacyclic_wide.limbs(params.log2_q, self._degree)
        self._twist = negacyclic.twist(self._degree)
        self._key = np.empty((0,), np.complex128)

    @staticmethod
    def tile_answers(packing: PrivatePacking) -> int:
        return max(1, _ROWS // packing.outputs)

    @staticmethod
    def tile_bytes(packing: PrivatePacking) -> int:
        """The int32 products of one chunk; each thread has about 4 MB more for its answers."""
        return _ROWS * min(_CHUNK, packing.params.ring_degree) * QUARTERS * 4

    def new_planes(self, inputs: int) -> Tensor:
        chunks = self._degree // self._chunk
        shape = (chunks, QUARTERS, inputs, wide.QUARTER_DIGITS, self._chunk)
        return torch.empty(shape, dtype=torch.int8)

    def new_public(self, count: int) -> Tensor:
        return torch.empty((count, wide.NUM_DIGITS, self._degree), dtype=torch.int8)

    def new_sums(self, num_answers: int) -> Tensor:
        return torch.zeros((num_answers, 2, 2, self._degree), dtype=torch.int64)

    def set_key(self, public_digits: Tensor, packed: Tensor) -> None:
        num_limbs, limb_bits = self._limbs
        words = np.stack([_words_of_digits(public_digits)[0], _words_of_bytes(packed)[0]])
        folded, parts = negacyclic_wide.buffer(2, num_limbs, self._degree)
        negacyclic_wide.fold_all(words.view(np.uint64), limb_bits, *self._twist, parts)
        self._key = np.fft.fft(folded)

    def stage_digits(self, digits_JDN: Tensor, planes: Tensor, first_row: int) -> None:
        self._stage(_words_of_digits(digits_JDN), planes, first_row)

    def stage_bytes(self, packed_JNB: Tensor, planes: Tensor, first_row: int) -> None:
        self._stage(_words_of_bytes(packed_JNB), planes, first_row)

    def _stage(self, words: Array, planes: Tensor, first_row: int) -> None:
        packing = self._packing
        wide.spread_digits(
            torch.from_numpy(words), packing.inputs, packing.num_slots, planes, first_row
        )

    def accumulate(
        self, weight_Rn: Tensor, multipliers_R: Tensor, planes: Tensor, sums: Tensor, part: int
    ) -> None:
        used, packing, chunk = weight_Rn.shape[1], self._packing, self._chunk
        columns = wide.QUARTER_DIGITS * chunk
        for index in range(len(planes)):
            for quarter in range(QUARTERS):
                operand = planes[index, quarter, :used].view(used, columns)
                for lo in range(0, len(weight_Rn), _ROWS):
                    weight = weight_Rn[lo : lo + _ROWS]
                    out = scratch_int32(len(weight), columns)
                    products = int8_matmul(weight, operand, out=out)
                    wide.add_quarter(
                        products.view(len(weight), wide.QUARTER_DIGITS, chunk),
                        multipliers_R[lo : lo + _ROWS],
                        lo,
                        packing.outputs,
                        packing.stride,
                        index * chunk,
                        quarter,
                        sums,
                        part,
                    )

    def finish(self, sums: Tensor, first_answer: int, masks: MaskStream) -> Tensor:
        packing = self._packing
        out = torch.empty((len(sums), packing.answer_bytes), dtype=torch.uint8)
        rows, total = out.numpy(), sums.numpy().view(np.uint64)

        def body(lo: int, hi: int) -> None:
            folded, parts = negacyclic_wide.buffer(2, self._limbs[0], self._degree)
            factor, factor_parts = negacyclic_wide.buffer(1, 1, self._degree)
            room = private_secrets.empty_secrets(_ANSWERS, packing)
            mask_room = np.empty((_ANSWERS, packing.outputs, packing.num_slots), np.int64)
            for start in range(lo, hi, _ANSWERS):
                count = min(hi - start, _ANSWERS)
                secrets, tiles = room.rows(0, count), mask_room[:count]
                private_secrets.draw_secrets(packing, secrets)
                masks.tiles(first_answer + start, packing, tiles)
                for i in range(count):
                    negacyclic_wide.fold_small(secrets.ternary[i], *self._twist, factor_parts[0, 0])
                    np.fft.fft(factor, out=factor)
                    np.multiply(self._key, factor, out=folded)
                    np.fft.ifft(folded, out=folded)
                    secret = secrets.row(i)
                    self._round(parts, total[start + i], secret, tiles[i], rows[start + i])

        parallel_for(body, len(rows), _ANSWERS)
        return out

    def _round(
        self, parts: Array, sums: Array, secret: AnswerSecrets, masks_gT: Array, row: Array
    ) -> None:
        """Write one answer, given u a_0 and u b_0 in the transformed domain: (2, L, M, 2)."""
        packing, params = self._packing, self._params
        split = self._degree * params.first_bytes
        _finish_first(
            parts[0],
            self._limbs[1],
            *self._twist,
            sums[0],
            secret.error,
            params.log2_q - params.first_bits,
            params.first_bytes,
            row[:split].view(np.uint64),
        )
        _finish_second(
            parts[1],
            self._limbs[1],
            *self._twist,
            sums[1],
            secret.flood,
            params.flood_shift,
            masks_gT,
            params.delta_shift,
            packing.stride,
            params.log2_q - params.second_bits,
            params.second_bytes,
            row[split:].view(np.uint64),
        )


def _words_of_digits(digits_JDN: Tensor) -> Array:
    """Low and high limb of every coefficient: int64 (J, N, 2)."""
    count, _, degree = digits_JDN.shape
    words = np.empty((count, degree, 2), np.uint64)
    source = digits_JDN.numpy()
    parallel_for(lambda lo, hi: wide.words_from_digits(source[lo:hi], words[lo:hi]), count, 4)
    return words.view(np.int64)


def _words_of_bytes(packed_JNB: Tensor) -> Array:
    """The same of little-endian 16-byte integers, uint8 (J, N, 16): a view where it is aligned."""
    octets = packed_JNB.cpu().contiguous().numpy()
    if octets.ctypes.data % 8:  # a view into a received frame may start anywhere
        octets = octets.copy()
    return octets.view(np.int64)


@kernel
def _finish_first(
    product: Array,
    limb_bits: int,
    real: Array,
    imag: Array,
    sums: Array,
    error: Array,
    dropped: int,
    num_bytes: int,
    words: Array,
) -> None:
    """Pack round((sums + u a_0 + e_1) / 2^dropped), 64 <= dropped < 128.

    product: (L, M, 2). sums: uint64 (2, N).
    """
    degree = error.shape[0]
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    negacyclic_wide.unfold(product, limb_bits, real, imag, low, high)
    wide.add_shifted(error.astype(np.int64), 1, 0, low, high)
    # Half of what is dropped is a bit of the high limb, or the low one's top bit.
    half_low, half_high, down = np.uint64(1) << np.uint64(63), np.uint64(0), np.uint64(dropped - 64)
    if dropped > 64:
        half_low, half_high = np.uint64(0), np.uint64(1) << np.uint64(dropped - 65)
    for k in range(degree):
        total = low[k] + sums[0, k]
        rounded = total + half_low
        high[k] += sums[1, k] + np.uint64(total < low[k]) + np.uint64(rounded < total)
        high[k] = (high[k] + half_high) >> down
    pack_words(high, num_bytes, words)


@kernel
def _finish_second(
    product: Array,
    limb_bits: int,
    real: Array,
    imag: Array,
    sums: Array,
    flood: Array,
    flood_shift: int,
    masks_gT: Array,
    delta_shift: int,
    stride: int,
    dropped: int,
    num_bytes: int,
    words: Array,
) -> None:
    """Pack round((sums + u b_0 + f - Delta s) / 2^dropped) of the useful coefficients.

    flood: int64 (3, g T). masks: int64 (g, T).
    """
    degree, slots = sums.shape[1], masks_gT.shape[1]
    low, high = np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    negacyclic_wide.unfold(product, limb_bits, real, imag, low, high)
    values = np.empty(masks_gT.size, np.uint64)
    half, down = np.uint64(1) << np.uint64(dropped - 65), np.uint64(dropped - 64)
    up, rest = np.uint64(flood_shift), np.uint64(64 - flood_shift)
    for u in range(masks_gT.shape[0]):
        for k in range(slots):
            at, index = u * stride + k, u * slots + k
            # w_1 + w_2 + w_3, sign-extended, then shifted
            w_1, w_2, w_3 = flood[0, index], flood[1, index], flood[2, index]
            sum_2 = np.uint64(w_1) + np.uint64(w_2)
            sum_3 = sum_2 + np.uint64(w_3)
            sign = (w_1 >> np.int64(63)) + (w_2 >> np.int64(63)) + (w_3 >> np.int64(63))
            carry = np.uint64(sum_2 < np.uint64(w_1)) + np.uint64(sum_3 < sum_2)
            f_low = sum_3 << up
            f_high = ((np.uint64(sign) + carry) << up) | (sum_3 >> rest)
            total = low[at] + sums[0, at]
            result = high[at] + sums[1, at] + np.uint64(total < low[at])
            flooded = total + f_low
            result += f_high + np.uint64(flooded < total)
            result -= np.uint64(masks_gT[u, k] << np.int64(delta_shift - 64))
            values[index] = (result + half) >> down
    pack_words(values, num_bytes, words)
