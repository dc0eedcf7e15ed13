"""``otpipe.serve`` with weights of noise made on the device: torchrun runs this file instead.

For shapes whose checkpoint is too large to write. Everything but reading files is the server's
own: quantisation, digests, placement, serving. The noise is seeded by tensor and row, so that every
start and every rank has the same weights, and pads fit them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from otpipe.model.checkpoint import Checkpoint, MapPart
from otpipe.model.quantize import rows_per_chunk
from otpipe.serve import main


def noise_chunks(
    self: Checkpoint,
    parts: Iterable[MapPart],
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """As ``Checkpoint.row_chunks``: bf16 noise of standard deviation 0.02."""
    for part in parts:
        step = rows_per_chunk(part.columns)
        for first in range(0, part.rows, step):
            seed = zlib.crc32(f"{part.weight} {first}".encode())
            generator = torch.Generator(device).manual_seed(seed)
            rows = torch.empty(
                (min(step, part.rows - first), part.columns), dtype=torch.bfloat16, device=device
            )
            yield rows.normal_(0, 0.02, generator=generator)
            if progress is not None:
                progress(rows.nbytes)


if __name__ == "__main__":
    Checkpoint.row_chunks = noise_chunks  # type: ignore[method-assign]
    main()
