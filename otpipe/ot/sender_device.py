"""The sender's arithmetic on a GPU, or on any torch device.

The passes over AES blocks and bits are Triton kernels (``triton_ops``), or plain torch where Triton
is missing (``torch_ops``); what is left are a few elementwise operations.

Shape suffixes: n transfers, M messages of one transfer, w words, P 64-bit words of a pad.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from otpipe.kernels.aes_planes import expand_keys, key_planes
from otpipe.ot import torch_ops
from otpipe.ot.channel import Bytes
from otpipe.ot.extension import COTS_PER_AES_BLOCK, U64, TreeLayout
from otpipe.ot.extension_kernels import spread_bits
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import KEY_GROUP, TweakLedger, blocks_per_pad, offset_table, round_keys
from otpipe.ot.params import MAX_INDEX_BITS
from otpipe.ot.plan import Shape
from otpipe.ot.sender_cpu import Job

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

    def answers(self, jobs: Sequence[Job], keys: Tensor, flips: U64, first: int) -> Bytes:
        """See ``SenderMath``."""
        device_flips = torch.from_numpy(flips.view(np.int64)).to(self._device)
        self._ledger.claim(
            first + jobs[0].cot, sum(len(job.values) * job.shape.index_bits for job in jobs)
        )
        packed = []
        for job in jobs:
            own = keys[job.cot : job.cot + len(job.values) * job.shape.index_bits]
            flip = device_flips[job.element : job.element + len(job.values)]
            work = self._messages if job.results is None else self._products
            packed.append(work(job, own, first + job.cot, flip))
        return self._to_host(packed[0] if len(packed) == 1 else torch.cat(packed))

    def _messages(self, job: Job, keys: Tensor, first: int, flips: Tensor) -> Tensor:
        """Messages under their pads."""
        shape = job.shape
        masked = torch.empty(job.values.shape, dtype=torch.int64, device=self._device)
        bases = self._ops.combined(keys, shape.index_bits)
        for lo, hi, pads in self._pads(bases, first, shape.index_bits, shape, flips):
            values = self._words(pads, shape.words, shape.bits)
            masked[lo:hi] = (job.values[lo:hi] & _mask(shape.bits)) ^ values
        return self._ops.pack(masked.view(-1), shape.bits)

    def _products(self, job: Job, keys: Tensor, first: int, flips: Tensor) -> Tensor:
        """Differences of all factor bits; fills the results."""
        shape, m, values, results = job.shape, job.shape.index_bits, job.values, job.results
        assert results is not None
        each = ((flips[:, None] >> torch.arange(m, device=self._device)) & 1).view(-1)
        # Some elements at a time; eight of them fill whole bytes.
        blocks = blocks_per_pad(shape.words, shape.bits)
        step = 8 * max(1, _PIECE_BLOCKS // (16 * m * blocks))
        packed = []
        for lo in range(0, len(values), step):
            hi = min(lo + step, len(values))
            cots = slice(lo * m, hi * m)
            pads = [p for _, _, p in self._pads(keys[cots], first + lo * m, 1, shape, each[cots])]
            whole = (pads[0] if len(pads) == 1 else torch.cat(pads)).view(hi - lo, m, 2, -1)
            own = values[lo:hi].contiguous()
            packed.append(self._ops.mask_products(whole, own, shape.bits, results[lo:hi]))
        return packed[0] if len(packed) == 1 else torch.cat(packed)

    def random_pairs(self, keys: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
        """See ``SenderMath``."""
        self._ledger.claim(first, len(keys))
        both = torch.empty((2, len(keys)), dtype=torch.int64, device=self._device)
        shape, flips = Shape(False, len(keys), 1, 1, bits), keys.new_zeros(len(keys))
        for lo, hi, pads in self._pads(keys, first, 1, shape, flips):
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
        self, bases: Tensor, first: int, stride: int, shape: Shape, flips: Tensor
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (lo, hi, pads (hi - lo, M, P)) over all transfers: pad e is that of e ^ flip.

        bases (n, 2) and flips (n,), both int64; transfer i begins at COT first + i stride.
        """
        words = bases.contiguous().view(torch.int32)
        offsets = self._offsets[: 1 << stride]
        blocks = blocks_per_pad(shape.words, shape.bits)
        step = max(1, _PIECE_BLOCKS // (len(offsets) * blocks))
        for lo, hi, epoch in self._ledger.epochs(first, len(bases), stride):
            planes = self._planes(epoch)
            for start in range(lo, hi, step):
                stop = min(start + step, hi)
                yield start, stop, self._ops.hash_all(
                    words[start:stop], offsets, planes, first + start * stride, stride,
                    flips[start:stop], blocks,
                )  # fmt: skip


def _mask(bits: int) -> int:
    return -1 if bits == 64 else (1 << bits) - 1


@functools.cache
def _triton_ops() -> ModuleType:
    """The Triton passes where Triton is installed, else their twins."""
    try:
        return importlib.import_module("otpipe.ot.triton_ops")
    except ImportError:
        return torch_ops
