"""Compiled passes over all requests of one message, for both parties on a CPU.

A message holds the answers to many small requests, so what a request costs beside its bits counts.
The passes here take a table of *spans*: runs of transfers of one request, a row of integers each
(columns below). One call serves all of them without Python in between. ``pad_kernels`` hashes;
``masks_cpu`` calls, and has the portable path, whose pads go through the same masks.

Shape suffixes: n transfers, M messages of one transfer, w words, m bits of a factor, P words of a
pad, C COTs.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from otpipe.kernels.cpu import Array, kernel
from otpipe.ot.pad_kernels import (
    append,
    bits_at,
    combine,
    hash_all,
    hash_one,
    hash_rows,
    mask_chosen,
    read_words,
)

#: columns of a span
CORRELATED, COUNT, INDEX_BITS, WORDS, BITS, COT, ELEMENT, VALUES, RESULTS, PACKED, PADS = range(11)
COLUMNS = 11
"""
CORRELATED 1 or 0; COUNT transfers; INDEX_BITS, WORDS, BITS as in ``plan.Shape``; COT: the first
of its COTs among those of the exchange; ELEMENT: its first transfer among those of the exchange;
VALUES: address of the sender's values, uint64; RESULTS: address of either party's results; PACKED:
first 64-bit word of its answers; PADS: first word of the receiver's pads.
"""

_TILE_BLOCKS = 1 << 11
"""Pad blocks hashed at a time: 32 KiB, which stay in the first-level cache or close to it."""


def _typed_words(_context: Any, address: Any) -> Any:
    """The uint64 words at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint64)(types.int64), codegen


_words_at: Any = intrinsic(_typed_words)


