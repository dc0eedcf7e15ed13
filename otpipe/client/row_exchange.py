"""One masked row out and its answer back, each one compiled call: the inside of a decode step.

Shapes: n in_features, m out_features.
"""

from __future__ import annotations

import numpy as np

from otpipe.kernels.activations import mask_row, open_row
from otpipe.kernels.cpu import Array, kernel
from otpipe.kernels.native_io import (
    BROKEN,
    DONE,
    FIRST_READ_BYTES,
    receive_all,
    receive_some,
    send_all,
)
from otpipe.protocol.wire import MIN_BYTES_PER_S

FOREIGN = BROKEN + 1
"""Something else arrived than the answer that is due; it waits in the answer's memory."""


@kernel
def send_masked(
    functions: Array,
    fd: int,
    head: Array,
    frame: Array,
    masked_n: Array,
    x_n: Array,
    pad_n: Array,
    max_row_l2: float,
    headroom: float,
    peak_limit: float,
    timeout_ms: int,
) -> tuple[int, int, float]:
    """Round a row, subtract its pad and send it.

    Args:
        functions, fd: of ``native_io``.
        frame: uint8, for the whole request, from ``head`` to ``masked_n``: uint32 (n,), its end.
        x_n: float32 (n,). pad_n: uint32 (n,).
        max_row_l2, headroom, peak_limit: as for ``mask_rows``.
        timeout_ms: for every wait until the socket takes more.

    Returns:
        Status and number of bytes sent as of ``send_all``, and the real value of one unit: NaN for
        a row that is not finite, of which nothing is sent.
    """
    unit = mask_row(x_n, pad_n, max_row_l2, headroom, peak_limit, masked_n)
    if not np.isfinite(unit):
        return DONE, 0, unit
    frame[: head.shape[0]] = head
    status, sent = send_all(functions, fd, frame, 0, frame.shape[0], timeout_ms)
    return status, sent, unit


@kernel
def receive_opened(
    functions: Array,
    fd: int,
    frame: Array,
    filled: int,
    head: Array,
    answer_m: Array,
    correction_m: Array,
    unit: float,
    scale_m: Array,
    bias_m: Array,
    out_m: Array,
    first_timeout_ms: int,
    timeout_ms: int,
    looks: int,
) -> tuple[int, int]:
    """Receive the answer that is due, add the correction, and return to real numbers.

    Args:
        frame: uint8, for the whole answer, whose payload is ``answer_m``: uint32 (m,).
        filled: how far it is filled.
        head: uint8, what the answer has to begin with.
        correction_m, unit, scale_m, bias_m, out_m: as for ``open_rows``.
        first_timeout_ms: for the first bytes. timeout_ms: for every further wait.
        looks: as of ``receive_some``, for the first bytes.

    Returns:
        Status, and how far ``frame`` is filled. Only after DONE does ``out_m`` hold the result.
    """
    if filled == 0:
        limit = min(frame.shape[0], FIRST_READ_BYTES)
        status, filled = receive_some(functions, fd, frame, 0, limit, first_timeout_ms, looks)
        if status != DONE:
            return status, filled
    head_bytes = head.shape[0]
    limit_s = timeout_ms // 1000 + frame.shape[0] // MIN_BYTES_PER_S
    if filled < head_bytes:
        status, filled = receive_all(functions, fd, frame, filled, head_bytes, timeout_ms, limit_s)
        if status != DONE:
            return status, filled
    for i in range(head_bytes):
        if frame[i] != head[i]:
            return FOREIGN, filled
    status, filled = receive_all(functions, fd, frame, filled, frame.shape[0], timeout_ms, limit_s)
    if status == DONE:
        open_row(answer_m, correction_m, unit, scale_m, bias_m, out_m)
    return status, filled
