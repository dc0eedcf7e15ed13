"""The server's secrets in the preprocessing for private weights: masks, and what hides an answer.

Shape suffixes: T slots, m outputs of a map, G answers, N ring degree, W = 3 flooding words,
S = g T useful coefficients of an answer's second part.
"""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from otpipe.crypto.private_params import FLOOD_WORDS, PrivatePacking
from otpipe.crypto.randomness import (
    KEY_BYTES,
    Keystream,
    centered_binomial,
    derive_key,
    keystream,
    uniform_ternary,
)
from otpipe.kernels.cpu import Array, kernel, parallel_for

_BLOCK_BYTES = 16  # of the cipher: two masks of 8 bytes
_MASKS_PER_BLOCK = 2
_TILE_OUTPUTS = 8  # worth handing to a thread
_DRAWN_AT_ONCE = 8


class MaskReused(RuntimeError):  # noqa: N818 - reads as what it is
    """The masks of one key would hide a second exchange; draw a fresh mask key."""


def fresh_mask_key() -> bytes:
    """A key for the masks of one exchange, from the operating system."""
    return os.urandom(KEY_BYTES)


class MaskStream:
    """The server's masks s of one map in one exchange, uniform mod 2^bits, by slot and output.

    Slot-major AES-256-CTR keystream, so that the online phase reads whole rows and preparation
    reads tiles of outputs over all slots. Not printable and not picklable.

    **One exchange per key.** The client knows c (W r) - s. Two exchanges under one s tell it
    c W (r - r'), so a repetition after a lost connection needs a fresh key; ``spend`` refuses a
    second exchange of this object. **One request per slot**, likewise: c W x + s for two x under
    one s differ by c W (x - x').
    """

    def __init__(self, mask_key: bytes, map_index: int, num_outputs: int, bits: int) -> None:
        self.num_outputs, self.bits = num_outputs, bits
        # The derived key is used for this purpose only, so one nonce is enough.
        self._keystream = Keystream(derive_key(mask_key, "server mask", map_index), 0)
        self._row_bytes = -(-num_outputs // _MASKS_PER_BLOCK) * _BLOCK_BYTES
        self._spent = False
        self._lock = threading.Lock()

    def spend(self) -> None:
        """Mark the masks as used by an exchange.

        Raises:
            MaskReused: they already are.
        """
        with self._lock:
            if self._spent:
                raise MaskReused(
                    "These masks already hide one exchange; draw a fresh mask key for another."
                )
            self._spent = True

    def rows(self, first_slot: int, count: int) -> NDArray[np.int64]:
        """Masks (count, m) of consecutive slots, in [0, 2^bits)."""
        out = np.empty((count, self._row_bytes), np.uint8)
        self._keystream.fill(first_slot * self._row_bytes, out)
        return self._reduced(out)[:, : self.num_outputs]

    def tiles(
        self,
        first_answer: int,
        packing: PrivatePacking,
        out_GgT: NDArray[np.int64],
    ) -> None:
        """Masks of the outputs of consecutive answers; zero where the map has no such output."""
        outputs, slots = packing.outputs, packing.num_slots
        out_mT = out_GgT.reshape(-1, slots)
        first = first_answer * outputs
        present = min(len(out_mT), self.num_outputs - first)
        out_mT[present:] = 0
        mask = (1 << self.bits) - 1

        def body(lo: int, hi: int) -> None:
            octets = np.empty((slots, (_TILE_OUTPUTS // 2 + 1) * _BLOCK_BYTES), np.uint8)
            for start in range(lo, hi, _TILE_OUTPUTS):
                stop = min(hi, start + _TILE_OUTPUTS)
                block = (first + start) // _MASKS_PER_BLOCK
                blocks = -(-(first + stop) // _MASKS_PER_BLOCK) - block
                rows = octets.reshape(-1)[: slots * blocks * _BLOCK_BYTES].reshape(slots, -1)
                self._keystream.rows(block * _BLOCK_BYTES, self._row_bytes, rows)
                skip = first + start - block * _MASKS_PER_BLOCK
                _turn_masks(rows.view(np.int64), skip, mask, out_mT[start:stop])

        parallel_for(body, present, _TILE_OUTPUTS)

    def _reduced(self, octets: NDArray[np.uint8]) -> NDArray[np.int64]:
        return octets.view(np.int64) & np.int64((1 << self.bits) - 1)

    def __repr__(self) -> str:
        return f"MaskStream({self.num_outputs} outputs, hidden)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("A MaskStream is never pickled or copied.")


@kernel
def _turn_masks(rows_Tm: Array, skip: int, mask: int, out_mT: Array) -> None:
    """out[i, slot] = rows[slot, skip + i] & mask."""
    for slot in range(out_mT.shape[1]):
        for i in range(out_mT.shape[0]):
            out_mT[i, slot] = rows_Tm[slot, skip + i] & mask


class AnswerSecrets(NamedTuple):
    """Fresh randomness of G answers; see ``private_evaluate``."""

    ternary: NDArray[np.int8]  # (G, N): u
    error: NDArray[np.int8]  # (G, N): e_1
    flood: NDArray[np.int64]  # (G, W, S): w_1, w_2, w_3 as signed words, so that f is centred

    def rows(self, lo: int, hi: int) -> AnswerSecrets:
        """Views of those of answers lo .. hi - 1."""
        return AnswerSecrets(self.ternary[lo:hi], self.error[lo:hi], self.flood[lo:hi])

    def row(self, i: int) -> AnswerSecrets:
        """Views of those of one answer, without the first axis."""
        return AnswerSecrets(self.ternary[i], self.error[i], self.flood[i])


def empty_secrets(count: int, packing: PrivatePacking) -> AnswerSecrets:
    """Room for the secrets of ``count`` answers."""
    degree, useful = packing.params.ring_degree, packing.outputs * packing.num_slots
    return AnswerSecrets(
        np.empty((count, degree), np.int8),
        np.empty((count, degree), np.int8),
        np.empty((count, FLOOD_WORDS, useful), np.int64),
    )


def draw_secrets(packing: PrivatePacking, out: AnswerSecrets) -> None:
    """Fill ``out`` with fresh secrets, keyed from the operating system."""
    eta = packing.params.error_eta

    def body(lo: int, hi: int) -> None:
        ternary, error, flood = out.rows(lo, hi)
        ternary[:] = uniform_ternary(ternary.size).reshape(ternary.shape)
        error[:] = centered_binomial(error.size, eta).reshape(error.shape)
        keystream(os.urandom(KEY_BYTES), 0, 0, flood.view(np.uint8))

    parallel_for(body, len(out.ternary), _DRAWN_AT_ONCE)