@kernel
def pad_words_of(span: Array) -> int:
    """Words of one pad of a span: whole blocks, enough for its widest message."""
    return 2 * ((span[WORDS] * span[BITS] + 127) // 128)


@kernel
def _tile(span: Array, pads_per_transfer: int) -> int:
    """Transfers of a span whose pads are made at a time."""
    return max(1, 2 * _TILE_BLOCKS // (pads_per_transfer * pad_words_of(span)))


# --- choices ------------------------------------------------------------------------------------


@kernel
def gather_bits(bits: Array, counts: Array, widths: Array, out: Array) -> None:
    """Bits of each transfer as one integer, lowest first: uint8 (C,) to uint64 (n of all,)."""
    at = i = 0
    for request in range(counts.shape[0]):
        for _ in range(counts[request]):
            value = np.uint64(0)
            for j in range(widths[request]):
                value |= np.uint64(bits[at + j]) << np.uint64(j)
            at += widths[request]
            out[i] = value
            i += 1


@kernel
def pack_choices(values: Array, counts: Array, widths: Array, out: Array) -> None:
    """The low bits of uint64 values, end to end; each request ends at a whole byte of ``out``."""
    eight, at, i = np.uint64(8), 0, 0
    for request in range(counts.shape[0]):
        width, pending, fill = np.uint64(widths[request]), np.uint64(0), np.uint64(0)
        for _ in range(counts[request]):
            value, left = values[i], width
            i += 1
            while left > np.uint64(0):
                taken = min(left, eight - fill)
                pending |= (value & ((np.uint64(1) << taken) - np.uint64(1))) << fill
                value >>= taken
                fill += taken
                left -= taken
                if fill == eight:
                    out[at] = np.uint8(pending)
                    at += 1
                    pending, fill = np.uint64(0), np.uint64(0)
        if fill > np.uint64(0):
            out[at] = np.uint8(pending)
            at += 1


@kernel
def unpack_choices(packed: Array, counts: Array, widths: Array, out: Array) -> None:
    """Inverse of ``pack_choices``."""
    eight, at, i = np.uint64(8), 0, 0
    for request in range(counts.shape[0]):
        width, pending, fill = np.uint64(widths[request]), np.uint64(0), np.uint64(0)
        for _ in range(counts[request]):
            value, have = np.uint64(0), np.uint64(0)
            while have < width:
                if fill == np.uint64(0):
                    pending, fill = np.uint64(packed[at]), eight
                    at += 1
                taken = min(width - have, fill)
                value |= (pending & ((np.uint64(1) << taken) - np.uint64(1))) << have
                pending >>= taken
                fill -= taken
                have += taken
            out[i] = value
            i += 1


# --- the sender ---------------------------------------------------------------------------------


@kernel
def answer_spans(
    spans: Array, keys: Array, offsets: Array, flips: Array, round_keys: Array, first: int,
    log2_epoch: int, packed: Array,
) -> None:  # fmt: skip
    """Hash and mask every span. Needs AES instructions.

    keys (C, 2), offsets (M, 2), flips (n of all,), round_keys (epochs, 11, 2) from that of COT
    ``first``, the first of ``keys``; packed: uint64 words.
    """
    size = 0
    for s in range(spans.shape[0]):
        span = spans[s]
        pads = 2 * span[INDEX_BITS] if span[CORRELATED] else 1 << span[INDEX_BITS]
        size = max(size, _tile(span, pads) * pads * pad_words_of(span))
    scratch, state = np.empty(size, np.uint64), np.zeros(3, np.uint64)
    for s in range(spans.shape[0]):
        span = spans[s]
        state[:] = np.uint64(0)
        target = packed[span[PACKED] :]
        m, num_words, width = span[INDEX_BITS], span[WORDS], pad_words_of(span)
        num_pads = 2 * m if span[CORRELATED] else 1 << m
        step = _tile(span, num_pads)
        for lo in range(0, span[COUNT], step):
            count = min(step, span[COUNT] - lo)
            cot, at = span[COT] + lo * m, span[ELEMENT] + lo
            own, flip = keys[cot : cot + count * m], flips[at : at + count]
            pads = scratch[: count * num_pads * width]
            number = first + cot
            if span[CORRELATED]:
                rows = pads.reshape(count * m, 2, width)
                if num_words == 1:
                    hash_all(own, offsets[:2], round_keys, first, log2_epoch, number, 1, rows)
                else:
                    hash_rows(
                        own, offsets[:2], round_keys, first, log2_epoch, number, m,
                        num_words, span[BITS], rows,
                    )  # fmt: skip
                values = _rows_at(span[VALUES], lo, count, num_words)
                x = _rows_at(span[RESULTS], lo, count, num_words)
                mask_products(values, flip, rows, m, span[BITS], x, target, state)
            else:
                tables = pads.reshape(count, num_pads, width)
                bases = np.empty((count, 2), np.uint64)
                combine(own, m, bases)
                hash_all(
                    bases, offsets[:num_pads], round_keys, first, log2_epoch, number, m, tables
                )
                messages = _rows_at(span[VALUES], lo, count, num_pads * num_words)
                messages = messages.reshape(count, num_pads, num_words)
                mask_chosen(messages, flip, tables, span[BITS], target, state)
        finish(target, state)


@kernel
def _rows_at(address: int, first: int, count: int, words: int) -> Array:
    """Rows ``first`` to ``first + count`` of the uint64 words at an address."""
    start = np.int64(address + 8 * first * words)
    return nb.carray(_words_at(start), (count, words))


@kernel
def mask_products(
    values: Array, flips: Array, pads: Array, m: int, bits: int, x: Array, packed: Array,
    state: Array,
) -> None:  # fmt: skip
    """Bit j of a factor: x_j = pad d_j, sent x_j + value - pad (1 ^ d_j) mod 2^(bits - j).

    x = sum_j 2^j x_j; values and x (n, w), flips (n,) with bits d_j, pads (n m, 2, P). What is
    sent for an element is its m rows of words, row j of ``bits`` - j bits, end to end.
    ``state``: what ``append`` has pending, and where.
    """
    pending, fill, at = state[0], state[1], np.int64(state[2])
    num_words = values.shape[1]
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    own, sent = np.empty(num_words, np.uint64), np.empty(num_words, np.uint64)
    for i in range(values.shape[0]):
        if num_words == 1:
            value, total = values[i, 0], np.uint64(0)
            for j in range(m):
                pad = pads[i * m + j]
                d = np.int64((flips[i] >> np.uint64(j)) & np.uint64(1))
                first = pad[d, 0]
                sent[0] = (first + value - pad[1 ^ d, 0]) & (mask >> np.uint64(j))
                total += first << np.uint64(j)
                pending, fill, at = append(sent, bits - j, packed, pending, fill, at)
            x[i, 0] = total & mask
            continue
        row, total_w = values[i], x[i]
        total_w[:] = np.uint64(0)
        for j in range(m):
            pad, narrow = pads[i * m + j], mask >> np.uint64(j)
            d = np.int64((flips[i] >> np.uint64(j)) & np.uint64(1))
            read_words(pad[d], 0, bits - j, own)
            read_words(pad[1 ^ d], 0, bits - j, sent)
            for k in range(num_words):
                sent[k] = (own[k] + row[k] - sent[k]) & narrow
                total_w[k] += own[k] << np.uint64(j)
            pending, fill, at = append(sent, bits - j, packed, pending, fill, at)
        for k in range(num_words):
            total_w[k] &= mask
    state[0], state[1], state[2] = pending, fill, np.uint64(at)


@kernel
def finish(packed: Array, state: Array) -> None:
    """Write what ``append`` still has pending."""
    if state[1] > np.uint64(0):
        packed[np.int64(state[2])] = state[0]


# --- the receiver -------------------------------------------------------------------------------


@kernel
def own_pads(
    spans: Array, keys: Array, randoms: Array, round_keys: Array, first: int, log2_epoch: int,
    pads: Array,
) -> None:  # fmt: skip
    """The pads that the receiver can know, of every span: as ``answer_spans``."""
    for s in range(spans.shape[0]):
        span = spans[s]
        m, count, width = span[INDEX_BITS], span[COUNT], pad_words_of(span)
        own = keys[span[COT] : span[COT] + count * m]
        random = randoms[span[ELEMENT] : span[ELEMENT] + count]
        number = first + span[COT]
        num_pads = count * m if span[CORRELATED] else count
        target = pads[span[PADS] : span[PADS] + num_pads * width].reshape(num_pads, width)
        if span[CORRELATED]:
            indices = np.empty(num_pads, np.uint8)
            for i in range(count):
                for j in range(m):
                    indices[i * m + j] = np.uint8((random[i] >> np.uint64(j)) & np.uint64(1))
            hash_one(own, indices, round_keys, first, log2_epoch, number, 1, target)
        else:
            bases, indices = np.empty((count, 2), np.uint64), np.empty(count, np.uint8)
            combine(own, m, bases)
            for i in range(count):
                indices[i] = np.uint8(random[i])
            hash_one(bases, indices, round_keys, first, log2_epoch, number, m, target)


@kernel
def open_spans(spans: Array, packed: Array, choices: Array, pads: Array) -> None:
    """The results of every span, from the words of its answers and its own pads."""
    for s in range(spans.shape[0]):
        span = spans[s]
        m, count, width = span[INDEX_BITS], span[COUNT], pad_words_of(span)
        num_pads = count * m if span[CORRELATED] else count
        own = pads[span[PADS] : span[PADS] + num_pads * width].reshape(num_pads, width)
        choice = choices[span[ELEMENT] : span[ELEMENT] + count]
        out = _rows_at(span[RESULTS], 0, count, span[WORDS])
        if span[CORRELATED]:
            open_products(packed[span[PACKED] :], choice, own, m, span[BITS], out)
        else:
            open_chosen(packed[span[PACKED] :], choice, 1 << m, own, span[BITS], out)


@kernel
def open_products(
    packed: Array, choices: Array, pads: Array, m: int, bits: int, out: Array
) -> None:
    """out = sum_j 2^j (pad + choice bit times what was sent) mod 2^bits; see ``mask_products``."""
    num_words, position = out.shape[1], 0
    mask = ~np.uint64(0) >> np.uint64(64 - bits)
    sent, own = np.empty(num_words, np.uint64), np.empty(num_words, np.uint64)
    for i in range(out.shape[0]):
        row = out[i]
        if num_words == 1 or m > 1:
            row[:] = np.uint64(0)
        for j in range(m):
            chosen = np.uint64(0) - ((choices[i] >> np.uint64(j)) & np.uint64(1))
            width, pad = bits - j, pads[i * m + j]
            if num_words == 1:
                value = bits_at(packed, position, width)
                row[0] += (pad[0] + (value & chosen)) << np.uint64(j)
            else:
                read_words(packed, position, width, sent)
                target = row if m == 1 else own  # one bit a row: in place, one pass less
                read_words(pad, 0, width, target)
                if m == 1:
                    for k in range(num_words):
                        row[k] += sent[k] & chosen
                    position += num_words * width
                    continue
                for k in range(num_words):
                    row[k] += (own[k] + (sent[k] & chosen)) << np.uint64(j)
            position += num_words * width
        for k in range(num_words):
            row[k] &= mask


@kernel
def open_chosen(
    packed: Array, indices: Array, num_messages: int, pads: Array, bits: int, out: Array
) -> None:
    """out[i] = packed message ``indices[i]`` of transfer i, xor pad: pads (n, P), out (n, w)."""
    num_words = out.shape[1]
    for i in range(out.shape[0]):
        start = (i * num_messages + np.int64(indices[i])) * num_words * bits
        for k in range(num_words):
            out[i, k] = bits_at(packed, start + k * bits, bits) ^ bits_at(pads[i], k * bits, bits)
