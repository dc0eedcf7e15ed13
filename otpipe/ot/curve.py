"""The group of the base OTs: NIST P-256, prime order, cofactor 1.

Scalar multiplication is pycryptodome's (constant-time field arithmetic, blinded ladder). Points
travel as 64 bytes, x then y, big-endian; every received point is checked. The hash into the group
is the suite P256_XMD:SHA-256_SSWU_RO_ of RFC 9380 and works on public data only.
"""

from __future__ import annotations

import hashlib
import secrets

from Crypto.PublicKey.ECC import EccPoint

from otpipe.errors import ProtocolError

POINT_BYTES = 64

_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_A = _P - 3
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_Z = _P - 10  # RFC 9380, section 8.2
_BASE = EccPoint(
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
    "p256",
)


def random_scalar() -> int:
    """A secret scalar, uniform in [1, order)."""
    return 1 + secrets.randbelow(_ORDER - 1)


def times_base(scalar: int) -> EccPoint:
    """scalar times the generator."""
    return _BASE * scalar


def encode_point(point: EccPoint) -> bytes:
    """64 bytes; the point at infinity has none."""
    if point.is_point_at_infinity():
        raise ValueError("The point at infinity has no encoding.")
    x, y = point.xy
    return int(x).to_bytes(32, "big") + int(y).to_bytes(32, "big")


def decode_point(encoded: bytes, what: str) -> EccPoint:
    """A point of the group, never the neutral one.

    Args:
        encoded: 64 bytes from the peer.
        what: names it in errors.

    Raises:
        ProtocolError: not the encoding of a point on the curve, or the point at infinity.
    """
    if len(encoded) != POINT_BYTES:
        raise ProtocolError(f"{what} has {len(encoded)} bytes, not {POINT_BYTES}.")
    x, y = int.from_bytes(encoded[:32], "big"), int.from_bytes(encoded[32:], "big")
    if x == y == 0:  # pycryptodome's way to write the point at infinity
        raise ProtocolError(f"{what} is the point at infinity; the peer is faulty or hostile.")
    if x >= _P or y >= _P or (y * y - (x * x + _A) * x - _B) % _P:
        raise ProtocolError(f"{what} is not a point of P-256; the peer is faulty or hostile.")
    return EccPoint(x, y, "p256")


def hash_to_point(message: bytes, domain: bytes) -> EccPoint:
    """RFC 9380, section 3, hash_to_curve for P256_XMD:SHA-256_SSWU_RO_ (cofactor 1)."""
    uniform = _expand_message(message, domain, 96)
    first, second = (
        int.from_bytes(uniform[lo : lo + 48], "big") % _P for lo in (0, 48)
    )  # hash_to_field, section 5.2
    return EccPoint(*_map_to_curve(first), "p256") + EccPoint(*_map_to_curve(second), "p256")


def _expand_message(message: bytes, domain: bytes, num_bytes: int) -> bytes:
    """expand_message_xmd with SHA-256, RFC 9380, section 5.3.1."""
    if not 0 < len(domain) < 256:
        raise ValueError(f"A domain tag has 1 to 255 bytes, not {len(domain)}.")
    tag = domain + bytes([len(domain)])
    first = hashlib.sha256(
        bytes(64) + message + num_bytes.to_bytes(2, "big") + b"\x00" + tag
    ).digest()
    block = hashlib.sha256(first + b"\x01" + tag).digest()
    out = block
    for index in range(2, -(-num_bytes // 32) + 1):
        mixed = bytes(a ^ b for a, b in zip(first, block, strict=True))
        block = hashlib.sha256(mixed + bytes([index]) + tag).digest()
        out += block
    return out[:num_bytes]


def _map_to_curve(u: int) -> tuple[int, int]:
    """Simplified SWU map, RFC 9380, section 6.6.2; p = 3 mod 4."""
    zu2 = _Z * u * u % _P
    denominator = (zu2 * zu2 + zu2) % _P
    if denominator:
        x = -_B * pow(_A, -1, _P) * (1 + pow(denominator, -1, _P)) % _P
    else:
        x = _B * pow(_Z * _A, -1, _P) % _P
    square = (x * x * x + _A * x + _B) % _P
    y = pow(square, (_P + 1) // 4, _P)
    if y * y % _P != square:
        x = zu2 * x % _P
        square = (x * x * x + _A * x + _B) % _P
        y = pow(square, (_P + 1) // 4, _P)
    if y % 2 != u % 2:
        y = _P - y
    return x, y
