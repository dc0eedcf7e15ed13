"""The pads of one batch: views of one AES-256-CTR keystream per map.

A pad key is 32 bytes from the operating system. Map M has the key
``derive_key(pad_key, "pad", M)`` and slot s of it the bytes from ``s * pad_stride``, so every pad
element of a batch has one place in one keystream. Both readers below see the same bytes: the
online phase takes whole rows, preparation takes blocks of coordinates for all slots at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from Crypto.Cipher import AES

from otpipe.client.store_layout import MapShape, ModelLayout
from otpipe.crypto.randomness import derive_key, keystream

_WINDOW_BYTES = 64 << 20  # of one tile of pads kept during preparation
_NUM_WINDOWS = 4  # exchanges under way at once, at most
_KEYSTREAM_NONCE = 0  # the key is used for this purpose only
_SHORT_BYTES = 64 << 10  # below, setting up a counter-mode object costs more than its output


class PadStream:
    """Random access to the pads of one map. Not printable and not picklable: it holds the key."""

    def __init__(self, pad_key: bytes, shape: MapShape) -> None:
        self.shape = shape
        self._key = derive_key(pad_key, "pad", shape.index)
        self._cipher = AES.new(self._key, AES.MODE_ECB)

    def rows(self, first_slot: int, count: int) -> np.ndarray:
        """Pads (count, n) of consecutive slots, uint32 or uint8, contiguous."""
        shape = self.shape
        stride = shape.pad_stride
        out = np.empty(count * stride, np.uint8)
        if out.size <= _SHORT_BYTES:
            self._short_keystream(first_slot * stride, out)
        else:
            keystream(self._key, _KEYSTREAM_NONCE, first_slot * stride, out)
        rows = out.reshape(count, stride)
        if stride != shape.pad_bytes:
            rows = np.ascontiguousarray(rows[:, : shape.pad_bytes])
        return rows.view(shape.dtype)

    def _short_keystream(self, offset_bytes: int, out: np.ndarray) -> None:
        """``keystream``, with the key schedule kept: a decode step asks hundreds of times.

        CTR is the block cipher applied to nonce || block number (NIST SP 800-38A, section 6.5).
        Offset and length are multiples of 16.
        """
        first, num_blocks = offset_bytes // 16, out.size // 16
        counters = np.empty((num_blocks, 2), ">u8")
        counters[:, 0] = _KEYSTREAM_NONCE
        counters[:, 1] = np.arange(first, first + num_blocks)
        self._cipher.encrypt(counters.view(np.uint8).reshape(-1).data, output=out.data)

    def window(self, num_slots: int, first_byte: int, num_bytes: int) -> np.ndarray:
        """Bytes first_byte .. first_byte + num_bytes of the pads of slots 0 .. T-1: (T, num_bytes).

        ``first_byte`` is a multiple of 16.
        """
        stride = self.shape.pad_stride
        if num_bytes == stride:
            out = np.empty(num_slots * stride, np.uint8)
            keystream(self._key, _KEYSTREAM_NONCE, 0, out)
            return out.reshape(num_slots, stride)
        tile = np.empty((num_slots, num_bytes), np.uint8)
        for slot in range(num_slots):
            keystream(self._key, _KEYSTREAM_NONCE, slot * stride + first_byte, tile[slot])
        return tile

    def __repr__(self) -> str:
        return f"PadStream(map {self.shape.index})"

    def __reduce__(self) -> str:
        raise TypeError("pads are secret and are never pickled")


class CoordinateReader:
    """Blocks of coordinates for all slots of a batch, in any order; fast when ascending.

    Keeps the last four tiles of at most 64 MB of pads, so that a walk through the coordinates of a
    map, or of up to four maps by turns, generates every byte once. Safe to call from several
    threads.
    """

    def __init__(self, pad_key: bytes, layout: ModelLayout, num_slots: int) -> None:
        self._streams = {shape.index: PadStream(pad_key, shape) for shape in layout.shapes}
        self._num_slots = num_slots
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, map_index: int, first_coord: int, count: int) -> np.ndarray:
        """Pads (T, count) of coordinates first_coord .. first_coord + count, contiguous."""
        stream = self._streams.get(map_index)
        if stream is None:
            raise ValueError(f"the model has no map {map_index}")
        shape = stream.shape
        if first_coord < 0 or count < 0 or first_coord + count > shape.in_features:
            raise ValueError(
                f"coordinates {first_coord}..{first_coord + count} of map {map_index}, which has "
                f"{shape.in_features}"
            )
        width = min(shape.pad_stride, max(16, _WINDOW_BYTES // self._num_slots // 16 * 16))
        begin, end = first_coord * shape.ring_bytes, (first_coord + count) * shape.ring_bytes
        block = np.empty((self._num_slots, end - begin), np.uint8)
        with self._lock:
            position = begin
            while position < end:
                start = position // width * width
                tile = self._tile(stream, start, min(width, shape.pad_stride - start))
                stop = min(end, start + width)
                block[:, position - begin : stop - begin] = tile[:, position - start : stop - start]
                position = stop
        return block.view(shape.dtype)

    def _tile(self, stream: PadStream, start: int, width: int) -> np.ndarray:
        name = (stream.shape.index, start)
        tile = self._windows.get(name)
        if tile is None:
            while len(self._windows) >= _NUM_WINDOWS:
                self._windows.popitem(last=False)
            tile = self._windows[name] = stream.window(self._num_slots, start, width)
        else:
            self._windows.move_to_end(name)
        return tile
