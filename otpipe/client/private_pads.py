"""One pass's prepared material with private weights: pads r and results c (W r) - s, by slot."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.client.store import MapShape, SlotLease
from otpipe.model.private_description import RING_BITS, PrivateDescription
from otpipe.protocol.private_messages import MAX_PASS_SPANS, SlotSpan

RING_BYTES = 8
"""Of an element in the store: the pads' keystream is read as 64-bit words, reduced mod 2^44."""

_MASK = np.uint64((1 << RING_BITS) - 1)


def map_shapes(description: PrivateDescription) -> tuple[MapShape, ...]:
    """The maps of a private model as the store holds them."""
    return tuple(
        MapShape(m.index, m.in_features, m.out_features, RING_BYTES) for m in description.maps
    )


class PassPads:
    """See :class:`otpipe.model.private_maps.Pads`: row i of the pass is row i of the lease."""

    def __init__(self, lease: SlotLease) -> None:
        self._lease = lease

    def take(self, index: int, first_row: int, count: int) -> tuple[Tensor, Tensor]:
        """Pads (count, n) and results (count, m) of consecutive rows: int64, in [0, 2^44).

        Raises:
            PadReuseError: a row of this map was taken before.
            SlotDamaged: the disk did not keep the result of a row.
        """
        rows = slice(first_row, first_row + count)
        pads_Tn = self._lease.masks(index, rows) & _MASK
        results_Tm = self._lease.corrections(index, rows)
        return torch.from_numpy(pads_Tn.view(np.int64)), torch.from_numpy(results_Tm.view(np.int64))


def spans_of(lease: SlotLease) -> tuple[SlotSpan, ...]:
    """The slots of a lease as a PASS names them: by batch, first slot and number."""
    spans = tuple(
        SlotSpan(bytes.fromhex(span.batch.batch_id), span.first_slot, span.num_slots)
        for span in lease.spans
    )
    assert len(spans) <= MAX_PASS_SPANS, "rows are chosen so that they fit"
    return spans
