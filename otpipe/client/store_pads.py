"""The pads of one batch: views of one AES-256-CTR keystream per map.

A pad key is 32 bytes from the operating system. Map M has the key
``derive_key(pad_key, "pad", M)`` and slot s of it the bytes from ``s * pad_stride``, so every pad
element of a batch has one place in one keystream. Both readers below see the same bytes: the
online phase takes whole rows, preparation takes blocks of coordinates for all slots at once.
"""

from __future__ import annotations

import numpy as np

from otpipe.client.store_layout import MapShape, ModelLayout
from otpipe.crypto.randomness import Keystream, derive_key

_BLOCK = 16  # pads of a slot begin on a block of the cipher, and can be entered at any other
_KEYSTREAM_NONCE = 0  # the key is used for this purpose only


class PadStream:
    """Random access to the pads of one map. Not printable and not picklable: it holds the key."""

    def __init__(self, pad_key: bytes, shape: MapShape) -> None:
        self.shape = shape
        self.stream = Keystream(derive_key(pad_key, "pad", shape.index), _KEYSTREAM_NONCE)

    def rows(self, first_slot: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Pads (count, n) of slots, uint32 or uint8, contiguous; in ``out`` if it is given."""
        shape = self.shape
        stride = shape.pad_stride
        if out is not None and stride == shape.pad_bytes:
            self.stream.fill(first_slot * stride, out.view(np.uint8))
            return out
        octets = np.empty(count * stride, np.uint8)
        self.stream.fill(first_slot * stride, octets)
        rows = octets.reshape(count, stride)
        if stride != shape.pad_bytes:
            rows = np.ascontiguousarray(rows[:, : shape.pad_bytes])
        if out is None:
            return rows.view(shape.dtype)
        out[:] = rows.view(shape.dtype)
        return out

    def columns(self, num_slots: int, first_coord: int, count: int) -> np.ndarray:
        """Pads (T, count) of coordinates first_coord .. of slots 0 .. T-1, contiguous."""
        shape = self.shape
        begin, end = first_coord * shape.ring_bytes, (first_coord + count) * shape.ring_bytes
        start, stop = begin // _BLOCK * _BLOCK, -(-end // _BLOCK) * _BLOCK
        out = np.empty((num_slots, stop - start), np.uint8)
        self.stream.rows(start, shape.pad_stride, out)
        return np.ascontiguousarray(out[:, begin - start : end - start]).view(shape.dtype)

    def __repr__(self) -> str:
        return f"PadStream(map {self.shape.index})"

    def __reduce__(self) -> str:
        raise TypeError("pads are secret and are never pickled")


class CoordinateReader:
    """Blocks of coordinates for all slots of a batch, in any order, from any number of threads."""

    def __init__(self, pad_key: bytes, layout: ModelLayout, num_slots: int) -> None:
        self.streams = {shape.index: PadStream(pad_key, shape) for shape in layout.shapes}
        self._num_slots = num_slots

    def read(self, map_index: int, first_coord: int, count: int) -> np.ndarray:
        """Pads (T, count) of coordinates first_coord .. first_coord + count, contiguous."""
        stream = self.streams.get(map_index)
        if stream is None:
            raise ValueError(f"the model has no map {map_index}")
        shape = stream.shape
        if first_coord < 0 or count < 1 or first_coord + count > shape.in_features:
            raise ValueError(
                f"coordinates {first_coord}..{first_coord + count} of map {map_index}, which has "
                f"{shape.in_features}"
            )
        return stream.columns(self._num_slots, first_coord, count)
