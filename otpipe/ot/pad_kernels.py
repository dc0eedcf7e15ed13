"""Compiled passes of pads and masks, for both parties on a CPU.

Blocks of 128 bits are rows (2,) of uint64, the low half first. The definition of a pad is in
``pads``; the plain twins of these passes are in ``torch_ops``, which the tests compare.

Shape suffixes: n transfers, M messages of one transfer, w words of a message, P words of a pad.
"""

from __future__ import annotations

import numpy as np

from otpipe.kernels.aes_native import GROUP, encrypt_group
from otpipe.kernels.cpu import Array, kernel


@kernel
def combine(keys: Array, index_bits: int, out: Array) -> None:
    """out[i] = sum over j of alpha^j keys[i index_bits + j]; keys (n index_bits, 2), out (n, 2).

    In GF(2^128) = GF(2)[alpha] / (alpha^128 + alpha^7 + alpha^2 + alpha + 1), bit j the coefficient
    of alpha^j.
    """
    one, top = np.uint64(1), np.uint64(63)
    for i in range(out.shape[0]):
        last = (i + 1) * index_bits - 1
        low, high = keys[last, 0], keys[last, 1]
        for j in range(1, index_bits):
            reduced = (np.uint64(0) - (high >> top)) & np.uint64(0b10000111)
            high = ((high << one) | (low >> top)) ^ keys[last - j, 1]
            low = (low << one) ^ reduced ^ keys[last - j, 0]
        out[i, 0], out[i, 1] = low, high


