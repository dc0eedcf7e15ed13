"""Messages of tables: the compiled passes and their torch twins against Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otpipe.secure.entries import Entries, IntervalEntries, Layout, RowEntries, Rows
from otpipe.secure.shares import random_ring

CPU = torch.device("cpu")
FIELDS = st.lists(st.integers(1, 62), min_size=1, max_size=4).filter(lambda each: sum(each) <= 180)


class Uncompiled:
    """The same entries by torch."""

    def __init__(self, entries: Entries) -> None:
        self.fields = entries.fields


def masks_of(field_bits: list[int], n: int) -> Tensor:
    return torch.stack([random_ring((n,), bits, CPU) for bits in field_bits])


def unpacked(message: list[int], word_bits: int, field_bits: list[int]) -> list[int]:
    whole = sum((word % (1 << 64)) << (k * word_bits) for k, word in enumerate(message))
    fields = []
    for bits in field_bits:
        fields.append(whole % (1 << bits))
        whole >>= bits
    assert whole == 0, "a message holds nothing beside its fields"
    return fields


@settings(max_examples=60, deadline=None)
@given(
    field_bits=FIELDS,
    n=st.integers(1, 9),
    index_bits=st.integers(1, 5),
    bits=st.integers(5, 9),
    step=st.integers(1, 40),
    flipped=st.booleans(),
)
def test_rows(
    field_bits: list[int], n: int, index_bits: int, bits: int, step: int, flipped: bool
) -> None:
    rows = masks_of(field_bits, 1 << bits).t().contiguous()
    starts, masks = random_ring((n,), bits, CPU), masks_of(field_bits, n)
    entries = RowEntries(Rows(rows), starts, step, bits, flipped)
    layout = Layout(field_bits)
    packed = layout.packed(entries, masks, index_bits)
    assert torch.equal(packed, layout.packed(Uncompiled(entries), masks, index_bits))
    assert packed.shape == (n, 1 << index_bits, layout.words)
    for i in range(n):
        for e in range(1 << index_bits):
            start = int(starts[i])
            row = start ^ e if flipped else (start + e * step) % (1 << bits)
            want = [
                (int(rows[row, f]) - int(masks[f, i])) % (1 << size)
                for f, size in enumerate(field_bits)
            ]
            assert unpacked(packed[i, e].tolist(), layout.word_bits, field_bits) == want
            fields = layout.unpacked(packed[i, e][None], len(field_bits))
            assert [int(field) for field in fields] == want


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    index_bits=st.integers(1, 8),
    bits=st.integers(8, 23),
    count=st.integers(1, 3),
)
def test_intervals(n: int, index_bits: int, bits: int, count: int) -> None:
    ring, step = 1 << bits, 1 << (bits - index_bits)
    lows, sizes = (random_ring((count,), bits, CPU).tolist() for _ in range(2))
    intervals = tuple((low - ring // 2, size) for low, size in zip(lows, sizes, strict=True))
    starts, masks = random_ring((n,), bits, CPU), masks_of([1] * count, n)
    entries = IntervalEntries(starts, step, bits, intervals)
    layout = Layout([1] * count)
    packed = layout.packed(entries, masks, index_bits)
    assert torch.equal(packed, layout.packed(Uncompiled(entries), masks, index_bits))
    for i in range(n):
        for e in range(1 << index_bits):
            x = int(starts[i]) + e * step
            want = [
                int((x - low) % ring < size) ^ int(masks[f, i])
                for f, (low, size) in enumerate(intervals)
            ]
            assert unpacked(packed[i, e].tolist(), layout.word_bits, [1] * count) == want


@pytest.mark.parametrize("threads", [1, 3])
def test_many_elements_on_several_cores(threads: int) -> None:
    field_bits = [19, 33, 33]
    rows = Rows(masks_of(field_bits, 1 << 12).t().contiguous())
    starts, masks = random_ring((5001,), 12, CPU), masks_of(field_bits, 5001)
    entries, layout = RowEntries(rows, starts, 1 << 7, 12), Layout(field_bits)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        packed = layout.packed(entries, masks, 5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, layout.packed(Uncompiled(entries), masks, 5))
