"""What the server puts into tables: entries that depend on its number and on the client's index.

``transfers.table`` asks for the messages of all elements, under masks. On a CPU they are made by a
compiled pass; ``fields`` is the same in torch, for other devices and for any function.

Shape suffixes: n elements, M = 2^b entries of an element, F fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpipe.kernels.cpu import parallel_for
from otpipe.ot.params import MAX_WORD_BITS
from otpipe.secure import table_kernels
from otpipe.secure.shares import reduced

_CPU_ENTRIES = 1 << 15
"""Entries that torch makes at once on a CPU: passes over them stay in its cache."""

_GRAIN_ENTRIES = 1 << 14
"""Entries that are worth a thread."""


class Entries(Protocol):
    """The fields of every entry."""

    def fields(self, part: slice, index_bits: int) -> Sequence[Tensor]:
        """Of some of the n elements: int64 (elements, M) each, of any representatives."""


class Rows:
    """A public table of entries, kept and used many times: int64 (rows, F), not to be changed."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._packed: dict[Layout, Tensor] = {}

    def packed(self, layout: Layout) -> Tensor:
        """int64 (rows, words)."""
        if layout not in self._packed:
            self._packed[layout] = layout.join(self.values.t())
        return self._packed[layout]


@dataclass(frozen=True, eq=False)
class RowEntries:
    """Entry e of element i is row (starts[i] + e step) mod 2^bits of a public table.

    Attributes:
        rows: on the device of ``starts``.
        starts: int64 (n,).
        step: between neighbouring entries.
        bits: of a row's number; row numbers wrap.
        flipped: row starts[i] xor e instead.
    """

    rows: Rows
    starts: Tensor
    step: int
    bits: int
    flipped: bool = False

    def fields(self, part: slice, index_bits: int) -> Sequence[Tensor]:
        """See ``Entries``."""
        every, start = _every(self.starts, index_bits), self.starts[part, None]
        row = start ^ every if self.flipped else reduced(start + every * self.step, self.bits)
        return [column[row] for column in self.rows.values.unbind(1)]

    def fill(self, lo: int, hi: int, masks: Tensor, layout: Layout, out: Tensor) -> None:
        """Compiled: messages of elements lo to hi. masks (F, n), out (n, M, words)."""
        table_kernels.fill_rows(
            self.starts.numpy()[lo:hi], self.step, (1 << self.bits) - 1, self.flipped,
            _unsigned(self.rows.packed(layout)), _unsigned(layout.join(masks[:, lo:hi])),
            layout.tops, layout.lifts, _unsigned(out)[lo:hi],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class IntervalEntries:
    """Bit f of entry e of element i: whether x = starts[i] + e step lies in interval f.

    Attributes:
        starts: int64 (n,).
        step: between neighbouring entries.
        bits: x is a number mod 2^bits.
        intervals: (low, size) of each; x is inside if (x - low) mod 2^bits < size.
    """

    starts: Tensor
    step: int
    bits: int
    intervals: tuple[tuple[int, int], ...]

    def fields(self, part: slice, index_bits: int) -> Sequence[Tensor]:
        """See ``Entries``."""
        x = self.starts[part, None] + _every(self.starts, index_bits) * self.step
        return in_intervals(x, self.bits, self.intervals)

    def fill(self, lo: int, hi: int, masks: Tensor, layout: Layout, out: Tensor) -> None:
        """As of ``RowEntries``; every field is one bit."""
        table_kernels.fill_intervals(
            self.starts.numpy()[lo:hi], self.step, (1 << self.bits) - 1,
            np.array([low for low, _ in self.intervals]),
            np.array([size for _, size in self.intervals]),
            masks.numpy()[:, lo:hi], out.numpy()[lo:hi],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class FunctionEntries:
    """Any function of base = (starts[i] + e step) mod 2^bits."""

    function: Callable[[Tensor], Sequence[Tensor]]
    starts: Tensor
    step: int
    bits: int

    def fields(self, part: slice, index_bits: int) -> Sequence[Tensor]:
        """See ``Entries``."""
        every = _every(self.starts, index_bits)
        return self.function(reduced(self.starts[part, None] + every * self.step, self.bits))


def in_intervals(x: Tensor, bits: int, intervals: Sequence[tuple[int, int]]) -> list[Tensor]:
    """int64 0 or 1 for each interval (low, size): whether (x - low) mod 2^bits < size."""
    return [(reduced(x - low, bits) < size).to(torch.int64) for low, size in intervals]


def _every(like: Tensor, index_bits: int) -> Tensor:
    return torch.arange(1 << index_bits, device=like.device)


def _unsigned(values: Tensor) -> NDArray[np.uint64]:
    return values.numpy().view(np.uint64)


class Layout:
    """How the fields of an entry lie in the words of a message. Compared by identity.

    Attributes:
        words, word_bits: of a message.
        pieces: (field, its bit, word, its bit, bits).
        tops: uint64 (words,), the highest bit of every piece.
        lifts: uint64 (words,), where the piece begins that goes on in the next word, or 64.
    """

    def __init__(self, field_bits: Sequence[int]) -> None:
        total = sum(field_bits)
        self.words = -(-total // MAX_WORD_BITS)
        self.word_bits = -(-total // self.words)
        self.pieces: list[tuple[int, int, int, int, int]] = []
        tops, lifts, at = [0] * self.words, [64] * self.words, 0
        for field, bits in enumerate(field_bits):
            done = 0
            while done < bits:
                word, word_lo = divmod(at, self.word_bits)
                size = min(bits - done, self.word_bits - word_lo)
                self.pieces.append((field, done, word, word_lo, size))
                done, at = done + size, at + size
                tops[word] |= 1 << (word_lo + size - 1)
                if done < bits:
                    lifts[word] = word_lo
        self.tops, self.lifts = np.array(tops, np.uint64), np.array(lifts, np.uint64)

    def join(self, fields: Sequence[Tensor] | Tensor) -> Tensor:
        """Fields (F, n) in one message each: int64 (n, words)."""
        out = fields[0].new_zeros((len(fields[0]), self.words))
        for field, field_lo, word, word_lo, bits in self.pieces:
            out[:, word] |= reduced(fields[field] >> field_lo, bits) << word_lo
        return out

    def packed(self, entries: Entries, masks: Tensor, index_bits: int) -> Tensor:
        """The messages of all elements: int64 (n, M, words). masks: int64 (F, n)."""
        count, num_entries = masks.shape[1], 1 << index_bits
        on_cpu = masks.device.type == "cpu"
        if on_cpu and isinstance(entries, RowEntries | IntervalEntries):
            fill = entries.fill
            out = masks.new_empty((count, num_entries, self.words))
            parallel_for(
                lambda lo, hi: fill(lo, hi, masks, self, out),
                count,
                max(1, _GRAIN_ENTRIES >> index_bits),
            )
            return out
        out = masks.new_zeros((count, num_entries, self.words))
        step = max(1, _CPU_ENTRIES >> index_bits if on_cpu else count)
        for lo in range(0, count, step):
            part = slice(lo, lo + step)
            fields = entries.fields(part, index_bits)
            for field, field_lo, word, word_lo, bits in self.pieces:
                masked = fields[field] - masks[field, part, None]
                out[part, :, word] |= reduced(masked >> field_lo, bits) << word_lo
        return out

    def unpacked(self, words: Tensor, num_fields: int) -> list[Tensor]:
        """The fields (n,) of one message an element, (n, words)."""
        if num_fields == 1 and self.words == 1:
            return [words[:, 0]]
        fields: list[Tensor | None] = [None] * num_fields
        for field, field_lo, word, word_lo, bits in self.pieces:
            # An arithmetic shift is fine: the bits it repeats are cut off. 64-bit pieces do not
            # occur, since a field lives in a ring of at most 62 bits.
            part = reduced(words[:, word] >> word_lo, bits)
            known = fields[field]
            fields[field] = part if known is None else known | (part << field_lo)
        return [each for each in fields if each is not None]
