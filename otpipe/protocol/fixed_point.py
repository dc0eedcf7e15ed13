"""From float32 activations to ring elements and back, with an overflow that is impossible.

The client knows x in the clear, so it picks one scale per token: the largest for which no output
W_i·x can leave [-2^31, 2^31). The bound on |W_i·x| joins two inequalities. For any set O of
coordinates,

    |W_i·x|  <=  max|W| * sum_{j in O} |x_j|  +  ||W_i||_2 * ||x outside O||_2

(Hölder on O, Cauchy-Schwarz on the rest). With O empty this is Cauchy-Schwarz alone, which loses a
factor ||W_i||/127 on a vector that one outlier channel dominates, as large models have them; taking
the few largest coordinates into O gives those bits back. The smallest bound
belongs to a prefix of the coordinates sorted by magnitude, so some prefixes are tried.

Shapes: T rows, n in_features, m out_features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from otpipe.errors import OtpipeError
from otpipe.kernels.activations import INT8_LIMIT, MAX_OUTLIERS, mask_rows, open_rows

RING_LIMIT = 2.0**31
ROUNDING_SLACK = 1.0 - 1e-6
"""Covers the rounding of the float64 sums and products below, which is far less."""

NO_BIAS = np.empty(0, np.float32)
NOT_FINITE = (
    "an activation is infinite or not a number: the checkpoint overflows float32 on this input, or "
    "the server answered wrongly; check the server's weights"
)


def output_headroom(max_row_l1: float) -> float:
    """What W·x may reach before rounding x, so that W·round(x) stays inside the ring.

    Raises:
        OtpipeError: no such limit, for weights that cannot be.
    """
    headroom = (RING_LIMIT - 1.0 - 0.5 * max_row_l1) * ROUNDING_SLACK
    if headroom <= 0:
        raise OtpipeError(
            f"a weight row with absolute sum {max_row_l1:.4g} leaves no room in a 32-bit ring; "
            "the server's description of its weights cannot be right"
        )
    return headroom


PEAK_LIMIT = RING_LIMIT / 4
"""No rounded coordinate leaves the ring, even under weights that are all zero."""


def mask_activations(
    x_Tn: Tensor, mask_Tn: np.ndarray, max_row_l2: float, max_row_l1: float
) -> tuple[np.ndarray, np.ndarray]:
    """Round each row at its largest safe scale and subtract its pad, in one pass.

    Args:
        x_Tn: float32 (T, n) on the CPU.
        mask_Tn: uint32 (T, n), the pads r.
        max_row_l2, max_row_l1: largest norms of a row of the int8 weight; the second bounds what
            rounding each coordinate by at most 1/2 adds to an output.

    Returns:
        uint32 (T, n) = x - r mod 2^32, float64 (T,) real value of one unit of each row.

    Raises:
        OtpipeError: an activation is not finite; nothing may be sent.
    """
    masked_Tn, unit_T = mask_rows(
        x_Tn.contiguous().numpy(), mask_Tn, max_row_l2, output_headroom(max_row_l1), PEAK_LIMIT
    )
    if not np.isfinite(unit_T).all():
        raise OtpipeError(NOT_FINITE)
    return masked_Tn, unit_T


def open_outputs(
    y_Tm: np.ndarray,
    correction_Tm: np.ndarray,
    unit_T: np.ndarray,
    scale_m: Tensor,
    bias_m: Tensor | None,
    out_Tm: Tensor,
) -> None:
    """Add the correction to the server's answer and return to real numbers, in one pass.

    Args:
        y_Tm: uint32 (T, m), W (x - r). correction_Tm: uint32 (T, m), W r.
        unit_T: float64 (T,) from :func:`mask_activations`.
        scale_m: float32 (m,) scales of the int8 weight rows. bias_m: float32 (m,) or None.
        out_Tm: float32 (T, m), overwritten.
    """
    bias = NO_BIAS if bias_m is None else bias_m.numpy()
    open_rows(y_Tm, correction_Tm, unit_T, scale_m.numpy(), bias, out_Tm.numpy())


# -- the same in plain torch: the specification, and the twin that the kernels are tested against --


def output_bound(x_Tn: Tensor, max_row_l2: float) -> Tensor:
    """Upper bound on |W_i·x| over all rows i of W, for each row of ``x_Tn``.

    Args:
        x_Tn: float32 (T, n).
        max_row_l2: largest Euclidean norm of a row of the int8 weight.

    Returns:
        float64 (T,).
    """
    x = x_Tn.double()
    energy_T = x.square().sum(dim=1)
    plain_T = max_row_l2 * energy_T.sqrt()
    peak_T = x.abs().amax(dim=1)
    # O = {largest} helps only if 127 a < L2 (|x| - sqrt(|x|^2 - a^2)): needs a > 127 |x| / L2.
    if not bool((peak_T * max_row_l2 > INT8_LIMIT * energy_T.sqrt()).any()):
        return plain_T
    top_TK = x.abs().topk(min(MAX_OUTLIERS, x.shape[1]), dim=1).values
    rest_TK = (energy_T[:, None] - top_TK.square().cumsum(dim=1)).clamp_min(0.0)
    # The subtraction cancels; what it and the sum may have lost is put back, so that this stays a
    # bound whatever the order of summation was.
    rest_TK = rest_TK + (x.shape[1] + 2 * MAX_OUTLIERS) * 2.3e-16 * energy_T[:, None]
    joint_TK = INT8_LIMIT * top_TK.cumsum(dim=1) + max_row_l2 * rest_TK.sqrt()
    return torch.minimum(plain_T, joint_TK.amin(dim=1))


def quantize_activations(
    x_Tn: Tensor, max_row_l2: float, max_row_l1: float
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mask_activations` without the pad: int32 (T, n) rounded rows, float64 (T,) units."""
    bound_T = output_bound(x_Tn, max_row_l2)
    if not bool(torch.isfinite(bound_T).all()):
        raise OtpipeError(NOT_FINITE)
    # A zero row, or zero weights, may use any scale; 1 keeps it finite.
    scale_T = torch.where(bound_T > 0, output_headroom(max_row_l1) / bound_T.clamp_min(1e-300), 1.0)
    peak_T = x_Tn.abs().amax(dim=1).double()
    scale_T = torch.minimum(scale_T, PEAK_LIMIT / peak_T.clamp_min(1e-300))
    rounded_Tn = (x_Tn.double() * scale_T[:, None]).round_().to(torch.int32)
    return rounded_Tn.numpy(), (1.0 / scale_T).numpy()


def dequantize_outputs(
    y_Tm: np.ndarray, unit_T: np.ndarray, scale_m: Tensor, bias_m: Tensor | None
) -> Tensor:
    """:func:`open_outputs` of answers that are opened already, int32 (T, m): float32 (T, m)."""
    out_Tm = torch.from_numpy(y_Tm).to(torch.float32)
    out_Tm.mul_(scale_m)
    out_Tm.mul_(torch.from_numpy(unit_T).to(torch.float32)[:, None])
    return out_Tm if bias_m is None else out_Tm.add_(bias_m)
