"""Pads on a CPU, for both parties; ``pads`` defines them.

With AES instructions the hash is compiled; without, pycryptodome encrypts one buffer of blocks and
numpy adds. Either way the results are the same bits.

Shape suffixes: n transfers, M messages of one transfer, P = 2 blocks words of a pad.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from Crypto.Cipher import AES
from numpy.typing import NDArray

from otpipe.kernels import aes_native
from otpipe.kernels.cpu import parallel_for
from otpipe.ot import pad_kernels
from otpipe.ot.extension import U64
from otpipe.ot.pads import TweakLedger, hash_key, round_keys

Bytes = NDArray[np.uint8]

ALIGNMENT = 64
"""So many packed messages of any width end at a word: pieces of the work are multiples of this."""

_PIECE_BLOCKS = 1 << 14
"""Pad blocks of one piece, which then stay in the second-level cache until they are used."""


def combine(keys: U64, index_bits: int) -> U64:
    """sum_j alpha^j of each transfer's ``index_bits`` keys: (n index_bits, 2) -> (n, 2)."""
    if index_bits == 1:
        return keys
    out = np.empty((len(keys) // index_bits, 2), np.uint64)

    def body(lo: int, hi: int) -> None:
        pad_kernels.combine(keys[lo * index_bits : hi * index_bits], index_bits, out[lo:hi])

    parallel_for(body, len(out), 1 << 12)
    return out


class CpuHash:
    """H of one party in one session, behind its ledger.

    Attributes:
        native: whether AES is compiled.
        log2_epoch: COTs under one key.
    """

    def __init__(self, session: bytes, ledger: TweakLedger, native: bool | None = None) -> None:
        """``native``: compiled AES; None: where the processor has it."""
        self._session, self._ledger = session, ledger
        self.log2_epoch = ledger.log2_epoch
        self.native = aes_native.NATIVE if native is None else native

    def in_pieces(
        self, first: int, count: int, stride: int, num_pads: int, body: Callable[[int, int], None]
    ) -> None:
        """Claim the tweaks of ``count`` transfers, then call ``body(lo, hi)`` on pieces of them.

        Args:
            first: number of the first COT; transfer i begins at first + i stride.
            count, stride: transfers, and COTs of each.
            num_pads: pad blocks of one transfer.
            body: may call ``all_pads`` or ``chosen_pads`` for its piece, once, from any thread.

        Raises:
            RuntimeError: a tweak was used before.
            ParameterError: the session's tweaks are used up.
        """
        self._ledger.claim(first, count * stride)
        piece = ALIGNMENT * max(1, _PIECE_BLOCKS // (ALIGNMENT * num_pads))

        def pieces(lo: int, hi: int) -> None:
            for start in range(lo * piece, min(hi * piece, count), piece):
                body(start, min(start + piece, count))

        parallel_for(pieces, -(-count // piece), 1)

    def all_pads(self, bases: U64, offsets: U64, first: int, stride: int, blocks: int) -> U64:
        """Every pad of each transfer, in the order of the indices: uint64 (n, M, 2 blocks).

        Args:
            bases: X of each transfer, (n, 2).
            offsets: e(m) Delta, (M, 2).
            first, stride: as in ``in_pieces``.
            blocks: AES blocks of a pad.
        """
        pads = np.empty((len(bases), len(offsets), 2 * blocks), np.uint64)
        if self.native:
            keys = self.round_keys(first, len(bases) * stride)
            pad_kernels.hash_all(bases, offsets, keys, first, self.log2_epoch, first, stride, pads)
            return pads
        for lo, hi, epoch in self._ledger.epochs(first, len(bases), stride):
            start = first + lo * stride
            indices = np.tile(np.arange(len(offsets)).astype(np.uint8), hi - lo)
            x = bases[lo:hi, None, :] ^ offsets
            numbers = np.repeat(start + stride * np.arange(hi - lo), len(offsets))
            flat = pads[lo:hi].reshape(-1, 2 * blocks)
            key = hash_key(self._session, epoch)
            _tmmo_portable(x.reshape(-1, 2), indices, flat, key, numbers)
        return pads

    def chosen_pads(self, bases: U64, indices: Bytes, first: int, stride: int, blocks: int) -> U64:
        """The one pad of each transfer that the receiver knows: uint64 (n, 2 blocks).

        Args:
            bases: sum_j alpha^j t_j, (n, 2).
            indices: uint8 (n,): the random index that the COTs hold.
            first, stride, blocks: as in ``all_pads``.
        """
        pads = np.empty((len(bases), 2 * blocks), np.uint64)
        if self.native:
            keys = self.round_keys(first, len(bases) * stride)
            pad_kernels.hash_one(bases, indices, keys, first, self.log2_epoch, first, stride, pads)
            return pads
        for lo, hi, epoch in self._ledger.epochs(first, len(bases), stride):
            numbers = first + lo * stride + stride * np.arange(hi - lo)
            key = hash_key(self._session, epoch)
            _tmmo_portable(bases[lo:hi], indices[lo:hi], pads[lo:hi], key, numbers)
        return pads

    def claim(self, first: int, count: int) -> None:
        """Use the tweaks of ``count`` COTs; see ``TweakLedger.claim``."""
        self._ledger.claim(first, count)

    def round_keys(self, first: int, count: int) -> U64:
        """Of the epochs of ``count`` COTs from ``first``: uint64 (epochs, 11, 2)."""
        epochs = range(first >> self.log2_epoch, ((first + count - 1) >> self.log2_epoch) + 1)
        keys = [round_keys(self._session, epoch) for epoch in epochs]
        together = keys[0][None] if len(keys) == 1 else np.stack(keys)
        return together.view(np.uint64)


def _tmmo_portable(
    x: U64, indices: Bytes, pads: U64, key: bytes, numbers: NDArray[np.int64]
) -> None:
    """pads = pi(pi(x) + tweak) + pi(x), tweak = (numbers, 256 block + indices)."""
    cipher = AES.new(key, AES.MODE_ECB)
    once = np.frombuffer(cipher.encrypt(x.tobytes()), np.uint64).reshape(-1, 2)
    for block in range(pads.shape[1] // 2):
        mixed = once.copy()
        mixed[:, 0] ^= numbers.astype(np.uint64)
        mixed[:, 1] ^= indices.astype(np.uint64) | np.uint64(block << 8)
        twice = np.frombuffer(cipher.encrypt(mixed.tobytes()), np.uint64).reshape(-1, 2)
        pads[:, 2 * block : 2 * block + 2] = twice ^ once
