"""Messages under pads, packed bit by bit, on a CPU: the sender's half and the receiver's.

A message is ``words`` values of ``bits`` bits. Word k is masked with bits k bits ... of its pad.
Packed values follow each other without padding, lowest bit first, and end at a whole byte.

Shape suffixes: n transfers, M messages of one transfer, w words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from otpipe.kernels.cpu import parallel_for
from otpipe.ot import pad_kernels
from otpipe.ot.extension import U64
from otpipe.ot.pads import blocks_per_pad
from otpipe.ot.pads_cpu import ALIGNMENT, Bytes, CpuHash


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed values."""
    return -(-count * bits // 8)


def pack_bits(values: NDArray[np.uint8], bits: int) -> Bytes:
    """``values`` uint8 (n,), their low ``bits`` bits end to end."""
    if bits == 8:
        return values
    if bits == 1:
        return np.packbits(values & 1, bitorder="little")
    spread = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack_bits(packed: Bytes, count: int, bits: int) -> NDArray[np.uint8]:
    """Inverse of ``pack_bits``."""
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]


class CpuMasks:
    """What the sender and the receiver do with pads, in one session of one of them."""

    def __init__(self, hash_function: CpuHash) -> None:
        self._hash = hash_function

    def mask_chosen(
        self, bases: U64, offsets: U64, first: int, stride: int, flips: Bytes, messages: U64,
        bits: int,
    ) -> Bytes:  # fmt: skip
        """Messages uint64 (n, M, w) xor pads, packed: message m under the pad of index m ^ flips.

        flips: uint8 (n,). Other arguments as in ``CpuHash.all_pads``.
        """
        n, num_messages, words = messages.shape
        blocks = blocks_per_pad(words, bits)
        per_transfer = num_messages * words * bits
        packed = _word_buffer(n * per_transfer)

        def body(lo: int, hi: int) -> None:
            pads = self._hash.all_pads(bases[lo:hi], offsets, first + lo * stride, stride, blocks)
            pad_kernels.mask_chosen(
                messages[lo:hi], flips[lo:hi], pads, bits,
                packed[lo * per_transfer // 64 :],
            )  # fmt: skip

        self._hash.in_pieces(first, n, stride, num_messages * blocks, body)
        return packed.view(np.uint8)[: packed_bytes(n, per_transfer)]

    def mask_correlated(
        self, bases: U64, offsets: U64, first: int, flips: Bytes, correlation: U64, bits: int
    ) -> tuple[U64, Bytes]:
        """x (n, w), and packed x + correlation - pad (1 ^ flip); correlation uint64 (n, w)."""
        n, words = correlation.shape
        blocks = blocks_per_pad(words, bits)
        packed = _word_buffer(n * words * bits)
        x = np.empty((n, words), np.uint64)

        def body(lo: int, hi: int) -> None:
            pads = self._hash.all_pads(bases[lo:hi], offsets, first + lo, 1, blocks)
            target = packed[lo * words * bits // 64 :]
            pad_kernels.mask_correlated(
                correlation[lo:hi], flips[lo:hi], pads, bits, x[lo:hi], target
            )

        self._hash.in_pieces(first, n, 1, 2 * blocks, body)
        return x, packed.view(np.uint8)[: packed_bytes(n, words * bits)]

    def all_words(
        self, bases: U64, offsets: U64, first: int, stride: int, words: int, bits: int
    ) -> U64:
        """The pads themselves, as messages of a random OT: uint64 (n, M, w)."""
        n, num_messages = len(bases), len(offsets)
        blocks = blocks_per_pad(words, bits)
        out = np.empty((n, num_messages, words), np.uint64)

        def body(lo: int, hi: int) -> None:
            pads = self._hash.all_pads(bases[lo:hi], offsets, first + lo * stride, stride, blocks)
            flat = out[lo:hi].reshape(-1, words)
            pad_kernels.pad_words(pads.reshape(-1, 2 * blocks), bits, flat)

        self._hash.in_pieces(first, n, stride, num_messages * blocks, body)
        return out

    def chosen_pads(self, bases: U64, indices: Bytes, first: int, stride: int, blocks: int) -> U64:
        """``CpuHash.chosen_pads`` on all cores: uint64 (n, 2 blocks)."""
        pads = np.empty((len(bases), 2 * blocks), np.uint64)

        def body(lo: int, hi: int) -> None:
            pads[lo:hi] = self._hash.chosen_pads(
                bases[lo:hi], indices[lo:hi], first + lo * stride, stride, blocks
            )

        self._hash.in_pieces(first, len(bases), stride, blocks, body)
        return pads


def open_chosen(
    packed: Bytes, choices: Bytes, num_messages: int, pads: U64, bits: int, words: int
) -> U64:
    """The chosen messages uint64 (n, w): packed as by ``mask_chosen``, pads uint64 (n, P)."""
    source, out = _readable(packed), np.empty((len(choices), words), np.uint64)

    def body(lo: int, hi: int) -> None:
        start = lo * ALIGNMENT
        stop = min(hi * ALIGNMENT, len(choices))
        at = start * num_messages * words * bits // 64
        pad_kernels.open_chosen(
            source[at:], choices[start:stop], num_messages, pads[start:stop], bits,
            out[start:stop],
        )  # fmt: skip

    parallel_for(body, -(-len(choices) // ALIGNMENT), 1 << 6)
    return out


def open_correlated(packed: Bytes, choices: Bytes, pads: U64, bits: int, words: int) -> U64:
    """x + choice * correlation, uint64 (n, w): packed as by ``mask_correlated``."""
    source, out = _readable(packed), np.empty((len(choices), words), np.uint64)

    def body(lo: int, hi: int) -> None:
        start = lo * ALIGNMENT
        stop = min(hi * ALIGNMENT, len(choices))
        at = start * words * bits // 64
        pad_kernels.open_correlated(
            source[at:], choices[start:stop], pads[start:stop], bits, out[start:stop]
        )

    parallel_for(body, -(-len(choices) // ALIGNMENT), 1 << 6)
    return out


def pad_words(pads: U64, words: int, bits: int) -> U64:
    """The first words of each pad, uint64 (n, w)."""
    out = np.empty((len(pads), words), np.uint64)
    pad_kernels.pad_words(pads, bits, out)
    return out


def _word_buffer(num_bits: int) -> U64:
    """Words for so many packed bits."""
    return np.empty(-(-num_bits // 64), np.uint64)


def _readable(packed: Bytes) -> U64:
    """A copy that may be read as words, up to one beyond the end."""
    words = np.zeros(packed.size // 8 + 2, np.uint64)
    words.view(np.uint8)[: packed.size] = packed
    return words
