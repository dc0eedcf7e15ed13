"""The pads and corrections of one slot, map after map: what a decode step reads, without delay.

Between a request and the answer there is less time than a few dozen Python calls take. So the
correction of one map and the pad of the next come from one compiled call: read, checked, expanded.

Shapes: n in_features, m out_features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from otpipe.client.store_batch import Batch, MapRegion
from otpipe.kernels.aes_native import NATIVE, encrypt_counters_256
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import PREAD, call_4, system_functions

_AES_BLOCK = 16


@kernel
def _read(
    functions: Array,
    fd: int,
    offset: int,
    correction_m: Array,
    weights_m: Array,
    expected: int,
    round_keys: Array,
    prefix: int,
    first_block: int,
    pad: Array,
) -> bool:
    """Fill the correction of one map from the file, and uint8 ``pad`` from a keystream.

    Returns whether the correction was there and has its checksum (``store_checksum``).
    """
    if pad.shape[0] > 0:
        encrypt_counters_256(round_keys, prefix, first_block, 0, pad.shape[0], pad)
    count = call_4(
        functions[PREAD],
        np.int64(fd),
        np.int64(correction_m.ctypes.data),
        np.int64(correction_m.nbytes),
        np.int64(offset),
    )
    if count != correction_m.nbytes:
        return False
    total = np.uint64(0)
    for j in range(correction_m.shape[0]):
        total += np.uint64(correction_m[j]) * np.uint64(weights_m[j])
    return total == np.uint64(expected)


class RowReader:
    """Reads one slot, which the caller has claimed for good: every map once, in rising order.

    ``check``: raises where the slot may not be used any more.
    """

    def __init__(self, batch: Batch, slot: int, check: Callable[[], None]) -> None:
        self._batch, self._slot, self._check = batch, slot, check
        self._regions = batch.regions
        self._next_pad, self._next_correction = 0, 0
        self._no_pad = np.empty(0, np.uint8)

    @staticmethod
    def possible() -> bool:
        """Whether this machine has AES instructions."""
        return NATIVE

    def first_pad(self) -> np.ndarray:
        """The pad (n,) of the first map."""
        self._check()
        assert self._next_pad == 0, "a pad is given out once"
        self._next_pad = 1
        region = self._regions[0]
        return self._batch.pads(region.shape.index, self._slot, 1)[0]

    def advance(self) -> tuple[np.ndarray, np.ndarray]:
        """The correction (m,) of the next map, and the pad (n,) of the one after it.

        The pad is empty after the last map.

        Raises:
            SlotDamaged: the disk did not keep the correction.
            CounterMoved: somebody else has drawn from the store; nothing may be used.
        """
        self._check()
        self._batch.require_sole_use()
        index = self._next_correction
        assert self._next_pad == index + 1, "pads and corrections are given out in turn"
        region = self._regions[index]
        correction_m = np.empty(region.shape.out_features, region.shape.dtype)
        following: MapRegion | None = None
        pad, source = self._no_pad, region
        if index + 1 < len(self._regions):
            following = source = self._regions[index + 1]
            pad = np.empty(following.shape.pad_stride, np.uint8)  # whole blocks
        self._next_correction, self._next_pad = index + 1, index + 2
        stream = source.pads.stream
        good = _read(
            system_functions(),
            self._batch.corrections_fd,
            region.offset + self._slot * region.shape.correction_bytes,
            correction_m,
            region.weights,
            region.expected[self._slot],
            stream.round_keys,
            stream.prefix,
            self._slot * source.shape.pad_stride // _AES_BLOCK,
            pad,
        )
        if not good:  # again, by the path that says what is wrong
            correction_m = self._batch.corrections(region.shape.index, self._slot, 1)[0]
        if following is not None:
            pad = pad[: following.shape.pad_bytes].view(following.shape.dtype)
        return correction_m, pad
