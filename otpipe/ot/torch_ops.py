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
    """Every pad of each transfer, as ``CpuHash.all_pads`` within one epoch.

    Args:
        bases: int32 (n, 4). offsets: int32 (M, 4). flips: uint8 (n,).
        key_planes: int32 (11, 8) of the permutation.
        first, stride: transfer i begins at COT first + i stride.
        blocks: AES blocks of a pad.

    Returns:
        int64 (n, M, 2 blocks).
    """
    n, num_messages = len(bases), len(offsets)
    indices = torch.arange(num_messages, device=bases.device) ^ flips.long()[:, None]
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
