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
def _epoch_end(first: int, log2_epoch: int, number: int, stride: int, left: int) -> int:
    """How many of ``left`` transfers from COT ``number`` belong to its epoch."""
    end = ((number >> log2_epoch) + 1) << log2_epoch
    return min(left, (end - number + stride - 1) // stride)


@kernel
def hash_all(
    bases: Array, offsets: Array, round_keys: Array, start: int, log2_epoch: int, first: int,
    stride: int, pads: Array,
) -> None:  # fmt: skip
    """pads[i, e] = H(bases[i] ^ offsets[e]): every pad of each transfer.

    bases (n, 2), offsets (M, 2), pads (n, M, P); tweak of block k: (first + i stride, 256 k + e).
    round_keys (epochs, 11, 2), from the epoch of COT ``start``: a transfer has that of its first
    COT. Needs AES instructions.
    """
    lo, zero = 0, start >> log2_epoch
    while lo < bases.shape[0]:
        number = first + lo * stride
        hi = lo + _epoch_end(first, log2_epoch, number, stride, bases.shape[0] - lo)
        keys = round_keys[(number >> log2_epoch) - zero]
        if offsets.shape[0] >= GROUP:
            _hash_wide(bases[lo:hi], offsets, keys, number, stride, pads[lo:hi])
        else:
            _hash_narrow(bases[lo:hi], offsets, keys, number, stride, pads[lo:hi])
        lo = hi


@kernel
def _hash_narrow(
    bases: Array, offsets: Array, round_keys: Array, first: int, stride: int, pads: Array
) -> None:
    """``hash_all`` within an epoch, several transfers in a group."""
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
    """``hash_all`` within an epoch for groups of one transfer: straight loops, which vectorise."""
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
    bases: Array, indices: Array, round_keys: Array, start: int, log2_epoch: int, first: int,
    stride: int, pads: Array,
) -> None:  # fmt: skip
    """pads[i] = H(bases[i]) with the tweak of index ``indices[i]``: the pad a receiver can know.

    bases (n, 2), indices uint8 (n,), pads (n, P). Else as ``hash_all``.
    """
    x, y = np.zeros((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    z, index = np.empty((GROUP, 2), np.uint64), np.zeros(GROUP, np.uint64)
    tweak = np.zeros(GROUP, np.uint64)
    lo, zero = 0, start >> log2_epoch
    while lo < bases.shape[0]:
        number = first + lo * stride
        count = min(GROUP, _epoch_end(first, log2_epoch, number, stride, bases.shape[0] - lo))
        for s in range(count):
            index[s] = np.uint64(indices[lo + s])
            tweak[s] = np.uint64(number + s * stride)
            x[s, 0], x[s, 1] = bases[lo + s, 0], bases[lo + s, 1]
        keys = round_keys[(number >> log2_epoch) - zero]
        _hash_group(x, y, z, tweak, index, keys, pads[lo : lo + count])
        lo += count


@kernel
def hash_rows(
    keys: Array, offsets: Array, round_keys: Array, start: int, log2_epoch: int, first: int,
    m: int, words: int, bits: int, pads: Array,
) -> None:  # fmt: skip
    """``hash_all`` for the rows of products: of pad (i m + j, e) only what row j needs.

    Row j has ``words`` words of ``bits`` - j bits. keys (n m, 2), pads (n m, 2, P). The blocks of
    one pad fill a group, since there are many of them.
    """
    total, zero = 2 * keys.shape[0], start >> log2_epoch
    x, y = np.zeros((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    z, once = np.empty((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    lo = 0
    while lo < total:
        epoch = (first + (lo >> 1)) >> log2_epoch
        count = min(GROUP, min(total, 2 * (((epoch + 1) << log2_epoch) - first)) - lo)
        for s in range(count):
            c, e = (lo + s) >> 1, (lo + s) & 1
            x[s, 0], x[s, 1] = keys[c, 0] ^ offsets[e, 0], keys[c, 1] ^ offsets[e, 1]
        encrypt_group(x, round_keys[epoch - zero], once)
        for s in range(count):
            c, e = (lo + s) >> 1, (lo + s) & 1
            pad, number = pads[c, e], np.uint64(first + c)
            needed = (words * (bits - c % m) + 127) >> 7
            low, high = once[s, 0], once[s, 1]
            for block in range(0, needed, GROUP):
                for k in range(GROUP):
                    y[k, 0] = low ^ number
                    y[k, 1] = high ^ np.uint64((block + k) << 8 | e)
                encrypt_group(y, round_keys[epoch - zero], z)
                for k in range(min(GROUP, needed - block)):
                    pad[2 * (block + k)] = z[k, 0] ^ low
                    pad[2 * (block + k) + 1] = z[k, 1] ^ high
        lo += count


@kernel
def bits_at(words: Array, start: int, bits: int) -> np.uint64:
    """``bits`` bits (1 to 64) of a row of words from bit ``start``."""
    at, shift = start >> 6, np.uint64(start & 63)
    value = words[at] >> shift
    if shift + np.uint64(bits) > np.uint64(64):
        value |= words[at + 1] << (np.uint64(64) - shift)
    return value & (~np.uint64(0) >> np.uint64(64 - bits))


@kernel
def read_words(words: Array, first: int, bits: int, out: Array) -> None:
    """``bits_at`` from bit ``first`` on, one after the other, without branches: vector loads."""
    one, mask = np.uint64(1), ~np.uint64(0) >> np.uint64(64 - bits)
    last = words.shape[0] - 1
    for k in range(out.shape[0]):
        start = first + k * bits
        at, shift = start >> 6, np.uint64(start & 63)
        # A word that does not reach into the next one leaves nothing of it below the mask.
        above = (words[min(at + 1, last)] << one) << (np.uint64(63) - shift)
        out[k] = ((words[at] >> shift) | above) & mask


@kernel
def append(
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
    """``append`` of columns (parts, M): 64 bits of each part, and ``last_bits`` of the last."""
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
def mask_chosen(
    messages: Array, flips: Array, pads: Array, bits: int, packed: Array, state: Array
) -> None:
    """Message m xor pad m ^ flips[i], ``bits`` bits each, end to end.

    messages (n, M, w), flips (n,), pads (n, M, P), packed: uint64 words. ``state``: what ``append``
    has pending, and where.
    """
    if messages.shape[2] > 1:
        _mask_rows(messages, flips, pads, bits, packed, state)
        return
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    num_messages = messages.shape[1]
    values = np.empty(num_messages, np.uint64)
    pending, fill, at = state[0], state[1], np.int64(state[2])
    for i in range(messages.shape[0]):
        flip = np.int64(flips[i])
        for m in range(num_messages):
            values[m] = (messages[i, m, 0] ^ pads[i, m ^ flip, 0]) & mask
        pending, fill, at = append(values, bits, packed, pending, fill, at)
    state[0], state[1], state[2] = pending, fill, np.uint64(at)


@kernel
def _mask_rows(
    messages: Array, flips: Array, pads: Array, bits: int, packed: Array, state: Array
) -> None:
    """``mask_chosen`` for several words: a packed message lies bit by bit under its pad."""
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    num_messages, num_words = messages.shape[1], messages.shape[2]
    parts = (num_words * bits + 63) // 64
    last_bits = num_words * bits - 64 * (parts - 1)
    last_mask = ~np.uint64(0) >> np.uint64(64 - last_bits)
    columns = np.empty((parts, num_messages), np.uint64)
    pending, fill, at = state[0], state[1], np.int64(state[2])
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
    state[0], state[1], state[2] = pending, fill, np.uint64(at)


@kernel
def pad_words(pads: Array, bits: int, out: Array) -> None:
    """The first words of each pad, ``bits`` bits each: (N, P) -> uint64 (N, w)."""
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = bits_at(pads[i], k * bits, bits)
