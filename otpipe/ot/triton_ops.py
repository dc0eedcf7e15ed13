"""The sender's passes on CUDA, in Triton: the functions of ``torch_ops``, bit by bit.

AES is the circuit of ``aes_planes``: a lane encrypts two blocks in eight registers. No table, so
that neither caches nor shared-memory banks see a secret, and no branch on one.

Shape suffixes as in ``torch_ops``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from otpipe.kernels import aes_planes

F = TypeVar("F", bound=Callable[..., Tensor])

_LANES = 128
_KEY_WORDS = 88

_sub_bytes = triton.jit(aes_planes.sub_bytes)
_shift_rows = triton.jit(aes_planes.shift_rows)
_mix_columns = triton.jit(aes_planes.mix_columns)
_to_planes = triton.jit(aes_planes.to_planes)


@triton.jit
def _encrypt(q0, q1, q2, q3, q4, q5, q6, q7, key):  # type: ignore[no-untyped-def]
    """Ten rounds on planes; ``key`` points to 88 words."""
    q0 = q0 ^ tl.load(key)
    q1 = q1 ^ tl.load(key + 1)
    q2 = q2 ^ tl.load(key + 2)
    q3 = q3 ^ tl.load(key + 3)
    q4 = q4 ^ tl.load(key + 4)
    q5 = q5 ^ tl.load(key + 5)
    q6 = q6 ^ tl.load(key + 6)
    q7 = q7 ^ tl.load(key + 7)
    for r in range(1, 10):
        q0, q1, q2, q3, q4, q5, q6, q7 = _sub_bytes(q0, q1, q2, q3, q4, q5, q6, q7)
        q0, q1, q2, q3, q4, q5, q6, q7 = _mix_columns(
            _shift_rows(q0), _shift_rows(q1), _shift_rows(q2), _shift_rows(q3),
            _shift_rows(q4), _shift_rows(q5), _shift_rows(q6), _shift_rows(q7),
        )  # fmt: skip
        q0 = q0 ^ tl.load(key + 8 * r)
        q1 = q1 ^ tl.load(key + 8 * r + 1)
        q2 = q2 ^ tl.load(key + 8 * r + 2)
        q3 = q3 ^ tl.load(key + 8 * r + 3)
        q4 = q4 ^ tl.load(key + 8 * r + 4)
        q5 = q5 ^ tl.load(key + 8 * r + 5)
        q6 = q6 ^ tl.load(key + 8 * r + 6)
        q7 = q7 ^ tl.load(key + 8 * r + 7)
    q0, q1, q2, q3, q4, q5, q6, q7 = _sub_bytes(q0, q1, q2, q3, q4, q5, q6, q7)
    return (
        _shift_rows(q0) ^ tl.load(key + 80),
        _shift_rows(q1) ^ tl.load(key + 81),
        _shift_rows(q2) ^ tl.load(key + 82),
        _shift_rows(q3) ^ tl.load(key + 83),
        _shift_rows(q4) ^ tl.load(key + 84),
        _shift_rows(q5) ^ tl.load(key + 85),
        _shift_rows(q6) ^ tl.load(key + 86),
        _shift_rows(q7) ^ tl.load(key + 87),
    )


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    keys, weights, leaf_starts, row_starts, counters, rows, num_words,
    ROWS: tl.constexpr, LANES: tl.constexpr, KEY_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (i, tree): 2 LANES AES blocks of all streams of one tree, summed into its rows."""
    tree = tl.program_id(1)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = tl.arange(0, ROWS)
    inside = 8 * lane < num_words
    even = tl.load(counters) + 2 * lane.to(tl.int64)
    odd = even + 1
    zero = tl.zeros((LANES,), dtype=tl.int32)
    c0, c1, c2, c3, c4, c5, c6, c7 = _to_planes(
        even.to(tl.int32), odd.to(tl.int32), (even >> 32).to(tl.int32), (odd >> 32).to(tl.int32),
        zero, zero, zero, zero,
    )  # fmt: skip
    s0 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s1 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s2 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s3 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s4 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s5 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s6 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    s7 = tl.zeros((ROWS, LANES), dtype=tl.int32)
    for leaf in range(tl.load(leaf_starts + tree), tl.load(leaf_starts + tree + 1)):
        q0, q1, q2, q3, q4, q5, q6, q7 = _encrypt(
            c0, c1, c2, c3, c4, c5, c6, c7, keys + leaf * KEY_WORDS
        )
        mask = (0 - ((tl.load(weights + leaf) >> row) & 1))[:, None]
        s0 = s0 ^ (q0[None, :] & mask)
        s1 = s1 ^ (q1[None, :] & mask)
        s2 = s2 ^ (q2[None, :] & mask)
        s3 = s3 ^ (q3[None, :] & mask)
        s4 = s4 ^ (q4[None, :] & mask)
        s5 = s5 ^ (q5[None, :] & mask)
        s6 = s6 ^ (q6[None, :] & mask)
        s7 = s7 ^ (q7[None, :] & mask)
    # back to words: w0, w2, w4, w6 of the even block, w1, w3, w5, w7 of the odd one
    w0, w1, w2, w3, w4, w5, w6, w7 = _to_planes(s0, s1, s2, s3, s4, s5, s6, s7)
    first_row = tl.load(row_starts + tree)
    num_rows = tl.load(row_starts + tree + 1) - first_row
    at = rows + (first_row + row).to(tl.int64)[:, None] * num_words + 8 * lane[None, :]
    stored = (row < num_rows)[:, None] & inside[None, :]
    tl.store(at, w0, mask=stored)
    tl.store(at + 1, w2, mask=stored)
    tl.store(at + 2, w4, mask=stored)
    tl.store(at + 3, w6, mask=stored)
    tl.store(at + 4, w1, mask=stored)
    tl.store(at + 5, w3, mask=stored)
    tl.store(at + 6, w5, mask=stored)
    tl.store(at + 7, w7, mask=stored)


