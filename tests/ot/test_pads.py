"""Pads against their definition in Python integers, and the ledger of tweaks."""

from __future__ import annotations

import hashlib
import itertools
import os

import numpy as np
import pytest
from ot_helpers import block_int, field_product, random_words, reference_hash

from otpipe.errors import ParameterError
from otpipe.kernels import aes_native
from otpipe.ot.pads import TweakLedger, blocks_per_pad, hash_key, offset_table
from otpipe.ot.pads_cpu import CpuHash, combine
from otpipe.ot.params import OtParams

PARAMS = OtParams("test", 4, log2_epoch=10, log2_max_cots=20)
PATHS = [False] + ([True] if aes_native.NATIVE else [])
ALPHA = 2


def power(j: int) -> int:
    value = 1
    for _ in range(j):
        value = field_product(value, ALPHA)
    return value


def test_the_field_has_its_known_product() -> None:
    """alpha^127 alpha = alpha^7 + alpha^2 + alpha + 1."""
    assert field_product(1 << 127, ALPHA) == 0b10000111


@pytest.mark.parametrize("index_bits", range(1, 9))
def test_combination_and_offsets(index_bits: int) -> None:
    keys, delta = random_words(5 * index_bits, 2), os.urandom(16)
    keys[:, 1] |= np.uint64(1 << 63)  # every product reduces
    got = combine(keys, index_bits)
    offsets = offset_table(delta, index_bits)
    for i in range(5):
        want = 0
        for j in range(index_bits):
            want ^= field_product(power(j), block_int(keys[i * index_bits + j]))
        assert block_int(got[i]) == want
    for m in range(1 << index_bits):
        assert block_int(offsets[m]) == field_product(m, int.from_bytes(delta, "little"))
    # distinct indices have distinct, hence invertible, differences
    assert len({block_int(offset) for offset in offsets}) == 1 << index_bits


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize(("index_bits", "blocks"), [(1, 1), (3, 2), (8, 1)])
def test_every_pad_is_its_definition(index_bits: int, blocks: int, native: bool) -> None:
    n, session = 9, os.urandom(64)
    bases, offsets = random_words(n, 2), offset_table(os.urandom(16), index_bits)
    first = 1024 - 3 * index_bits  # passes into the second epoch
    pads = CpuHash(session, TweakLedger(PARAMS), native).all_pads(
        bases, offsets, first, index_bits, blocks
    )
    assert pads.shape == (n, 1 << index_bits, 2 * blocks)
    for i in (0, 2, 3, n - 1):
        for index in {0, 1, (1 << index_bits) - 1}:
            number = first + i * index_bits
            x = block_int(bases[i]) ^ block_int(offsets[index])
            for block in range(blocks):
                want = reference_hash(session, number, index, block, x, number // 1024)
                assert block_int(pads[i, index, 2 * block : 2 * block + 2]) == want


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("index_bits", [1, 2, 5, 8])
def test_the_receiver_has_the_pad_of_its_index_only(index_bits: int, native: bool) -> None:
    n, session, delta = 50, os.urandom(64), os.urandom(16)
    q = random_words(n * index_bits, 2)
    indices = np.frombuffer(os.urandom(n), np.uint8) & np.uint8((1 << index_bits) - 1)
    bits = np.unpackbits(indices[:, None], axis=1, count=index_bits, bitorder="little").reshape(-1)
    t = q ^ bits[:, None].astype(np.uint64) * np.frombuffer(delta, np.uint64)
    offsets = offset_table(delta, index_bits)
    everything = CpuHash(session, TweakLedger(PARAMS), native).all_pads(
        combine(q, index_bits), offsets, 0, index_bits, 2
    )
    own = CpuHash(session, TweakLedger(PARAMS), native).chosen_pads(
        combine(t, index_bits), indices, 0, index_bits, 2
    )
    same = (everything == own[:, None, :]).all(axis=2)
    assert np.array_equal(same, np.arange(1 << index_bits) == indices[:, None])


def test_hash_key_is_pinned() -> None:
    """A change of the derivation is a change of the protocol."""
    want = hashlib.sha256(b"otpipe OT hash key v1" + b"session" + bytes([5]) + bytes(7)).digest()
    assert hash_key(b"session", 5) == want[:16]


def test_tmmo_known_answer() -> None:
    """pi(pi(x) + tweak) + pi(x), spelled out with pycryptodome."""
    session = bytes(64)
    bases = np.array([[1, 2]], np.uint64)
    (pad,) = CpuHash(session, TweakLedger(PARAMS)).chosen_pads(
        bases, np.array([3], np.uint8), 7, 1, 1
    )
    assert block_int(pad) == reference_hash(session, 7, 3, 0, 1 | 2 << 64, 0)
    assert pad.tobytes().hex() == "228ffea9340847e7b9ae0778122341bd"


def test_blocks_per_pad() -> None:
    assert [blocks_per_pad(1, 1), blocks_per_pad(2, 64), blocks_per_pad(3, 43)] == [1, 1, 2]


def test_ledger_refuses_what_was_used() -> None:
    ledger = TweakLedger(PARAMS)
    ledger.claim(0, 100)
    ledger.claim(200, 50)
    for first in (0, 99, 100, 249):
        with pytest.raises(RuntimeError, match=f"Hash tweak {first} was used before in this"):
            ledger.claim(first, 1)
    assert ledger.next == 250


def test_ledger_refuses_what_lies_beyond_the_session() -> None:
    ledger = TweakLedger(PARAMS)
    ledger.claim(0, 1 << 20)
    with pytest.raises(
        ParameterError,
        match="would pass its limit of 1048576 transfers; open a new connection, which has new",
    ):
        ledger.claim(1 << 20, 1)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_epochs_cover_every_transfer_once(stride: int) -> None:
    ranges = list(TweakLedger(PARAMS).epochs(1000, 700, stride))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 700
    for before, after in itertools.pairwise(ranges):
        assert before[1] == after[0]
        assert before[2] < after[2]
    for lo, hi, epoch in ranges:
        assert (1000 + lo * stride) // 1024 == (1000 + (hi - 1) * stride) // 1024 == epoch


def test_every_hash_passes_the_ledger() -> None:
    guarded = CpuHash(b"session", TweakLedger(PARAMS))
    guarded.in_pieces(0, 10, 2, 1, lambda lo, hi: None)
    with pytest.raises(RuntimeError, match="Hash tweak 19 was used before"):
        guarded.in_pieces(19, 1, 1, 1, lambda lo, hi: None)


def test_pieces_cover_every_transfer_once_in_whole_words() -> None:
    seen: list[tuple[int, int]] = []
    CpuHash(b"session", TweakLedger(PARAMS)).in_pieces(
        0, 1000, 1, 256, lambda lo, hi: seen.append((lo, hi))
    )
    seen.sort()
    assert [hi for _, hi in seen[:-1]] == [lo for lo, _ in seen[1:]]
    assert (seen[0][0], seen[-1][1]) == (0, 1000)
    assert all(lo % 64 == 0 for lo, _ in seen)
