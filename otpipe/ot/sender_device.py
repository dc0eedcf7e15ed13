"""The sender's arithmetic on a GPU, or on any torch device.

The passes over AES blocks and bits are Triton kernels (``triton_ops``), or plain torch where Triton
is missing (``torch_ops``); what is left are a few elementwise operations.

Shape suffixes: n transfers, M messages of one transfer, w words, P 64-bit words of a pad.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from otpipe.kernels.aes_planes import expand_keys, key_planes
from otpipe.ot import torch_ops
from otpipe.ot.channel import Bytes
from otpipe.ot.extension import COTS_PER_AES_BLOCK, TreeLayout
from otpipe.ot.extension_kernels import spread_bits
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import KEY_GROUP, TweakLedger, blocks_per_pad, offset_table, round_keys
from otpipe.ot.params import MAX_INDEX_BITS

_PIECE_BLOCKS = 1 << 22
"""Pad blocks in memory at a time: 64 MiB, and a few times that for what becomes of them."""


class DeviceSenderMath:
    """``sender_cpu.SenderMath`` on a torch device."""

    def __init__(
        self,
        secrets: SenderSecrets,
        layout: TreeLayout,
        ledger: TweakLedger,
        device: torch.device,
    ) -> None:
        self._session, self._ledger, self._layout = secrets.session, ledger, layout
        self._device = device
        self._ops = _triton_ops() if device.type == "cuda" else torch_ops
        leaf_keys = key_planes(expand_keys(secrets.leaves))
        self._leaf_keys = torch.from_numpy(leaf_keys).contiguous().to(device)
        weights = layout.sender_weights(secrets.delta).astype(np.int32)
        self._weights = torch.from_numpy(weights).to(device)
        bits = np.empty(128, np.uint8)
        spread_bits(np.frombuffer(secrets.delta, np.uint64), bits)
        self._masks = torch.from_numpy(-bits.astype(np.int32)).to(device)
        self._trees = torch.from_numpy(layout.tree_of_row).to(device)
        self._group, self._group_planes = -1, torch.empty(0)
        offsets = offset_table(secrets.delta, MAX_INDEX_BITS).view(np.int32).copy()
        self._offsets = torch.from_numpy(offsets).to(device)

    def cots(self, first: int, count: int, corrections: Bytes) -> Tensor:
        """See ``SenderMath``."""
        rows = self._ops.expand_rows(
            self._leaf_keys, self._weights, self._layout.depths,
            first // COTS_PER_AES_BLOCK, count // 32,
        )  # fmt: skip
        sent = torch.from_numpy(corrections.view(np.int32).reshape(-1, count // 32).copy())
        later = self._layout.depths[0]  # rows of the first tree need no correction
        rows[later:] ^= sent.to(self._device)[self._trees[later:] - 1] & self._masks[later:, None]
        return self._ops.transposed(rows).view(torch.int64)

    def mask_messages(
        self, keys: Tensor, first: int, index_bits: int, flips: Bytes, messages: Tensor, bits: int
    ) -> Bytes:
        """See ``SenderMath``."""
        words = messages.shape[2]
        masked = torch.empty(messages.shape, dtype=torch.int64, device=self._device)
        for lo, hi, pads in self._pads(keys, first, index_bits, flips, words, bits):
            masked[lo:hi] = (messages[lo:hi] & _mask(bits)) ^ self._words(pads, words, bits)
        return self._to_host(self._ops.pack(masked.view(-1), bits))

    def mask_correlated(
        self, keys: Tensor, first: int, flips: Bytes, correlation: Tensor, bits: int
    ) -> tuple[Tensor, Bytes]:
        """See ``SenderMath``."""
        words = correlation.shape[1]
        x = torch.empty(correlation.shape, dtype=torch.int64, device=self._device)
        sent = torch.empty_like(x)
        for lo, hi, pads in self._pads(keys, first, 1, flips, words, bits):
            values = self._words(pads, words, bits)
            x[lo:hi] = values[:, 0]
            sent[lo:hi] = (values[:, 0] + correlation[lo:hi] - values[:, 1]) & _mask(bits)
        return x, self._to_host(self._ops.pack(sent.view(-1), bits))

    def random_pairs(self, keys: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
        """See ``SenderMath``."""
        both = torch.empty((2, len(keys)), dtype=torch.int64, device=self._device)
        for lo, hi, pads in self._pads(keys, first, 1, np.zeros(len(keys), np.uint8), 1, bits):
            both[:, lo:hi] = self._words(pads, 1, bits)[..., 0].T
        return both[0], both[1]

    def _words(self, pads: Tensor, words: int, bits: int) -> Tensor:
        """Words of each pad: (..., P) -> (..., words)."""
        flat = self._ops.pad_words(pads.view(-1, pads.shape[-1]), words, bits)
        return flat.view(*pads.shape[:-1], words)

    def _to_host(self, packed: Tensor) -> Bytes:
        """Through pinned memory, which torch keeps for the next time."""
        if packed.device.type == "cpu":
            return packed.numpy()
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        return host.copy_(packed).numpy()

    def _planes(self, epoch: int) -> Tensor:
        """Round keys of an epoch in planes, int32 (11, 8), on the device."""
        group, at = divmod(epoch, KEY_GROUP)
        if group != self._group:
            keys = [round_keys(self._session, group * KEY_GROUP + i) for i in range(KEY_GROUP)]
            self._group_planes = torch.from_numpy(key_planes(np.stack(keys))).to(self._device)
            self._group = group
        return self._group_planes[at]

    def _pads(
        self, keys: Tensor, first: int, stride: int, flips: Bytes, words: int, bits: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Claim the tweaks, then yield (lo, hi, pads (hi - lo, M, P)) over all transfers."""
        bases = combined(keys, stride).contiguous().view(torch.int32)
        offsets = self._offsets[: 1 << stride]
        blocks = blocks_per_pad(words, bits)
        flips_device = torch.from_numpy(flips).to(self._device)
        self._ledger.claim(first, len(bases) * stride)
        step = max(1, _PIECE_BLOCKS // (len(offsets) * blocks))
        for lo, hi, epoch in self._ledger.epochs(first, len(bases), stride):
            planes = self._planes(epoch)
            for start in range(lo, hi, step):
                stop = min(start + step, hi)
                yield start, stop, self._ops.hash_all(
                    bases[start:stop], offsets, planes, first + start * stride, stride,
                    flips_device[start:stop], blocks,
                )  # fmt: skip


def combined(keys: Tensor, index_bits: int) -> Tensor:
    """``pads_cpu.combine`` in torch: int64 (n index_bits, 2) -> (n, 2)."""
    groups = keys.view(-1, index_bits, 2)
    low, high = groups[:, -1, 0], groups[:, -1, 1]
    for j in reversed(range(index_bits - 1)):
        reduced = (high >> 63) & 0b10000111
        high = ((high << 1) | ((low >> 63) & 1)) ^ groups[:, j, 1]
        low = (low << 1) ^ reduced ^ groups[:, j, 0]
    return torch.stack((low, high), -1)


def _mask(bits: int) -> int:
    return -1 if bits == 64 else (1 << bits) - 1


@functools.cache
def _triton_ops() -> ModuleType:
    """The Triton passes where Triton is installed, else their twins."""
    try:
        return importlib.import_module("otpipe.ot.triton_ops")
    except ImportError:
        return torch_ops