@triton.jit
def _transpose_kernel(rows, out, num_words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (i, g): words of rows 32 g ... 32 g + 31 to word g of the results."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    group = tl.program_id(1)
    bit = tl.arange(0, 32)
    inside = word < num_words
    total = tl.zeros((WORDS, 32), dtype=tl.int32)
    for r in range(32):
        at = rows + (32 * group + r).to(tl.int64) * num_words + word
        value = tl.load(at, mask=inside, other=0)
        total = total | (((value[:, None] >> bit[None, :]) & 1) << r)
    target = out + (32 * word.to(tl.int64)[:, None] + bit[None, :]) * 4 + group
    tl.store(target, total, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_pairs", "stride", "log2_messages", "blocks"])
def _hash_kernel(  # type: ignore[no-untyped-def]
    bases, offsets, key, numbers, flips, pads, num_pairs, stride, log2_messages,
    blocks, LANES: tl.constexpr,
):  # fmt: skip
    """One lane: pads of messages 2 f and 2 f + 1 of the flat list, which share a transfer."""
    pair = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = pair < num_pairs
    i = (2 * pair) >> log2_messages
    message = (2 * pair - (i << log2_messages)).to(tl.int32)
    flip = tl.load(flips + i, mask=inside, other=0).to(tl.int32)
    e0 = message ^ flip
    e1 = (message + 1) ^ flip
    x0 = tl.load(bases + 4 * i, mask=inside, other=0)
    x1 = tl.load(bases + 4 * i + 1, mask=inside, other=0)
    x2 = tl.load(bases + 4 * i + 2, mask=inside, other=0)
    x3 = tl.load(bases + 4 * i + 3, mask=inside, other=0)
    y0, y1, y2, y3, y4, y5, y6, y7 = _to_planes(
        x0 ^ tl.load(offsets + 4 * e0), x0 ^ tl.load(offsets + 4 * e1),
        x1 ^ tl.load(offsets + 4 * e0 + 1), x1 ^ tl.load(offsets + 4 * e1 + 1),
        x2 ^ tl.load(offsets + 4 * e0 + 2), x2 ^ tl.load(offsets + 4 * e1 + 2),
        x3 ^ tl.load(offsets + 4 * e0 + 3), x3 ^ tl.load(offsets + 4 * e1 + 3),
    )  # fmt: skip
    y0, y1, y2, y3, y4, y5, y6, y7 = _encrypt(y0, y1, y2, y3, y4, y5, y6, y7, key)
    number = tl.load(numbers) + i * stride
    low = number.to(tl.int32)
    high = (number >> 32).to(tl.int32)
    zero = tl.zeros((LANES,), dtype=tl.int32)
    for block in range(blocks):
        t0, t1, t2, t3, t4, t5, t6, t7 = _to_planes(
            low, low, high, high, e0 | (block << 8), e1 | (block << 8), zero, zero
        )
        t0, t1, t2, t3, t4, t5, t6, t7 = _encrypt(
            y0 ^ t0, y1 ^ t1, y2 ^ t2, y3 ^ t3, y4 ^ t4, y5 ^ t5, y6 ^ t6, y7 ^ t7, key
        )
        w0, w1, w2, w3, w4, w5, w6, w7 = _to_planes(
            y0 ^ t0, y1 ^ t1, y2 ^ t2, y3 ^ t3, y4 ^ t4, y5 ^ t5, y6 ^ t6, y7 ^ t7
        )
        at = pads + 2 * pair * (4 * blocks) + 4 * block
        tl.store(at, w0, mask=inside)
        tl.store(at + 1, w2, mask=inside)
        tl.store(at + 2, w4, mask=inside)
        tl.store(at + 3, w6, mask=inside)
        tl.store(at + 4 * blocks, w1, mask=inside)
        tl.store(at + 4 * blocks + 1, w3, mask=inside)
        tl.store(at + 4 * blocks + 2, w5, mask=inside)
        tl.store(at + 4 * blocks + 3, w7, mask=inside)


@triton.jit(do_not_specialize=["count", "index_bits"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    keys, out, count, index_bits, LANES: tl.constexpr
):
    """One lane: sum_j alpha^j of the keys of one transfer, by Horner's rule."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = i < count
    at = keys + 2 * ((i + 1) * index_bits - 1)
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + 1, mask=inside, other=0)
    for j in range(1, index_bits):
        carry = (high >> 63) & 0x87
        high = ((high << 1) | ((low >> 63) & 1)) ^ tl.load(at - 2 * j + 1, mask=inside, other=0)
        low = (low << 1) ^ carry ^ tl.load(at - 2 * j, mask=inside, other=0)
    tl.store(out + 2 * i, low, mask=inside)
    tl.store(out + 2 * i + 1, high, mask=inside)


@triton.jit
def _word_at(pad, position, last, ones, inside):  # type: ignore[no-untyped-def]
    """The word under mask ``ones`` from a bit of a pad of ``last`` + 1 words of 64 bits."""
    first = position >> 6
    shift = position & 63
    low = tl.load(pad + first, mask=inside, other=0)
    high = tl.load(pad + tl.minimum(first + 1, last), mask=inside, other=0)
    low = (low >> shift) & ~((tl.full(low.shape, -1, dtype=tl.int64) << (63 - shift)) << 1)
    return (low | ((high << 1) << (63 - shift))) & ones


@triton.jit(do_not_specialize=["count", "m", "words", "bits", "pad_size"])
def _products_kernel(  # type: ignore[no-untyped-def]
    pads, values, x, packed, count, m, words, bits, pad_size, LANES: tl.constexpr
):
    """One lane: word k of row j of element i. Sums and packed bits meet in atomic operations."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < count
    row = lane // words
    k = lane - row * words
    i = row // m
    j = row - i * m
    width = bits - j
    ones = ~((tl.full((LANES,), -1, dtype=tl.int64) << (width - 1)) << 1)
    pad = pads + 2 * row * pad_size
    own = _word_at(pad, k * width, pad_size - 1, ones, inside)
    other = _word_at(pad + pad_size, k * width, pad_size - 1, ones, inside)
    value = tl.load(values + i * words + k, mask=inside, other=0)
    tl.atomic_add(x + i * words + k, own << j, mask=inside, sem="relaxed")
    sent = (own + value - other) & ones
    total = m * bits - m * (m - 1) // 2
    before = j * bits - j * (j - 1) // 2
    place = (i * total + before) * words + k * width
    target = packed + (place >> 5)
    lift = place & 31
    lower = (sent & 0xFFFFFFFF) << lift
    upper = ((sent >> 32) & 0xFFFFFFFF) << lift
    # Values do not overlap, but share words.
    tl.atomic_or(target, lower.to(tl.int32), mask=inside, sem="relaxed")
    middle = ((lower >> 32) | upper).to(tl.int32)
    tl.atomic_or(target + 1, middle, mask=inside & (middle != 0), sem="relaxed")
    top = (upper >> 32).to(tl.int32)
    tl.atomic_or(target + 2, top, mask=inside & (top != 0), sem="relaxed")


@triton.jit(do_not_specialize=["count", "words", "bits", "pad_size"])
def _pad_words_kernel(  # type: ignore[no-untyped-def]
    pads, out, count, words, bits, pad_size, LANES: tl.constexpr
):
    """One lane: one word of a pad, from the one or two of 64 bits that it lies in."""
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = at < count
    pad = at // words
    position = (at - pad * words) * bits
    first = position >> 6
    second = tl.minimum(first + 1, pad_size - 1)
    shift = position & 63
    low = tl.load(pads + pad * pad_size + first, mask=inside, other=0)
    high = tl.load(pads + pad * pad_size + second, mask=inside, other=0)
    # Logical shifts, as in the twin.
    ones = tl.full((LANES,), -1, dtype=tl.int64)
    low = (low >> shift) & ~((ones << (63 - shift)) << 1)
    high = (high << 1) << (63 - shift)
    tl.store(out + at, (low | high) & ~((ones << (bits - 1)) << 1), mask=inside)


@triton.jit(do_not_specialize=["count", "bits", "num_words", "per_word"])
def _pack_kernel(  # type: ignore[no-untyped-def]
    values, out, count, bits, num_words, per_word, WORDS: tl.constexpr
):
    """One result: 32 packed bits, from the ``per_word`` values that may overlap them."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    start = 32 * word
    first = start // bits
    total = tl.zeros((WORDS,), dtype=tl.int64)
    minus_two = tl.full((WORDS,), -2, dtype=tl.int64)
    for k in range(per_word):
        value = tl.load(values + first + k, mask=first + k < count, other=0)
        shift = (first + k) * bits - start
        up = value << tl.maximum(shift, 0)
        down_by = tl.maximum(0 - shift, 0)
        # a logical shift: with 64 bits the value may be negative
        down = (value >> down_by) & ~(minus_two << (63 - down_by))
        total = total | tl.where(shift >= 32, 0, tl.where(shift >= 0, up, down))
    tl.store(out + word, total.to(tl.int32), mask=word < num_words)


def _on_its_device(function: F) -> F:
    """Make the first tensor's device current: Triton launches on whatever is, in this thread."""

    @functools.wraps(function)
    def launched(first: Tensor, *args: Any) -> Tensor:
        with torch.cuda.device(first.device):
            return function(first, *args)

    return cast(F, launched)


@_on_its_device
def expand_rows(
    leaf_keys: Tensor, weights: Tensor, depths: tuple[int, ...], counter: int, num_words: int
) -> Tensor:
    """See ``torch_ops.expand_rows``."""
    device = leaf_keys.device
    rows = torch.empty((sum(depths), num_words), dtype=torch.int32, device=device)
    leaf_starts, row_starts = [0], [0]
    for depth in depths:
        leaf_starts.append(leaf_starts[-1] + (1 << depth))
        row_starts.append(row_starts[-1] + depth)
    _expand_kernel[(triton.cdiv(num_words, 8 * _LANES), len(depths))](
        leaf_keys, weights,
        torch.tensor(leaf_starts, dtype=torch.int32, device=device),
        torch.tensor(row_starts, dtype=torch.int32, device=device),
        torch.tensor([counter], device=device), rows, num_words,
        triton.next_power_of_2(max(depths)), _LANES, _KEY_WORDS,
    )  # fmt: skip
    return rows


@_on_its_device
def transposed(rows: Tensor) -> Tensor:
    """See ``torch_ops.transposed``."""
    num_words = rows.shape[1]
    out = torch.empty((32 * num_words, 4), dtype=torch.int32, device=rows.device)
    _transpose_kernel[(triton.cdiv(num_words, 64), 4)](rows, out, num_words, 64)
    return out


@_on_its_device
def hash_all(
    bases: Tensor,
    offsets: Tensor,
    key_planes: Tensor,
    first: int,
    stride: int,
    flips: Tensor,
    blocks: int,
) -> Tensor:
    """See ``torch_ops.hash_all``."""
    n, num_messages = len(bases), len(offsets)
    pads = torch.empty((n, num_messages, 2 * blocks), dtype=torch.int64, device=bases.device)
    num_pairs = n * num_messages // 2
    _hash_kernel[(triton.cdiv(num_pairs, _LANES),)](
        bases, offsets, key_planes, torch.tensor([first], device=bases.device), flips,
        pads.view(torch.int32), num_pairs, stride, num_messages.bit_length() - 1, blocks, _LANES,
    )  # fmt: skip
    return pads


@_on_its_device
def combined(keys: Tensor, index_bits: int) -> Tensor:
    """See ``torch_ops.combined``."""
    count = len(keys) // index_bits
    out = torch.empty((count, 2), dtype=torch.int64, device=keys.device)
    _combine_kernel[(triton.cdiv(count, 128),)](keys.contiguous(), out, count, index_bits, 128)
    return out


@_on_its_device
def mask_products(pads: Tensor, values: Tensor, bits: int, x: Tensor) -> Tensor:
    """See ``torch_ops.mask_products``; x must be contiguous."""
    n, m, words = *pads.shape[:2], values.shape[1]
    num_bytes = -(-n * words * (m * bits - m * (m - 1) // 2) // 8)
    packed = torch.zeros(num_bytes // 4 + 4, dtype=torch.int32, device=pads.device)
    x.zero_()
    count = n * m * words
    _products_kernel[(triton.cdiv(count, 128),)](
        pads, values, x, packed, count, m, words, bits, pads.shape[3], 128
    )
    x &= ~((-1 << (bits - 1)) << 1)
    return packed.view(torch.uint8)[:num_bytes]


@_on_its_device
def pad_words(pads: Tensor, words: int, bits: int) -> Tensor:
    """See ``torch_ops.pad_words``."""
    out = torch.empty((len(pads), words), dtype=torch.int64, device=pads.device)
    _pad_words_kernel[(triton.cdiv(out.numel(), 256),)](
        pads, out, out.numel(), words, bits, pads.shape[1], 256
    )
    return out


@_on_its_device
def pack(values: Tensor, bits: int) -> Tensor:
    """See ``torch_ops.pack``."""
    count = len(values)
    num_words = -(-count * bits // 32)
    out = torch.empty(num_words, dtype=torch.int32, device=values.device)
    per_word = 31 // bits + 2
    _pack_kernel[(triton.cdiv(num_words, 256),)](values, out, count, bits, num_words, per_word, 256)
    return out.view(torch.uint8)[: -(-count * bits // 8)]
