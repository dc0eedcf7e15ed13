"""The sender's passes in plain torch, on any device: AES as a circuit, no table, no branch.

They are the twins that the compiled kernels of both kinds are tested against, and serve a GPU on
which Triton is not installed. ``triton_ops`` has the same functions.

Shape suffixes: L leaves of all trees, W 32-bit words of a row of bits, B COTs (B = 32 W), n
transfers, M messages of one transfer, P 64-bit words of a pad (two for each AES block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpipe.kernels.aes_planes import encrypt_planes, to_planes


def _encrypted(pairs: Tensor, key_planes: Tensor) -> Tensor:
    """AES on pairs of blocks: int32 (..., 2, 4), key planes (11, 8, ...) that broadcast."""
    words = to_planes(*(pairs[..., i % 2, i // 2] for i in range(8)))
    out = to_planes(*encrypt_planes(words, key_planes))
    first, second = torch.stack(out[0::2], -1), torch.stack(out[1::2], -1)
    return torch.stack((first, second), -2)


def expand_rows(
    leaf_keys: Tensor, weights: Tensor, depths: tuple[int, ...], counter: int, num_words: int
) -> Tensor:
    """Weighted sums of the leaves' streams; see ``extension_kernels.expand_trees``.

    Args:
        leaf_keys: int32 (L, 11, 8), round keys in planes.
        weights: int32 (L,): bit j says whether the leaf is added to row j of its tree.
        depths: rows of each tree.
        counter: first AES block of each stream.
        num_words: W, a multiple of 8.

    Returns:
        int32 (128, W).
    """
    device = leaf_keys.device
    blocks = torch.arange(counter, counter + num_words // 4, dtype=torch.int64, device=device)
    pairs = torch.zeros((num_words // 8, 2, 4), dtype=torch.int32, device=device)
    pairs[..., :2] = blocks.view(torch.int32).view(-1, 2, 2)
    rows = []
    start = 0
    for depth in depths:
        stop = start + (1 << depth)
        keys = leaf_keys[start:stop].permute(1, 2, 0).unsqueeze(-1)  # (11, 8, leaves, 1)
        streams = _encrypted(pairs, keys).view(1 << depth, num_words)
        for bit in range(depth):
            mask = -((weights[start:stop] >> bit) & 1)
            total = streams & mask[:, None]
            while len(total) > 1:
                half = len(total) // 2
                total = total[:half] ^ total[half:]
            rows.append(total[0])
        start = stop
    return torch.stack(rows)


def transposed(rows: Tensor) -> Tensor:
    """Bit i of row r becomes bit r of result i: int32 (128, W) -> int32 (32 W, 4)."""
    positions = torch.arange(32, dtype=torch.int32, device=rows.device)
    words = []
    for first in range(0, 128, 32):
        total = torch.zeros((rows.shape[1], 32), dtype=torch.int32, device=rows.device)
        for r in range(32):
            total |= ((rows[first + r, :, None] >> positions) & 1) << r
        words.append(total.view(-1))
    return torch.stack(words, -1)


def hash_all(
    bases: Tensor,
    offsets: Tensor,
    key_planes: Tensor,
    first: int,
    stride: int,
    flips: Tensor,
    blocks: int,
) -> Tensor:
    """Every pad of each transfer within one epoch: entry e has that of index e ^ flips[i].

    Args:
        bases: int32 (n, 4). offsets: int32 (M, 4). flips: int64 (n,).
        key_planes: int32 (11, 8) of the permutation.
        first, stride: transfer i begins at COT first + i stride.
        blocks: AES blocks of a pad.

    Returns:
        int64 (n, M, 2 blocks).
    """
    n, num_messages = len(bases), len(offsets)
    indices = torch.arange(num_messages, device=bases.device) ^ flips[:, None]
    x = bases[:, None, :] ^ offsets[indices]
    keys = key_planes.unsqueeze(-1)
    once = _encrypted(x.view(-1, 2, 4), keys).view(n, num_messages, 4)
    numbers = first + stride * torch.arange(n, dtype=torch.int64, device=bases.device)
    pads = torch.empty((n, num_messages, blocks, 4), dtype=torch.int32, device=bases.device)
    for block in range(blocks):
        mixed = once.clone()
        mixed[..., :2] ^= numbers.view(torch.int32).view(n, 1, 2)
        mixed[..., 2] ^= indices.int() | (block << 8)
        pads[:, :, block] = _encrypted(mixed.view(-1, 2, 4), keys).view(n, num_messages, 4) ^ once
    return pads.view(torch.int64).view(n, num_messages, 2 * blocks)


def combined(keys: Tensor, index_bits: int) -> Tensor:
    """``pads_cpu.combine`` in torch: int64 (n index_bits, 2) -> (n, 2)."""
    groups = keys.view(-1, index_bits, 2)
    low, high = groups[:, -1, 0], groups[:, -1, 1]
    for j in reversed(range(index_bits - 1)):
        reduced = (high >> 63) & 0b10000111
        high = ((high << 1) | ((low >> 63) & 1)) ^ groups[:, j, 1]
        low = (low << 1) ^ reduced ^ groups[:, j, 0]
    return torch.stack((low, high), -1)


def mask_products(pads: Tensor, values: Tensor, bits: int, x: Tensor) -> Tensor:
    """``exchange_kernels.mask_products``: fills x, returns what is sent, packed.

    Args:
        pads: int64 (n, m, 2, P): of bit j of factor i the sender's own pad and the other one.
        values, x: int64 (n, w).
        bits: of the products; row j of an element has ``bits`` - j.

    Returns:
        uint8, as many as the packed bits need.
    """
    n, m, words = *pads.shape[:2], values.shape[1]
    j = torch.arange(m, device=pads.device)[:, None]
    width = bits - j
    position = torch.arange(words, device=pads.device) * width  # (m, w)
    at, shift = position >> 6, position & 63
    after = torch.clamp(at + 1, max=pads.shape[-1] - 1)
    shape = (n, m, 2, words)
    low = pads.gather(3, at[None, :, None].expand(shape))
    high = pads.gather(3, after[None, :, None].expand(shape))
    shift, ones = shift[:, None], (~((-1 << (width - 1)) << 1))[:, None]
    low = (low >> shift) & ~((-1 << (63 - shift)) << 1)  # logical shifts, as in pad_words
    both = (low | ((high << 1) << (63 - shift))) & ones
    own, other = both[:, :, 0], both[:, :, 1]
    x.copy_((own << j).sum(1) & ~((-1 << (bits - 1)) << 1))
    sent = (own + values[:, None] - other) & ones[:, 0]
    # Every value is added to the three words of 32 bits that it may reach; none overlaps another.
    before = j * bits - j * (j - 1) // 2  # bits of the rows of an element before row j, a word
    total = m * bits - m * (m - 1) // 2
    start = torch.arange(n, device=pads.device)[:, None, None] * (words * total)
    place = start + words * before + position
    word, lift = (place >> 5).view(-1), (place & 31).view(-1)
    sent, num_bytes = sent.reshape(-1), -(-n * words * total // 8)
    packed = torch.zeros(num_bytes // 4 + 4, dtype=torch.int64, device=pads.device)
    lower, upper = sent & 0xFFFFFFFF, (sent >> 32) & 0xFFFFFFFF
    parts = (lower << lift, upper << lift)
    packed.index_add_(0, word, parts[0] & 0xFFFFFFFF)
    packed.index_add_(0, word + 1, (parts[0] >> 32) + (parts[1] & 0xFFFFFFFF))
    packed.index_add_(0, word + 2, parts[1] >> 32)
    return packed.to(torch.int32).view(torch.uint8)[:num_bytes]


def pad_words(pads: Tensor, words: int, bits: int) -> Tensor:
    """Word k of each pad, its bits k bits ...: int64 (N, P) -> (N, words)."""
    position = torch.arange(words, device=pads.device) * bits
    at, shift = position >> 6, position & 63
    after = torch.clamp(at + 1, max=pads.shape[-1] - 1)
    # Logical shifts; the second of two steps may be by 0, never by 64.
    low = (pads[:, at] >> shift) & ~((-1 << (63 - shift)) << 1)
    high = (pads[:, after] << 1) << (63 - shift)
    return (low | high) & ~((-1 << (bits - 1)) << 1)


def pack(values: Tensor, bits: int) -> Tensor:
    """int64 values (N,), each below 2^bits, end to end: uint8 (ceil(N bits / 8),).

    Thirty-two values fill ``bits`` whole words of 32 bits.
    """
    count = len(values)
    padded = torch.nn.functional.pad(values, (0, -count % 32)).view(-1, 32)
    words = []
    for word in range(bits):
        total = torch.zeros_like(padded[:, 0])
        for k in range(32 * word // bits, min(32, -(-32 * (word + 1) // bits))):
            shift = k * bits - 32 * word
            if shift >= 0:
                total |= padded[:, k] << shift
            else:
                total |= (padded[:, k] >> -shift) & ((1 << (64 + shift)) - 1)
        words.append(total.to(torch.int32))  # the low half
    return torch.stack(words, -1).view(torch.uint8).view(-1)[: -(-count * bits // 8)]
