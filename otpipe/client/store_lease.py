"""Slots handed out for use: the only place where pads of the online phase come from."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np

from otpipe.client.store_batch import Batch
from otpipe.client.store_files import SlotDamaged
from otpipe.client.store_layout import MapShape, ModelLayout
from otpipe.client.store_rows import CallReader, RowReader, SpanReader

Rows = slice | Sequence[int] | None


class PadReuseError(RuntimeError):
    """The program asked for a pad a second time. A bug: one pad masks one message, ever.

    To send a message again after a lost connection, send the bytes that were already built.
    """


def _given_out(what: str, map_index: int, row: int) -> PadReuseError:
    return PadReuseError(
        f"the {what} of map {map_index}, row {row} was already given out; a pad masks "
        "one message: re-send the bytes that were built, or draw another slot"
    )


class Span(NamedTuple):
    """Consecutive slots of one batch."""

    batch: Batch
    first_slot: int
    num_slots: int


class SlotLease:
    """``count`` slots that are already marked spent on disk; row i is one token position.

    Every mask and every correction is given out once. Row arguments are a slice without step, a
    sequence of row numbers, or None for all rows. The arrays belong to the caller.
    """

    def __init__(
        self, layout: ModelLayout, spans: list[Span], on_close: Callable[[SlotLease], None]
    ) -> None:
        self.count = sum(span.num_slots for span in spans)
        self.spans: tuple[Span, ...] = tuple(spans)
        self._layout = layout
        self._masks_taken = {shape.index: bytearray(self.count) for shape in layout.shapes}
        self._corrections_taken = {shape.index: bytearray(self.count) for shape in layout.shapes}
        self._on_close = on_close
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._closed = False

    @property
    def slot_ids(self) -> list[tuple[str, int]]:
        """(batch id, slot number) of each row."""
        return [
            (span.batch.batch_id, span.first_slot + i)
            for span in self.spans
            for i in range(span.num_slots)
        ]

    def masks(self, map_index: int, rows: Rows = None, out: np.ndarray | None = None) -> np.ndarray:
        """The pads r (rows, n) of one map, unsigned integers. Raises PadReuseError the second time.

        Subtract them from the fixed-point activations mod 2^(8 ring_bytes) and send the result.
        ``out``: a contiguous array of that shape and type to fill and return.
        """
        spans = self._claim(self._masks_taken, "mask", map_index, rows)
        if out is None:
            parts = [span.batch.pads(map_index, span.first_slot, span.num_slots) for span in spans]
            return self._join(parts, map_index, inputs=True)
        for span, piece in self._pieces(spans, out):
            span.batch.pads(map_index, span.first_slot, span.num_slots, piece)
        return out

    def corrections(
        self, map_index: int, rows: Rows = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """c = W r (rows, m) of one map, unsigned integers. Raises PadReuseError the second time.

        Raises SlotDamaged when the disk did not keep what was written; its ``row`` tells which
        row of this lease. The corrections of the other requested rows can then be asked for
        again. ``out``: as of :meth:`masks`.
        """
        spans = self._claim(self._corrections_taken, "correction", map_index, rows)
        pieces: list[np.ndarray | None] = [None] * len(spans)
        if out is not None:
            pieces = [piece for _, piece in self._pieces(spans, out)]
        parts, done = [], 0
        for span, piece in zip(spans, pieces, strict=True):
            try:
                parts.append(
                    span.batch.corrections(map_index, span.first_slot, span.num_slots, piece)
                )
            except SlotDamaged as error:
                indices = self._row_numbers(rows)
                error.row = indices[done + error.row]
                self._unclaim_corrections(map_index, indices)
                raise
            done += span.num_slots
        return self._join(parts, map_index, inputs=False) if out is None else out

    def row_reader(self, rows: Rows = None, num_maps: int | None = None) -> RowReader:
        """Claims the pads and corrections of rows in the first maps, to be read map after map."""
        shapes = self._layout.shapes[:num_maps]
        numbers = self._row_numbers(rows)
        spans = self._spans(numbers)
        if len(spans) != 1 or not SpanReader.possible():
            return CallReader(
                shapes,
                lambda map_index: self.masks(map_index, rows),
                lambda map_index: self.corrections(map_index, rows),
            )
        (span,) = spans
        self._claim_span(shapes, numbers[0], numbers[0] + span.num_slots)
        return SpanReader(
            span.batch,
            span.first_slot,
            span.num_slots,
            numbers[0],
            len(shapes),
            self.require_owner,
        )

    @staticmethod
    def _pieces(spans: Sequence[Span], out: np.ndarray) -> Iterator[tuple[Span, np.ndarray]]:
        """Every span with its rows of ``out``."""
        done = 0
        for span in spans:
            yield span, out[done : done + span.num_slots]
            done += span.num_slots
        assert done == len(out), "out has the rows that were asked for"

    def _join(self, parts: list[np.ndarray], map_index: int, inputs: bool) -> np.ndarray:
        if len(parts) == 1:
            return parts[0]
        if parts:
            return np.concatenate(parts)
        shape = self._layout.shapes[self._layout.position[map_index]]
        width = shape.in_features if inputs else shape.out_features
        return np.empty((0, width), shape.dtype)

    def _row_numbers(self, rows: Rows) -> Sequence[int]:
        """Row numbers, checked; a ``range`` of step 1 unless ``rows`` is a sequence."""
        if rows is None:
            return range(self.count)
        if isinstance(rows, slice):
            start = 0 if rows.start is None else int(rows.start)
            stop = self.count if rows.stop is None else int(rows.stop)
            if rows.step not in (None, 1) or not (0 <= start <= stop <= self.count):
                raise ValueError(f"rows {rows} of a lease of {self.count}")
            return range(start, stop)
        numbers = [int(row) for row in rows]
        for row in numbers:
            if not (0 <= row < self.count):
                raise ValueError(f"row {row} of a lease of {self.count}")
        return numbers

    def require_owner(self) -> None:
        """Raise unless the lease is open and in the process that drew it."""
        if self._closed:
            raise RuntimeError("the slot lease is closed")
        if os.getpid() != self._owner_pid:
            raise PadReuseError(
                "a slot lease was carried into a forked process, which would use the same pads "
                "as its parent; draw slots in one process only"
            )

    def _claim_span(self, shapes: Sequence[MapShape], start: int, stop: int) -> None:
        """:meth:`_claim` masks and corrections of consecutive rows in many maps, all or none."""
        self.require_owner()
        claimed = b"\x01" * (stop - start)
        masks = [(self._masks_taken[s.index], "mask", s.index) for s in shapes]
        corrections = [(self._corrections_taken[s.index], "correction", s.index) for s in shapes]
        tables = masks + corrections
        with self._lock:
            for taken, what, map_index in tables:
                again = taken.find(1, start, stop)
                if again >= 0:
                    raise _given_out(what, map_index, again)
            for taken, _, _ in tables:
                taken[start:stop] = claimed

    def _claim(
        self, taken_by_map: dict[int, bytearray], what: str, map_index: int, rows: Rows
    ) -> Sequence[Span]:
        """Mark (map, row) pairs as given out, all or none, and return the slots behind them."""
        self.require_owner()
        taken = taken_by_map.get(map_index)
        if taken is None:
            raise ValueError(f"the model has no map {map_index}")
        numbers = self._row_numbers(rows)
        with self._lock:
            if isinstance(numbers, range):
                start, stop = numbers.start, numbers.stop
                again = taken.find(1, start, stop)
                if again < 0:
                    taken[start:stop] = b"\x01" * (stop - start)
            else:
                again = self._claim_each(taken, numbers)
        if again >= 0:
            raise _given_out(what, map_index, again)
        return self._spans(numbers)

    @staticmethod
    def _claim_each(taken: bytearray, numbers: Sequence[int]) -> int:
        seen: set[int] = set()
        for row in numbers:
            if taken[row] or row in seen:
                return row
            seen.add(row)
        for row in numbers:
            taken[row] = 1
        return -1

    def _unclaim_corrections(self, map_index: int, numbers: Iterable[int]) -> None:
        """Corrections reveal nothing by being read twice; masks are never given back."""
        taken = self._corrections_taken[map_index]
        with self._lock:
            for row in numbers:
                taken[row] = 0

    def _spans(self, numbers: Sequence[int]) -> Sequence[Span]:
        spans: list[Span] = []
        if isinstance(numbers, range):
            if len(numbers) == self.count:
                return self.spans
            begin = 0
            for span in self.spans:  # its part of the range, if it has one
                start = max(numbers.start, begin)
                stop = min(numbers.stop, begin + span.num_slots)
                if start < stop:
                    spans.append(Span(span.batch, span.first_slot + start - begin, stop - start))
                begin += span.num_slots
            return spans
        for row in numbers:
            batch, slot = self._locate(row)
            last = spans[-1] if spans else None
            if last and last.batch is batch and last.first_slot + last.num_slots == slot:
                spans[-1] = last._replace(num_slots=last.num_slots + 1)
            else:
                spans.append(Span(batch, slot, 1))
        return spans

    def _locate(self, row: int) -> tuple[Batch, int]:
        for span in self.spans:
            if row < span.num_slots:
                return span.batch, span.first_slot + row
            row -= span.num_slots
        raise AssertionError("row numbers were checked")

    def close(self) -> None:
        """Declare the slots done; nothing can be taken afterwards. May be called twice."""
        if not self._closed:
            self._closed = True
            self._on_close(self)

    def __enter__(self) -> SlotLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"SlotLease({self.count} rows)"

    def __reduce__(self) -> str:
        raise TypeError("pads are secret and are never pickled")
