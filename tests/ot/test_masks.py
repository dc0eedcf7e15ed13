"""Masking and packing against big integers, and every torch twin against its compiled pass."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ot_helpers import packed_integer, random_choices, random_values, random_words

from otpipe.ot import masks_cpu, torch_ops
from otpipe.ot.extension import TreeLayout
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import TweakLedger, blocks_per_pad, offset_table
from otpipe.ot.pads_cpu import CpuHash, combine
from otpipe.ot.params import DEFAULT_OT_PARAMS, OtParams
from otpipe.ot.sender_cpu import CpuSenderMath
from otpipe.ot.sender_device import DeviceSenderMath, combined

PARAMS = OtParams("test", 8, log2_epoch=10)


def masks(session: bytes = b"session") -> masks_cpu.CpuMasks:
    return masks_cpu.CpuMasks(CpuHash(session, TweakLedger(PARAMS)))


def pad_integers(pads: np.ndarray, words: int, bits: int) -> list[int]:
    """Words of each pad (N, P), one after the other."""
    values = []
    for pad in pads.reshape(-1, pads.shape[-1]):
        whole = int.from_bytes(pad.tobytes(), "little")
        values += [whole >> (k * bits) & ((1 << bits) - 1) for k in range(words)]
    return values


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 130),
    index_bits=st.integers(1, 5),
    words=st.integers(1, 4),
    bits=st.integers(1, 64),
)
def test_masked_messages_are_messages_xor_pads(
    n: int, index_bits: int, words: int, bits: int
) -> None:
    bases, offsets = random_words(n, 2), offset_table(os.urandom(16), index_bits)
    flips = random_choices(n, index_bits).numpy()
    messages = random_words(n, 1 << index_bits, words)
    packed = masks().mask_chosen(bases, offsets, 5, index_bits, flips, messages, bits)
    pads = CpuHash(b"session", TweakLedger(PARAMS)).all_pads(
        bases, offsets, 5, index_bits, blocks_per_pad(words, bits)
    )
    pads = pads[np.arange(n)[:, None], np.arange(1 << index_bits) ^ flips[:, None]]
    values = [
        message ^ pad
        for message, pad in zip(
            messages.reshape(-1).tolist(), pad_integers(pads, words, bits), strict=True
        )
    ]
    assert packed.tobytes() == packed_integer([v & ((1 << bits) - 1) for v in values], bits)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), words=st.integers(1, 4), bits=st.integers(1, 64))
def test_masked_correlations(n: int, words: int, bits: int) -> None:
    bases, offsets = random_words(n, 2), offset_table(os.urandom(16), 1)
    flips, correlation = random_choices(n).numpy(), random_words(n, words)
    x, packed = masks().mask_correlated(bases, offsets, 3, flips, correlation, bits)
    pads = CpuHash(b"session", TweakLedger(PARAMS)).all_pads(
        bases, offsets, 3, 1, blocks_per_pad(words, bits)
    )
    transfer = np.arange(n)
    pad_0 = pad_integers(pads[transfer, flips], words, bits)
    pad_1 = pad_integers(pads[transfer, 1 ^ flips], words, bits)
    assert x.reshape(-1).tolist() == pad_0
    sent = [
        a + c - b for a, c, b in zip(pad_0, correlation.reshape(-1).tolist(), pad_1, strict=True)
    ]
    assert packed.tobytes() == packed_integer(sent, bits)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 100), bits=st.integers(1, 8))
def test_choices_are_packed_without_gaps(n: int, bits: int) -> None:
    values = random_choices(n, bits).numpy() if n else np.empty(0, np.uint8)
    packed = masks_cpu.pack_bits(values, bits)
    assert packed.tobytes() == packed_integer(values.tolist(), bits)
    assert np.array_equal(masks_cpu.unpack_bits(packed, n, bits), values)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 150), bits=st.integers(1, 64))
def test_packing_twin(n: int, bits: int) -> None:
    values = random_values((n,), bits)
    want = packed_integer([v % (1 << 64) for v in values.tolist()], bits)
    assert torch_ops.pack(values, bits).numpy().tobytes() == want


@pytest.mark.parametrize("index_bits", [1, 2, 8])
def test_combination_twin(index_bits: int) -> None:
    keys = random_words(20 * index_bits, 2)
    got = combined(torch.from_numpy(keys.view(np.int64)), index_bits)
    assert np.array_equal(got.numpy().view(np.uint64), combine(keys, index_bits))


@pytest.mark.parametrize(("words", "bits"), [(1, 1), (2, 64), (3, 43), (5, 37), (128, 1)])
def test_pad_word_twin(words: int, bits: int) -> None:
    pads = random_words(10, 2 * blocks_per_pad(words, bits))
    got = torch_ops.pad_words(torch.from_numpy(pads.view(np.int64)), words, bits)
    want = masks_cpu.pad_words(pads, words, bits)
    assert np.array_equal(got.numpy().view(np.uint64), want)


@pytest.mark.parametrize(
    ("index_bits", "words", "bits"), [(1, 1, 1), (1, 3, 37), (2, 1, 64), (8, 2, 44), (5, 7, 64)]
)
def test_device_twin_of_all_masks(index_bits: int, words: int, bits: int) -> None:
    """Plain torch on the CPU, bit for bit the compiled passes, across two hash keys."""
    n, first = 40, (1 << 39) - 20
    params = OtParams("test", 8, log2_epoch=10)
    layout = TreeLayout.of(params)
    seeds = np.zeros((params.num_leaves, 16), np.uint8)
    secrets = SenderSecrets(os.urandom(16), seeds, os.urandom(64))
    keys = random_values((n * index_bits, 2))
    flips = random_choices(n, index_bits).numpy()
    messages = random_values((n, 1 << index_bits, words))

    def run(math: CpuSenderMath | DeviceSenderMath) -> list[np.ndarray]:
        packed = math.mask_messages(keys, first, index_bits, flips, messages, bits)
        second = first + n * index_bits
        columns = messages[:, 0].T.contiguous().T  # any strides
        x, sent = math.mask_correlated(keys[:n], second, flips & 1, columns, bits)
        m0, m1 = math.random_pairs(keys[:n], second + n, bits)
        return [packed, x.numpy(), sent, m0.numpy(), m1.numpy()]

    cpu = run(CpuSenderMath(secrets, layout, TweakLedger(params)))
    twin = run(DeviceSenderMath(secrets, layout, TweakLedger(params), torch.device("cpu")))
    for got, want in zip(twin, cpu, strict=True):
        assert np.array_equal(got, want)


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
