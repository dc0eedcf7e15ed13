"""AES-128 without tables: two blocks in eight 32-bit words, one word for each bit of a byte.

A table look-up at a secret index shows in the cache, and a GPU has no AES instruction; a circuit of
logical operations has neither problem. The functions here use only ``& | ^ ~ << >>`` on 32-bit
signed integers, so that the same source runs on torch and numpy arrays and, compiled, in the Triton
kernels of ``triton_ops``. They call nothing, for Triton's sake. A right shift of a signed number is
arithmetic, hence each is masked afterwards.

Layout, after ``to_planes``: word p holds bit p of the 32 bytes; byte (row r, column c) of block s
lies at bit 8 r + 2 c + s. Methods:

- S-box: Boyar, Peralta, "A small depth-16 circuit for the AES S-box" (2012), 115 gates.
- Two blocks in eight words, rows and columns on that layout: Käsper, Schwabe, "Faster and
  timing-attack resistant AES-GCM" (CHES 2009), in the 32-bit variant of Pornin's BearSSL.

Names q0 to q7 are the words, least significant bit first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = tuple[Any, Any, Any, Any, Any, Any, Any, Any]

ROUNDS = 10
_LOW_BITS = ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F))


def sub_bytes(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """The S-box on all bytes; names as in the paper (x0 is the most significant bit)."""
    # top linear layer
    y14 = q4 ^ q2
    y13 = q7 ^ q1
    y9 = q7 ^ q4
    y8 = q7 ^ q2
    t0 = q6 ^ q5
    y1 = t0 ^ q0
    y4 = y1 ^ q4
    y12 = y13 ^ y14
    y2 = y1 ^ q7
    y5 = y1 ^ q1
    y3 = y5 ^ y8
    t1 = q3 ^ y12
    y15 = t1 ^ q2
    y20 = t1 ^ q6
    y6 = y15 ^ q0
    y10 = y15 ^ t0
    y11 = y20 ^ y9
    y7 = q0 ^ y11
    y17 = y10 ^ y11
    y19 = y10 ^ y8
    y16 = t0 ^ y11
    y21 = y13 ^ y16
    y18 = q7 ^ y16
    # non-linear middle
    t2 = y12 & y15
    t4 = (y3 & y6) ^ t2
    t6 = (y4 & q0) ^ t2
    t7 = y13 & y16
    t9 = (y5 & y1) ^ t7
    t11 = (y2 & y7) ^ t7
    t12 = y9 & y11
    t14 = (y14 & y17) ^ t12
    t16 = (y8 & y10) ^ t12
    t21 = t4 ^ t14 ^ y20
    t22 = t6 ^ t16 ^ y19
    t23 = t9 ^ t14 ^ y21
    t24 = t11 ^ t16 ^ y18
    t25 = t21 ^ t22
    t26 = t21 & t23
    t27 = t24 ^ t26
    t29 = (t25 & t27) ^ t22
    t30 = t23 ^ t24
    t33 = ((t22 ^ t26) & t30) ^ t24
    t34 = t23 ^ t33
    t35 = t27 ^ t33
    t36 = t24 & t35
    t37 = t36 ^ t34
    t38 = t27 ^ t36
    t40 = t25 ^ (t29 & t38)
    t41 = t40 ^ t37
    t42 = t29 ^ t33
    t43 = t29 ^ t40
    t44 = t33 ^ t37
    t45 = t42 ^ t41
    z0 = t44 & y15
    z1 = t37 & y6
    z2 = t33 & q0
    z3 = t43 & y16
    z4 = t40 & y1
    z5 = t29 & y7
    z6 = t42 & y11
    z7 = t45 & y17
    z8 = t41 & y10
    z9 = t44 & y12
    z10 = t37 & y3
    z11 = t33 & y4
    z12 = t43 & y13
    z13 = t40 & y5
    z14 = t29 & y2
    z15 = t42 & y9
    z16 = t45 & y14
    z17 = t41 & y8
    # bottom linear layer
    t46 = z15 ^ z16
    t47 = z10 ^ z11
    t48 = z5 ^ z13
    t49 = z9 ^ z10
    t50 = z2 ^ z12
    t51 = z2 ^ z5
    t52 = z7 ^ z8
    t53 = z0 ^ z3
    t54 = z6 ^ z7
    t55 = z16 ^ z17
    t56 = z12 ^ t48
    t57 = t50 ^ t53
    t58 = z4 ^ t46
    t59 = z3 ^ t54
    t60 = t46 ^ t57
    t61 = z14 ^ t57
    t62 = t52 ^ t58
    t63 = t49 ^ t58
    t64 = z4 ^ t59
    t65 = t61 ^ t62
    t66 = z1 ^ t63
    s3 = t53 ^ t66
    return (
        t48 ^ ~t60,
        t56 ^ ~t62,
        t47 ^ t65,
        t51 ^ t66,
        s3,
        t55 ^ ~(t64 ^ t65),
        t64 ^ ~s3,
        t59 ^ t63,
    )


def shift_rows(q):  # type: ignore[no-untyped-def]
    """Row r of the state, byte r of the word, moves r columns of two bits."""
    return (
        (q & 0x000000FF)
        | ((q >> 2) & 0x00003F00)
        | ((q & 0x00000300) << 6)
        | ((q >> 4) & 0x000F0000)
        | ((q & 0x000F0000) << 4)
        | ((q >> 6) & 0x03000000)
        | ((q & 0x3F000000) << 2)
    )


def mix_columns(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """2 a + 3 b + c + d along the rows; r is the state one row on, u two rows on (a ^ b first)."""
    r0 = ((q0 >> 8) & 0x00FFFFFF) | (q0 << 24)
    r1 = ((q1 >> 8) & 0x00FFFFFF) | (q1 << 24)
    r2 = ((q2 >> 8) & 0x00FFFFFF) | (q2 << 24)
    r3 = ((q3 >> 8) & 0x00FFFFFF) | (q3 << 24)
    r4 = ((q4 >> 8) & 0x00FFFFFF) | (q4 << 24)
    r5 = ((q5 >> 8) & 0x00FFFFFF) | (q5 << 24)
    r6 = ((q6 >> 8) & 0x00FFFFFF) | (q6 << 24)
    r7 = ((q7 >> 8) & 0x00FFFFFF) | (q7 << 24)
    a0 = q0 ^ r0
    a1 = q1 ^ r1
    a2 = q2 ^ r2
    a3 = q3 ^ r3
    a4 = q4 ^ r4
    a5 = q5 ^ r5
    a6 = q6 ^ r6
    a7 = q7 ^ r7
    return (
        a7 ^ r0 ^ (((a0 >> 16) & 0xFFFF) | (a0 << 16)),
        a0 ^ a7 ^ r1 ^ (((a1 >> 16) & 0xFFFF) | (a1 << 16)),
        a1 ^ r2 ^ (((a2 >> 16) & 0xFFFF) | (a2 << 16)),
        a2 ^ a7 ^ r3 ^ (((a3 >> 16) & 0xFFFF) | (a3 << 16)),
        a3 ^ a7 ^ r4 ^ (((a4 >> 16) & 0xFFFF) | (a4 << 16)),
        a4 ^ r5 ^ (((a5 >> 16) & 0xFFFF) | (a5 << 16)),
        a5 ^ r6 ^ (((a6 >> 16) & 0xFFFF) | (a6 << 16)),
        a6 ^ r7 ^ (((a7 >> 16) & 0xFFFF) | (a7 << 16)),
    )


def to_planes(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """Words of two blocks, alternating, to planes; its own inverse.

    q0, q2, q4, q6 are the little-endian words of the first block, q1, q3, q5, q7 of the second.
    """
    a0 = (q0 & 0x55555555) | ((q1 & 0x55555555) << 1)
    a1 = ((q0 >> 1) & 0x55555555) | (q1 & -0x55555556)
    a2 = (q2 & 0x55555555) | ((q3 & 0x55555555) << 1)
    a3 = ((q2 >> 1) & 0x55555555) | (q3 & -0x55555556)
    a4 = (q4 & 0x55555555) | ((q5 & 0x55555555) << 1)
    a5 = ((q4 >> 1) & 0x55555555) | (q5 & -0x55555556)
    a6 = (q6 & 0x55555555) | ((q7 & 0x55555555) << 1)
    a7 = ((q6 >> 1) & 0x55555555) | (q7 & -0x55555556)
    b0 = (a0 & 0x33333333) | ((a2 & 0x33333333) << 2)
    b2 = ((a0 >> 2) & 0x33333333) | (a2 & -0x33333334)
    b1 = (a1 & 0x33333333) | ((a3 & 0x33333333) << 2)
    b3 = ((a1 >> 2) & 0x33333333) | (a3 & -0x33333334)
    b4 = (a4 & 0x33333333) | ((a6 & 0x33333333) << 2)
    b6 = ((a4 >> 2) & 0x33333333) | (a6 & -0x33333334)
    b5 = (a5 & 0x33333333) | ((a7 & 0x33333333) << 2)
    b7 = ((a5 >> 2) & 0x33333333) | (a7 & -0x33333334)
    return (
        (b0 & 0x0F0F0F0F) | ((b4 & 0x0F0F0F0F) << 4),
        (b1 & 0x0F0F0F0F) | ((b5 & 0x0F0F0F0F) << 4),
        (b2 & 0x0F0F0F0F) | ((b6 & 0x0F0F0F0F) << 4),
        (b3 & 0x0F0F0F0F) | ((b7 & 0x0F0F0F0F) << 4),
        ((b0 >> 4) & 0x0F0F0F0F) | (b4 & -0x0F0F0F10),
        ((b1 >> 4) & 0x0F0F0F0F) | (b5 & -0x0F0F0F10),
        ((b2 >> 4) & 0x0F0F0F0F) | (b6 & -0x0F0F0F10),
        ((b3 >> 4) & 0x0F0F0F0F) | (b7 & -0x0F0F0F10),
    )


def encrypt_planes(state: Words, key_planes: Any) -> Words:
    """Ten rounds on torch or numpy words; ``key_planes`` (11, 8, ...) broadcasts against them."""
    state = tuple(q ^ k for q, k in zip(state, key_planes[0], strict=True))
    for round_index in range(1, ROUNDS + 1):
        state = tuple(shift_rows(q) for q in sub_bytes(*state))
        if round_index < ROUNDS:
            state = mix_columns(*state)
        keys = key_planes[round_index]
        state = tuple(q ^ k for q, k in zip(state, keys, strict=True))
    return state


def expand_keys(keys: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Key schedule of AES-128 (FIPS 197, section 5.2): (K, 16) uint8 -> round keys (K, 11, 16)."""
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 16:
        raise ValueError(f"AES-128 keys are uint8 (K, 16), not {keys.dtype} {keys.shape}.")
    round_keys = np.empty((len(keys), ROUNDS + 1, 4, 4), np.uint8)
    round_keys[:, 0] = keys.reshape(-1, 4, 4)
    constant = 1
    for index in range(1, ROUNDS + 1):
        before, now = round_keys[:, index - 1], round_keys[:, index]
        now[:, 0] = before[:, 0] ^ _substituted(np.roll(before[:, 3], -1, axis=1))
        now[:, 0, 0] ^= np.uint8(constant)
        constant = (constant << 1) ^ (0x11B if constant & 0x80 else 0)
        for word in range(1, 4):
            now[:, word] = before[:, word] ^ now[:, word - 1]
    return round_keys.reshape(len(keys), ROUNDS + 1, 16)


def _substituted(octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The S-box on an array of bytes, one bit to a word."""
    wide = octets.astype(np.int32)
    planes = sub_bytes(*((wide >> bit) & 1 for bit in range(8)))
    out = sum((plane & 1) << bit for bit, plane in enumerate(planes))
    return np.asarray(out).astype(np.uint8)


def key_planes(round_keys: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Round keys (..., 11, 16) in planes, the same for both blocks: int32 (..., 11, 8)."""
    words = np.ascontiguousarray(round_keys).view("<i4").astype(np.int32)
    doubled = [words[..., i // 2] for i in range(8)]
    return np.stack(to_planes(*doubled), axis=-1)
