"""Products of many rows on a CUDA device, several at once, through pinned memory.

A request of many rows is mostly copies: to the device, and four times as much back. From pageable
memory they would pass through the driver's staging buffer while the calling thread waits. Here the
payload was received into pinned memory, the answer returns to pinned memory, and each of a few
requests has a CUDA stream of its own, so that one is copied in while another is multiplied and a
third is copied out.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

REQUESTS_AT_ONCE = 3
"""Copying in, multiplying, copying out; more would only take device memory."""

BULK_BYTES = 1 << 18
"""Payload from which a request is worth its own stream and pinned memory."""


def pinned_buffer(num_bytes: int) -> Tensor:
    """uint8 (num_bytes,) page-locked; torch keeps such memory for the next one of its size."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class BulkProducts:
    """Runs products on streams of their own. Safe to call from several threads.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lines: SimpleQueue[tuple[torch.cuda.Stream, torch.cuda.Event]] = SimpleQueue()
        for _ in range(REQUESTS_AT_ONCE):
            self._lines.put((torch.cuda.Stream(device), torch.cuda.Event(blocking=True)))

    def run(self, product: Callable[[Tensor], Tensor], payload: Tensor) -> Tensor:
        """``product`` of ``payload`` on the device, in pinned memory.

        Args:
            product: uint8 (bytes,) on the device to uint8 (bytes,) on the device.
            payload: uint8 (bytes,), in pinned memory, or anywhere at the price of a slower copy.
        """
        stream, done = self._lines.get()
        try:
            with torch.cuda.stream(stream):
                result = product(payload.to(self._device, non_blocking=True))
                answer = pinned_buffer(result.numel())
                answer.copy_(result, non_blocking=True)
                done.record()
            done.synchronize()  # asleep, not spinning: the cores have clients to serve
        finally:
            self._lines.put((stream, done))
        return answer
