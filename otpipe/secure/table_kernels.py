"""Compiled passes that fill the messages of tables, on a CPU. ``entries`` has their torch twins.

An entry is its fields less the masks of its element, packed end to end into words.

Shape suffixes: n elements, M = 2^b entries of an element, F fields, w words.
"""

from __future__ import annotations

import numpy as np

from otpipe.kernels.cpu import Array, kernel


@kernel
def fill_rows(
    starts: Array, step: int, mask: int, flipped: bool, rows: Array, masks: Array, tops: Array,
    lifts: Array, out: Array,
) -> None:  # fmt: skip
    """out[i, e] = rows[r] less masks[i], field by field, r = (starts[i] + e step) & mask.

    r = starts[i] ^ e if ``flipped``. starts int64 (n,); all others uint64: rows (., w), masks
    (n, w), out (n, M, w), tops and lifts (w,) as in ``entries.Layout``.

    All fields of a word are subtracted at once: with its highest bit set aside, none borrows from
    the next (Warren, Hacker's Delight, section 2-18). A field that goes on in the next word is two,
    and the borrow between them is found by comparing.
    """
    num_words, last = out.shape[2], np.uint64(63)
    for i in range(out.shape[0]):
        start, target, own = starts[i], out[i], masks[i]
        for e in range(target.shape[0]):
            r = start ^ e if flipped else (start + e * step) & mask
            row, entry, borrow = rows[r], target[e], np.uint64(0)
            for k in range(num_words):
                a, b, top = row[k], own[k], tops[k]
                entry[k] = ((a | top) - (b & ~top) - borrow) ^ ((a ^ ~b) & top)
                borrow = np.uint64(0)
                if lifts[k] <= last and (a >> lifts[k]) < (b >> lifts[k]):
                    borrow = np.uint64(1)


@kernel
def fill_intervals(
    starts: Array, step: int, mask: int, lows: Array, sizes: Array, masks: Array, out: Array
) -> None:
    """Bit f of out[i, e]: masks[f, i] xor ((starts[i] + e step - lows[f]) & mask < sizes[f]).

    starts int64 (n,), lows and sizes int64 (F,), masks int64 (F, n), out (n, M, 1).
    """
    for i in range(out.shape[0]):
        target, own = out[i], np.int64(0)
        for f in range(lows.shape[0]):
            own |= masks[f, i] << f
        for e in range(out.shape[1]):
            target[e, 0] = own
        for f in range(lows.shape[0]):
            base = starts[i] - lows[f]
            for e in range(out.shape[1]):
                inside = ((base + e * step) & mask) < sizes[f]
                target[e, 0] ^= np.int64(inside) << f
