"""Messages under pads, packed bit by bit, on a CPU: the sender's half and the receiver's.

A message is ``words`` values of ``bits`` bits. Word k is masked with bits k bits ... of its pad.
Packed values follow each other without padding, lowest bit first; what answers one request ends at
a whole byte. All requests of a message are served together: by one compiled call a core, or, on a
processor without AES instructions, one by one with portable hashing and the same masks.

Shape suffixes: n transfers of all requests, M messages of one transfer, w words, C COTs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from otpipe.kernels.cpu import parallel_for
from otpipe.ot import exchange_kernels as kernels
from otpipe.ot import pad_kernels
from otpipe.ot.exchange_kernels import COT, COUNT, ELEMENT, PACKED, PADS, RESULTS, VALUES
from otpipe.ot.extension import U64
from otpipe.ot.pads import blocks_per_pad
from otpipe.ot.pads_cpu import ALIGNMENT, Bytes, CpuHash, combine
from otpipe.ot.plan import Shape

Spans = NDArray[np.int64]

_SPAN_BLOCKS = 1 << 14
"""Pad blocks of one span: what a core takes at a time."""


@dataclass(frozen=True, repr=False, eq=False)
class Part:
    """Transfers of one request whose answers travel in one message; arrays of these alone.

    Attributes:
        shape: of the request.
        count: transfers in this message.
        cot: number of the first COT, less that of the exchange's first.
        element: number of the first transfer among those of the exchange.
        values: the sender's, uint64 (count, w), or (count, M, w); contiguous.
        results: where either party's results go, uint64 (count, w), contiguous.
    """

    shape: Shape
    count: int
    cot: int
    element: int
    values: U64 | None
    results: U64 | None


class Message:
    """The parts of one message, as tables for ``exchange_kernels``.

    Attributes:
        parts: in order; their COTs follow each other.
        whole: one span a part.
        spans: the same for several cores. A span begins at a multiple of 64 transfers, hence at a
            whole word of the answers.
        num_words: 64-bit words of all answers, those of each part rounded up.
        num_pad_words: words of the receiver's pads.
        grain: spans that are worth a thread.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.num_words = self.num_pad_words = 0
        rows = []
        for part in parts:
            shape = part.shape
            rows.append((
                shape.correlated, part.count, shape.index_bits, shape.words, shape.bits, part.cot,
                part.element, _address(part.values), _address(part.results), self.num_words,
                self.num_pad_words,
            ))  # fmt: skip
            self.num_words += -(-shape.answer_bytes(part.count) // 8)
            self.num_pad_words += part.count * _pad_words_of(shape)
        self.whole: Spans = np.array(rows, np.int64)
        cut = [_cut(part, span) for part, span in zip(parts, self.whole, strict=True)]
        self.spans = cut[0] if len(cut) == 1 else np.concatenate(cut)
        work = sum(part.count * _blocks_of(part.shape) for part in parts)
        self.grain = max(1, _SPAN_BLOCKS * len(self.spans) // max(1, work))


def _cut(part: Part, span: Spans) -> Spans:
    """The span of a part in pieces of about ``_SPAN_BLOCKS``: (pieces, columns)."""
    shape = part.shape
    step = ALIGNMENT * max(1, _SPAN_BLOCKS // (ALIGNMENT * _blocks_of(shape)))
    if part.count <= step:
        return span[None]
    lo = np.arange(0, part.count, step)
    cut = np.repeat(span[None], len(lo), 0)
    cut[:, COUNT] = np.minimum(step, part.count - lo)
    cut[:, COT] += lo * shape.index_bits
    cut[:, ELEMENT] += lo
    per_transfer = 1 if shape.correlated else shape.num_messages
    if part.values is not None:
        cut[:, VALUES] += lo * (8 * shape.words * per_transfer)
    if part.results is not None:
        cut[:, RESULTS] += lo * (8 * shape.words)
    cut[:, PACKED] += lo * shape.answer_bits // 64
    cut[:, PADS] += lo * _pad_words_of(shape)
    return cut


def _address(array: U64 | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def _blocks_of(shape: Shape) -> int:
    """Pad blocks that the sender makes for one transfer."""
    return shape.num_pads * blocks_per_pad(shape.words, shape.bits)


def _pad_words_of(shape: Shape) -> int:
    """Words of the receiver's pads for one transfer."""
    pads = shape.index_bits if shape.correlated else 1
    return 2 * pads * blocks_per_pad(shape.words, shape.bits)


class ChoiceBits:
    """The receiver's masked choices of one exchange as a stream of bytes."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._counts = np.array([shape.count for shape in shapes], np.int64)
        self._widths = np.array([shape.index_bits for shape in shapes], np.int64)
        self.num_bytes = sum(shape.choice_bytes for shape in shapes)
        self.num_transfers = int(self._counts.sum())

    def gathered(self, bits: Bytes) -> U64:
        """Bits of each transfer's COTs, uint8 (C,), as one integer a transfer: uint64 (n,)."""
        out = np.empty(self.num_transfers, np.uint64)
        kernels.gather_bits(bits, self._counts, self._widths, out)
        return out

    def packed(self, values: U64) -> Bytes:
        """uint64 (n,), the index bits of each end to end."""
        out = np.empty(self.num_bytes, np.uint8)
        kernels.pack_choices(values, self._counts, self._widths, out)
        return out

    def unpacked(self, packed: Bytes) -> U64:
        """Inverse of ``packed``."""
        out = np.empty(self.num_transfers, np.uint64)
        kernels.unpack_choices(packed, self._counts, self._widths, out)
        return out


class CpuMasks:
    """What the sender and the receiver do with pads, in one session of one of them."""

    def __init__(self, hash_function: CpuHash) -> None:
        self._hash = hash_function

    def answers(self, message: Message, keys: U64, offsets: U64, flips: U64, first: int) -> Bytes:
        """The sender's message; fills the results of correlated parts.

        Args:
            keys: (C, 2) of the exchange, whose first COT is number ``first``.
            offsets: e(m) Delta, (256, 2).
            flips: uint64 (n,) of the exchange: what came from the receiver.
        """
        parts, spans = message.parts, message.spans
        packed = np.empty(message.num_words, np.uint64)
        self._claim(parts, first)
        if self._hash.native:
            round_keys = self._hash.round_keys(first, len(keys))

            def body(lo: int, hi: int) -> None:
                kernels.answer_spans(
                    spans[lo:hi], keys, offsets, flips, round_keys, first, self._hash.log2_epoch,
                    packed,
                )  # fmt: skip

            parallel_for(body, len(spans), message.grain)
        else:
            for part, span in zip(parts, message.whole, strict=True):
                self._answer(part, keys, offsets, flips, first, packed[span[PACKED] :])
        octets = packed.view(np.uint8)
        pieces = []
        at = 0
        for part in parts:
            size = part.shape.answer_bytes(part.count)
            pieces.append(octets[at : at + size])
            at += -(-size // 8) * 8
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def own_pads(self, message: Message, keys: U64, randoms: U64, first: int) -> U64:
        """The pads of a message that the receiver can know: for ``open``.

        keys (C, 2) and randoms uint64 (n,) of the exchange, whose first COT is number ``first``.
        """
        parts, spans = message.parts, message.spans
        pads = np.empty(message.num_pad_words, np.uint64)
        self._claim(parts, first)
        if self._hash.native:
            round_keys = self._hash.round_keys(first, len(keys))

            def body(lo: int, hi: int) -> None:
                kernels.own_pads(
                    spans[lo:hi], keys, randoms, round_keys, first, self._hash.log2_epoch, pads
                )

            parallel_for(body, len(spans), message.grain)
            return pads
        for part, span in zip(parts, message.whole, strict=True):
            own, random = _of(part, keys), randoms[part.element : part.element + part.count]
            m, number = part.shape.index_bits, first + part.cot
            blocks = blocks_per_pad(part.shape.words, part.shape.bits)
            if part.shape.correlated:
                bits = (random[:, None] >> np.arange(m, dtype=np.uint64)) & np.uint64(1)
                indices = bits.astype(np.uint8).reshape(-1)
                made = self._hash.chosen_pads(own, indices, number, 1, blocks)
            else:
                indices = random.astype(np.uint8)
                made = self._hash.chosen_pads(combine(own, m), indices, number, m, blocks)
            pads[span[PADS] : span[PADS] + made.size] = made.reshape(-1)
        return pads

    def open(self, message: Message, answers: Bytes, choices: U64, pads: U64) -> None:
        """Fill the results of all parts from the sender's message.

        choices: uint64 (n,) of the exchange; pads as made by ``own_pads``.
        """
        spans, words = message.spans, np.empty(message.num_words, np.uint64)
        octets, source, target = words.view(np.uint8), 0, 0
        for part in message.parts:
            size = part.shape.answer_bytes(part.count)
            octets[target : target + size] = answers[source : source + size]
            source, target = source + size, target + -(-size // 8) * 8

        def body(lo: int, hi: int) -> None:
            kernels.open_spans(spans[lo:hi], words, choices, pads)

        parallel_for(body, len(spans), message.grain)

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

    def _claim(self, parts: Sequence[Part], first: int) -> None:
        """Parts of a message follow each other in their COTs."""
        count = sum(part.count * part.shape.index_bits for part in parts)
        self._hash.claim(first + parts[0].cot, count)

    def _answer(
        self, part: Part, keys: U64, offsets: U64, flips: U64, first: int, packed: U64
    ) -> None:
        """One part with portable hashing."""
        shape, state = part.shape, np.zeros(3, np.uint64)
        m, blocks = shape.index_bits, blocks_per_pad(shape.words, shape.bits)
        step = max(1, _SPAN_BLOCKS // (shape.num_pads * blocks))
        assert part.values is not None
        for lo in range(0, part.count, step):
            hi = min(part.count, lo + step)
            own = _of(part, keys)[lo * m : hi * m]
            flip = flips[part.element + lo : part.element + hi]
            number = first + part.cot + lo * m
            if shape.correlated:
                assert part.results is not None
                pads = self._hash.all_pads(own, offsets[:2], number, 1, blocks)
                kernels.mask_products(
                    part.values[lo:hi], flip, pads, m, shape.bits, part.results[lo:hi], packed,
                    state,
                )  # fmt: skip
            else:
                pads = self._hash.all_pads(combine(own, m), offsets[: 1 << m], number, m, blocks)
                pad_kernels.mask_chosen(part.values[lo:hi], flip, pads, shape.bits, packed, state)
        kernels.finish(packed, state)


def pad_words(pads: U64, words: int, bits: int) -> U64:
    """The first words of each pad, uint64 (n, w)."""
    out = np.empty((len(pads), words), np.uint64)
    pad_kernels.pad_words(pads, bits, out)
    return out


def _of(part: Part, keys: U64) -> U64:
    return keys[part.cot : part.cot + part.count * part.shape.index_bits]
