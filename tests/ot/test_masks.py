"""Masking and packing against big integers, and every torch twin against its compiled pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asked import DELTA, FIRST, MIXED, PARAMS, Asked, cpu_math, device_math
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ot_helpers import packed_integer, random_values, random_words

from otpipe.kernels import aes_native
from otpipe.ot import masks_cpu, torch_ops
from otpipe.ot.extension import TreeLayout
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.masks_cpu import ChoiceBits
from otpipe.ot.pads import TweakLedger, blocks_per_pad, offset_table
from otpipe.ot.pads_cpu import CpuHash, combine
from otpipe.ot.params import DEFAULT_OT_PARAMS
from otpipe.ot.plan import Shape
from otpipe.ot.sender_device import DeviceSenderMath

PATHS = [False] + ([True] if aes_native.NATIVE else [])


def pad_integers(pads: np.ndarray, words: int, bits: int) -> list[int]:
    """Words of each pad (N, P), one after the other."""
    values = []
    for pad in pads.reshape(-1, pads.shape[-1]):
        whole = int.from_bytes(pad.tobytes(), "little")
        values += [whole >> (k * bits) & ((1 << bits) - 1) for k in range(words)]
    return values


def all_pads(keys: NDArray[np.uint64], index_bits: int, number: int, blocks: int) -> np.ndarray:
    """By the one pass that ``test_pads`` compares with the definition."""
    return CpuHash(b"session", TweakLedger(PARAMS), native=False).all_pads(
        combine(keys, index_bits), offset_table(DELTA, index_bits), number, index_bits, blocks
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 130),
    index_bits=st.integers(1, 5),
    words=st.integers(1, 4),
    bits=st.integers(1, 64),
    native=st.sampled_from(PATHS),
)
def test_masked_messages_are_messages_xor_pads(
    n: int, index_bits: int, words: int, bits: int, native: bool
) -> None:
    asked = Asked.of([Shape(False, n, index_bits, words, bits)]).answered(cpu_math(native))
    pads = all_pads(asked.keys, index_bits, FIRST, blocks_per_pad(words, bits))
    place = np.arange(1 << index_bits) ^ asked.flips.astype(np.int64)[:, None]
    pads = pads[np.arange(n)[:, None], place]
    messages = asked.values[0].numpy().view(np.uint64).reshape(-1).tolist()
    values = [
        message ^ pad
        for message, pad in zip(messages, pad_integers(pads, words, bits), strict=True)
    ]
    want = packed_integer([v & ((1 << bits) - 1) for v in values], bits)
    assert asked.packed.tobytes() == want


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 90),
    words=st.sampled_from([1, 2, 4, 33]),
    bits=st.integers(1, 64),
    factor_bits=st.integers(1, 64),
    native=st.sampled_from(PATHS),
)
def test_masked_products(n: int, words: int, bits: int, factor_bits: int, native: bool) -> None:
    """Bit j of factor i: the difference of its two pads and the row, mod 2^(bits - j)."""
    m = min(bits, factor_bits)
    asked = Asked.of([Shape(True, n, m, words, bits)]).answered(cpu_math(native))
    pads = all_pads(asked.keys, 1, FIRST, blocks_per_pad(words, bits)).reshape(n, m, 2, -1)
    whole, place = 0, 0
    for i in range(n):
        row, x = asked.values[0][i].tolist(), [0] * words
        for j in range(m):
            flip = int(asked.flips[i]) >> j & 1
            own = pad_integers(pads[i, j, flip], words, bits - j)
            other = pad_integers(pads[i, j, 1 - flip], words, bits - j)
            for k in range(words):
                x[k] += own[k] << j
                sent = (own[k] + row[k] - other[k]) % (1 << (bits - j))
                whole |= sent << place
                place += bits - j
        assert asked.results[0] is not None
        got = asked.results[0][i].numpy().view(np.uint64).tolist()
        assert got == [value % (1 << bits) for value in x]
    assert asked.packed.tobytes() == whole.to_bytes(-(-place // 8), "little")


@pytest.mark.parametrize("shapes", MIXED)
def test_requests_of_one_message_by_every_path(shapes: list[Shape]) -> None:
    """Compiled, portable and torch passes send the same bytes and keep the same results."""
    asked = Asked.of(shapes)
    want = asked.answered(cpu_math())
    for math in (cpu_math(native=False), device_math()):
        got = asked.answered(math)
        assert np.array_equal(got.packed, want.packed)
        for result, wanted in zip(got.results, want.results, strict=True):
            assert (result is None) == (wanted is None)
            assert result is None or wanted is None or torch.equal(result, wanted)


def test_a_device_works_through_a_message_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otpipe.ot.sender_device._PIECE_BLOCKS", 64)
    asked = Asked.of(MIXED[0])
    want, got = asked.answered(cpu_math()), asked.answered(device_math())
    assert np.array_equal(got.packed, want.packed)
    for result, wanted in zip(got.results, want.results, strict=True):
        assert result is None or wanted is None or torch.equal(result, wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_requests_of_one_message_on_several_cores(threads: int) -> None:
    """Spans of a message begin at whole words, whoever works on them."""
    before = torch.get_num_threads()
    asked = Asked.of(MIXED[3])
    want = asked.answered(cpu_math(native=False))
    try:
        torch.set_num_threads(threads)
        got = asked.answered(cpu_math())
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(got.packed, want.packed)
    assert got.results[0] is not None
    assert want.results[0] is not None
    assert torch.equal(got.results[0], want.results[0])


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 64)), min_size=1, max_size=4),
)
def test_choices_are_packed_without_gaps(counts: list[tuple[int, int]]) -> None:
    stream = ChoiceBits([Shape(True, n, width, 1, 64) for n, width in counts])
    values = [random_values((n,), width).numpy().view(np.uint64) for n, width in counts]
    want = b"".join(
        packed_integer(each.tolist(), width)
        for each, (_, width) in zip(values, counts, strict=True)
    )
    flat = np.concatenate(values)
    packed = stream.packed(flat)
    assert packed.tobytes() == want
    assert np.array_equal(stream.unpacked(packed), flat)
    bits = [
        [value >> j & 1 for j in range(width)]
        for each, (_, width) in zip(values, counts, strict=True)
        for value in each.tolist()
    ]
    spread = np.array([bit for each in bits for bit in each], np.uint8)
    assert np.array_equal(stream.gathered(spread), flat)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 150), bits=st.integers(1, 64))
def test_packing_twin(n: int, bits: int) -> None:
    values = random_values((n,), bits)
    want = packed_integer([v % (1 << 64) for v in values.tolist()], bits)
    assert torch_ops.pack(values, bits).numpy().tobytes() == want


@pytest.mark.parametrize("index_bits", [1, 2, 8])
def test_combination_twin(index_bits: int) -> None:
    keys = random_words(20 * index_bits, 2)
    got = torch_ops.combined(torch.from_numpy(keys.view(np.int64)), index_bits)
    assert np.array_equal(got.numpy().view(np.uint64), combine(keys, index_bits))


@pytest.mark.parametrize(("words", "bits"), [(1, 1), (2, 64), (3, 43), (5, 37), (128, 1)])
def test_pad_word_twin(words: int, bits: int) -> None:
    pads = random_words(10, 2 * blocks_per_pad(words, bits))
    got = torch_ops.pad_words(torch.from_numpy(pads.view(np.int64)), words, bits)
    want = masks_cpu.pad_words(pads, words, bits)
    assert np.array_equal(got.numpy().view(np.uint64), want)


def test_random_messages_twin() -> None:
    keys = random_values((40, 2))
    first = (1 << 39) - 20
    want = cpu_math().random_pairs(keys, first, 37)
    got = device_math().random_pairs(keys, first, 37)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_device_passes_the_ledger_too() -> None:
    layout = TreeLayout.of(DEFAULT_OT_PARAMS)
    seeds = np.zeros((DEFAULT_OT_PARAMS.num_leaves, 16), np.uint8)
    math = DeviceSenderMath(
        SenderSecrets(bytes(16), seeds, b""), layout, TweakLedger(DEFAULT_OT_PARAMS),
        torch.device("cpu"),
    )  # fmt: skip
    keys = random_values((4, 2))
    math.random_pairs(keys, 0, 8)
    with pytest.raises(RuntimeError, match="Hash tweak 3 was used before"):
        math.random_pairs(keys, 3, 8)
