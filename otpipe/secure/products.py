"""Products of two secrets: the cross terms by Gilboa's OT products, at mixed widths.

Operands may live in smaller rings than the result (Rathee et al., SiRnn, IEEE S&P 2021, section
III-D): x = x_s + x_c + 2^n p_s p_c (see ``resizing.Split``), so that

    x y = (x_s + x_c)(y_s + y_c) + 2^n p_x (y_s + y_c) + 2^m p_y (x_s + x_c)  + 2^(n+m) p_x p_y,

where the last term vanishes mod 2^L for L <= n + m. Every product of a server's with a client's
number goes through ``transfers``; all of them are one round.

Shape suffixes: R rows, w columns, B batch, I K J sides of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from otpipe.secure.resizing import Split
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.rounds import Pending, Step, in_one_round
from otpipe.secure.shares import Share, reduced
from otpipe.secure.transfers import bit_times_value, product, row_product

MAX_MATMUL_RESULTS = 1 << 26
"""Values of all OT results of a matrix product held at once; more are made in further rounds."""


def mul(is_server: bool, x: Share, y: Share, bits: int) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.mul`."""
    if x.shape != y.shape:
        raise ValueError(f"{x!r} and {y!r} differ in shape; use mul_rows for a factor a row.")
    x_part, x_split = _operand(is_server, x, bits)
    y_part, y_split = _operand(is_server, y, bits)
    if x_split is not None and y_split is not None and bits > x.bits + y.bits:
        raise ValueError(
            f"A product in {bits} bits of {x!r} and {y!r} is wider than both together."
        )
    # The client's number chooses: once x's with the server's y, once y's with the server's x.
    cross = [
        product(is_server, y_part if is_server else x_part, min(x.bits, bits), bits),
        product(is_server, x_part if is_server else y_part, min(y.bits, bits), bits),
    ]
    x_wrap = _nowrap_times(is_server, x_split, y_part, y.bits, bits)
    y_wrap = _nowrap_times(is_server, y_split, x_part, x.bits, bits)
    first, second, *wraps = yield from in_one_round(*cross, *x_wrap, *y_wrap)
    total = x_part * y_part + first + second
    if x_split is not None:
        total = total + ((wraps[0] + wraps[1]) << x.bits)
    if y_split is not None:
        total = total + ((wraps[-2] + wraps[-1]) << y.bits)
    return Share.of(total, bits, x.frac + y.frac)