@kernel
def _hash_group(
    x: Array, y: Array, z: Array, tweak: Array, index: Array, round_keys: Array, pads: Array
) -> None:
    """TMMO on up to sixteen blocks x; y, z are scratch (16, 2), pads (count, P)."""
    encrypt_group(x, round_keys, y)
    for block in range(pads.shape[1] // 2):
        high = np.uint64(block << 8)
        for s in range(GROUP):
            z[s, 0] = y[s, 0] ^ tweak[s]
            z[s, 1] = y[s, 1] ^ (high | index[s])
        encrypt_group(z, round_keys, x)
        for s in range(pads.shape[0]):
            pads[s, 2 * block] = x[s, 0] ^ y[s, 0]
            pads[s, 2 * block + 1] = x[s, 1] ^ y[s, 1]


@kernel
def hash_all(
    bases: Array, offsets: Array, round_keys: Array, first: int, stride: int, pads: Array
) -> None:
    """pads[i, e] = H(bases[i] ^ offsets[e]): every pad of each transfer.

    bases (n, 2), offsets (M, 2), pads (n, M, P); tweak of block k: (first + i stride, 256 k + e).
    Needs AES instructions.
    """
    if offsets.shape[0] >= GROUP:
        _hash_wide(bases, offsets, round_keys, first, stride, pads)
        return
    num_messages = offsets.shape[0]
    index_bits = 0
    while num_messages >> (index_bits + 1):
        index_bits += 1
    total = bases.shape[0] * num_messages
    x, y = np.zeros((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    z, index = np.empty((GROUP, 2), np.uint64), np.zeros(GROUP, np.uint64)
    tweak = np.zeros(GROUP, np.uint64)
    flat = pads.reshape(total, pads.shape[2])
    for start in range(0, total, GROUP):
        count = min(GROUP, total - start)
        for s in range(count):
            i, e = (start + s) >> index_bits, (start + s) & (num_messages - 1)
            index[s] = np.uint64(e)
            tweak[s] = np.uint64(first + i * stride)
            x[s, 0] = bases[i, 0] ^ offsets[e, 0]
            x[s, 1] = bases[i, 1] ^ offsets[e, 1]
        _hash_group(x, y, z, tweak, index, round_keys, flat[start : start + count])


@kernel
def _hash_wide(
    bases: Array, offsets: Array, round_keys: Array, first: int, stride: int, pads: Array
) -> None:
    """``hash_all`` for whole groups of one transfer: straight loops, which vectorise."""
    size = 2 * GROUP
    x, y, z = np.empty(size, np.uint64), np.empty(size, np.uint64), np.empty(size, np.uint64)
    base, tweak = np.empty(size, np.uint64), np.zeros(size, np.uint64)
    indices = np.zeros(2 * offsets.shape[0], np.uint64)
    for e in range(offsets.shape[0]):
        indices[2 * e + 1] = np.uint64(e)
    added = offsets.reshape(-1)
    num_blocks = pads.shape[2] // 2
    for i in range(bases.shape[0]):
        for s in range(GROUP):
            base[2 * s], base[2 * s + 1] = bases[i, 0], bases[i, 1]
            tweak[2 * s] = np.uint64(first + i * stride)
        for start in range(0, offsets.shape[0], GROUP):
            offset, index = added[2 * start : 2 * start + size], indices[2 * start :]
            for j in range(size):
                x[j] = base[j] ^ offset[j]
            encrypt_group(x, round_keys, y)
            for block in range(num_blocks):
                for s in range(GROUP):
                    tweak[2 * s + 1] = np.uint64(block << 8)
                for j in range(size):
                    z[j] = y[j] ^ tweak[j] ^ index[j]
                encrypt_group(z, round_keys, x)
                for s in range(GROUP):
                    pads[i, start + s, 2 * block] = x[2 * s] ^ y[2 * s]
                    pads[i, start + s, 2 * block + 1] = x[2 * s + 1] ^ y[2 * s + 1]


@kernel
def hash_one(
    bases: Array, indices: Array, round_keys: Array, first: int, stride: int, pads: Array
) -> None:
    """pads[i] = H(bases[i]) with the tweak of index ``indices[i]``: the pad a receiver can know.

    bases (n, 2), indices uint8 (n,), pads (n, P). Needs AES instructions.
    """
    total = bases.shape[0]
    x, y = np.zeros((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    z, index = np.empty((GROUP, 2), np.uint64), np.zeros(GROUP, np.uint64)
    tweak = np.zeros(GROUP, np.uint64)
    for start in range(0, total, GROUP):
        count = min(GROUP, total - start)
        for s in range(count):
            index[s] = np.uint64(indices[start + s])
            tweak[s] = np.uint64(first + (start + s) * stride)
            x[s, 0], x[s, 1] = bases[start + s, 0], bases[start + s, 1]
        _hash_group(x, y, z, tweak, index, round_keys, pads[start : start + count])


@kernel
def _bits_at(words: Array, start: int, bits: int) -> np.uint64:
    """``bits`` bits (1 to 64) of a row of words from bit ``start``."""
    at, shift = start >> 6, np.uint64(start & 63)
    value = words[at] >> shift
    if shift + np.uint64(bits) > np.uint64(64):
        value |= words[at + 1] << (np.uint64(64) - shift)
    return value & (~np.uint64(0) >> np.uint64(64 - bits))


@kernel
def _read_words(words: Array, first: int, bits: int, out: Array) -> None:
    """``_bits_at`` from bit ``first`` on, one after the other, without branches: vector loads."""
    one, mask = np.uint64(1), ~np.uint64(0) >> np.uint64(64 - bits)
    last = words.shape[0] - 1
    for k in range(out.shape[0]):
        start = first + k * bits
        at, shift = start >> 6, np.uint64(start & 63)
        # A word that does not reach into the next one leaves nothing of it below the mask.
        above = (words[min(at + 1, last)] << one) << (np.uint64(63) - shift)
        out[k] = ((words[at] >> shift) | above) & mask


@kernel
def _append(
    values: Array, bits: int, packed: Array, pending: np.uint64, fill: np.uint64, at: int
) -> tuple[np.uint64, np.uint64, int]:
    """Pack values below 2^bits behind ``fill`` pending bits; returns the writer's new state."""
    width = np.uint64(bits)
    for j in range(values.shape[0]):
        value = values[j]
        pending |= value << fill
        fill += width
        if fill >= np.uint64(64):
            packed[at] = pending
            at += 1
            fill -= np.uint64(64)
            pending = value >> (width - fill) if fill > np.uint64(0) else np.uint64(0)
    return pending, fill, at


@kernel
def _append_columns(
    columns: Array, last_bits: int, packed: Array, pending: np.uint64, fill: np.uint64, at: int
) -> tuple[np.uint64, np.uint64, int]:
    """``_append`` of columns (parts, M): 64 bits of each part, and ``last_bits`` of the last."""
    one, width = np.uint64(1), np.uint64(last_bits)
    last = columns.shape[0] - 1
    for m in range(columns.shape[1]):
        for part in range(last):
            value = columns[part, m]
            packed[at] = pending | (value << fill)
            at += 1
            pending = (value >> one) >> (np.uint64(63) - fill)
        value = columns[last, m]
        pending |= value << fill
        fill += width
        if fill >= np.uint64(64):
            packed[at] = pending
            at += 1
            fill -= np.uint64(64)
            pending = value >> (width - fill) if fill > np.uint64(0) else np.uint64(0)
    return pending, fill, at


@kernel
def mask_chosen(messages: Array, flips: Array, pads: Array, bits: int, packed: Array) -> None:
    """Message m xor pad m ^ flips[i], ``bits`` bits each, end to end.

    messages (n, M, w), flips uint8 (n,), pads (n, M, P), packed: uint64 words.
    """
    if messages.shape[2] > 1:
        _mask_rows(messages, flips, pads, bits, packed)
        return
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    num_messages = messages.shape[1]
    values = np.empty(num_messages, np.uint64)
    pending, fill, at = np.uint64(0), np.uint64(0), 0
    for i in range(messages.shape[0]):
        flip = np.int64(flips[i])
        for m in range(num_messages):
            values[m] = (messages[i, m, 0] ^ pads[i, m ^ flip, 0]) & mask
        pending, fill, at = _append(values, bits, packed, pending, fill, at)
    if fill > np.uint64(0):
        packed[at] = pending


@kernel
def _mask_rows(messages: Array, flips: Array, pads: Array, bits: int, packed: Array) -> None:
    """``mask_chosen`` for several words: a packed message lies bit by bit under its pad."""
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    num_messages, num_words = messages.shape[1], messages.shape[2]
    parts = (num_words * bits + 63) // 64
    last_bits = num_words * bits - 64 * (parts - 1)
    last_mask = ~np.uint64(0) >> np.uint64(64 - last_bits)
    columns = np.empty((parts, num_messages), np.uint64)
    pending, fill, at = np.uint64(0), np.uint64(0), 0
    for i in range(messages.shape[0]):
        flip = np.int64(flips[i])
        for part in range(parts):
            column, used = columns[part], last_mask if part == parts - 1 else ~np.uint64(0)
            for m in range(num_messages):
                column[m] = pads[i, m ^ flip, part] & used
        for k in range(num_words):
            part, shift = k * bits >> 6, np.uint64(k * bits & 63)
            column = columns[part]
            for m in range(num_messages):
                column[m] ^= (messages[i, m, k] & mask) << shift
            if shift + np.uint64(bits) > np.uint64(64):
                column, down = columns[part + 1], np.uint64(64) - shift
                for m in range(num_messages):
                    column[m] ^= (messages[i, m, k] & mask) >> down
        pending, fill, at = _append_columns(columns, last_bits, packed, pending, fill, at)
    if fill > np.uint64(0):
        packed[at] = pending


@kernel
def mask_correlated(
    correlation: Array, flips: Array, pads: Array, bits: int, x: Array, packed: Array
) -> None:
    """x = pad d, packed = x + correlation - pad (1 ^ d) mod 2^bits, d = flips[i].

    correlation and x (n, w), flips uint8 (n,), pads (n, 2, P), packed: uint64 words.
    """
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    values = np.empty(correlation.shape[1], np.uint64)
    pending, fill, at = np.uint64(0), np.uint64(0), 0
    for i in range(correlation.shape[0]):
        flip = np.int64(flips[i])
        if values.shape[0] == 1:
            x[i, 0] = pads[i, flip, 0] & mask
            values[0] = (x[i, 0] + correlation[i, 0] - pads[i, 1 ^ flip, 0]) & mask
        else:
            own, row = x[i], correlation[i]
            _read_words(pads[i, flip], 0, bits, own)
            _read_words(pads[i, 1 ^ flip], 0, bits, values)
            for k in range(values.shape[0]):
                values[k] = (own[k] + row[k] - values[k]) & mask
        pending, fill, at = _append(values, bits, packed, pending, fill, at)
    if fill > np.uint64(0):
        packed[at] = pending


@kernel
def open_chosen(
    packed: Array, indices: Array, num_messages: int, pads: Array, bits: int, out: Array
) -> None:
    """out[i] = packed message ``indices[i]`` of transfer i, xor pad: pads (n, P), out (n, w)."""
    num_words = out.shape[1]
    for i in range(out.shape[0]):
        start = (i * num_messages + np.int64(indices[i])) * num_words * bits
        for k in range(num_words):
            out[i, k] = _bits_at(packed, start + k * bits, bits) ^ _bits_at(pads[i], k * bits, bits)


@kernel
def open_correlated(packed: Array, choices: Array, pads: Array, bits: int, out: Array) -> None:
    """out[i] = pad + choice times the packed words, mod 2^bits: pads (n, P), out (n, w)."""
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    num_words = out.shape[1]
    sent = np.empty(num_words, np.uint64)
    for i in range(out.shape[0]):
        chosen, row = np.uint64(0) - np.uint64(choices[i]), out[i]
        _read_words(packed, i * num_words * bits, bits, sent)
        _read_words(pads[i], 0, bits, row)
        for k in range(num_words):
            row[k] = (row[k] + (sent[k] & chosen)) & mask


@kernel
def pad_words(pads: Array, bits: int, out: Array) -> None:
    """The first words of each pad, ``bits`` bits each: (N, P) -> uint64 (N, w)."""
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = _bits_at(pads[i], k * bits, bits)