def mul_rows(is_server: bool, x_R: Share, y_Rw: Share, bits: int) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.mul_rows`."""
    if len(x_R.shape) != 1 or len(y_Rw.shape) != 2 or len(y_Rw.data) != len(x_R.data):
        raise ValueError(f"{x_R!r} has no factor for each row of {y_Rw!r}.")
    if x_R.bits < bits:
        raise ValueError(f"The factors {x_R!r} must live in the ring of {bits} bits; rescale them.")
    factor_R = reduced(x_R.data, bits)
    y_part, y_split = _operand(is_server, y_Rw, bits)
    words = y_Rw.shape[1]
    rows = row_product(is_server, y_part if is_server else factor_R, words, bits, bits)
    factor_Rw = factor_R[:, None].expand(-1, words)
    each = product(is_server, factor_Rw if is_server else y_part, min(y_Rw.bits, bits), bits)
    wrap = _nowrap_times(is_server, y_split, factor_Rw, bits, bits)
    first, second, *wraps = yield from in_one_round(rows, each, *wrap)
    total = factor_Rw * y_part + first + second
    if y_split is not None:
        total = total + ((wraps[0] + wraps[1]) << y_Rw.bits)
    return Share.of(total, bits, x_R.frac + y_Rw.frac)


def square_sum(is_server: bool, x: Share, bits: int) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.square_sum`."""
    if not x.bits < bits <= 2 * x.bits:
        raise ValueError(f"Squares of {x!r} want a ring of {x.bits + 1} to {2 * x.bits} bits.")
    split = Split.of(is_server, x)
    # x^2 = x_s^2 + x_c^2 + 2 x_s x_c + 2^(n+1) p (x_s + x_c) mod 2^(2n); the factor 2 and the
    # power 2^(n+1) shorten what is sent.
    cross = product(is_server, split.part, x.bits, bits - 1)
    wraps: list[Pending[Tensor]] = []
    if bits > x.bits + 1:
        wraps = _nowrap_times(is_server, split, split.part, x.bits, bits - 1)
    first, *rest = yield from in_one_round(cross, *wraps)
    total = split.part * split.part + (first << 1)
    for each in rest:
        total = total + (each << (x.bits + 1))
    return Share.of(total.sum(-1), bits, 2 * x.frac)


def matmul(is_server: bool, x_BIK: Share, y_BKJ: Share, bits: int) -> Step[Share]:
    """See :meth:`otpipe.secure.operations.SecureOperations.matmul`."""
    if min(x_BIK.bits, y_BKJ.bits) < bits:
        raise ValueError(f"{x_BIK!r} and {y_BKJ!r} must both live in {bits} bits; rescale them.")
    B, rows, inner = x_BIK.shape
    J = y_BKJ.shape[2]
    if y_BKJ.shape[:2] != (B, inner):
        raise ValueError(f"{x_BIK!r} and {y_BKJ!r} are no factors of a matrix product.")
    x, y = reduced(x_BIK.data, bits), reduced(y_BKJ.data, bits)
    result = x.new_zeros((B, rows, J))
    # Some matrices at a time, or some rows of one.
    room = max(1, MAX_MATMUL_RESULTS // (2 * bits * inner * J))
    B_step, row_step = max(1, room // rows), min(rows, room)
    for lo in range(0, B, B_step):
        for first_row in range(0, rows, row_step):
            part = (slice(lo, lo + B_step), slice(first_row, first_row + row_step))
            x_part, y_part = x[part], y[part[0]]
            left, right = yield from in_one_round(
                _choose_left(is_server, x_part, y_part, bits),
                _choose_right(is_server, x_part, y_part, bits),
            )
            result[part] = ring_matmul(x_part, y_part, bits) + left + right
    return Share.of(result, bits, x_BIK.frac + y_BKJ.frac)


def _operand(is_server: bool, x: Share, bits: int) -> tuple[Tensor, Split | None]:
    """Own part of x as an integer, and how its ring wraps if that matters mod 2^bits."""
    if x.bits >= bits:
        return reduced(x.data, bits), None
    split = Split.of(is_server, x)
    return split.part, split


def _nowrap_times(
    is_server: bool, split: Split | None, other: Tensor, other_bits: int, bits: int
) -> list[Pending[Tensor]]:
    """Shares mod 2^(bits - n) of p_s p_c other_s and of p_s p_c other_c; none if nothing wraps.

    ``other``: own part; the client's in [0, 2^other_bits).
    """
    if split is None:
        return []
    left = bits - split.bits
    if is_server:
        by_client = bit_times_value(True, split.nowrap * other, left)
        by_server = product(True, split.nowrap, min(other_bits, left), left)
    else:
        by_client = bit_times_value(False, split.nowrap, left)
        own = reduced(split.nowrap * other, left)
        by_server = product(False, own, min(other_bits, left), left)
    return [_shaped(by_client, other), _shaped(by_server, other)]


def _shaped(pending: Pending[Tensor], like: Tensor) -> Pending[Tensor]:
    return Pending(pending.requests, lambda got: pending.finish(got).view(like.shape))


def _choose_left(is_server: bool, x_BIK: Tensor, y_BKJ: Tensor, bits: int) -> Pending[Tensor]:
    """Shares of x_c y_s (B, I, J): each bit of x_c chooses a row of y_s."""
    J = y_BKJ.shape[2]
    shape = (*x_BIK.shape, J)
    own = y_BKJ[:, None].expand(shape).reshape(-1, J) if is_server else x_BIK.reshape(-1)
    pending = row_product(is_server, own, J, bits, bits)
    return _summed(pending, lambda got: got.view(shape).sum(2))


def _choose_right(is_server: bool, x_BIK: Tensor, y_BKJ: Tensor, bits: int) -> Pending[Tensor]:
    """Shares of x_s y_c (B, I, J): each bit of y_c chooses a column of x_s."""
    columns = x_BIK.shape[1]
    shape = (*y_BKJ.shape, columns)
    x_BKI = x_BIK.transpose(1, 2)
    own = x_BKI[:, :, None].expand(shape).reshape(-1, columns) if is_server else y_BKJ.reshape(-1)
    pending = row_product(is_server, own, columns, bits, bits)
    return _summed(pending, lambda got: got.view(shape).sum(1).transpose(1, 2))


def _summed(pending: Pending[Tensor], work: Callable[[Tensor], Tensor]) -> Pending[Tensor]:
    return Pending(pending.requests, lambda got: work(pending.finish(got)))
