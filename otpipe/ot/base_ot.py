"""128 random OTs from Diffie-Hellman: Endemic OT (Masny, Rindal, CCS 2019), one message each way.

For OT i the receiver with choice c draws a scalar b and a random point r_{1-c}, and sends both r_0
and r_1, where r_c = b G - H(r_{1-c}); the pair is uniform whatever c is, so c is hidden without any
assumption. The sender sends A = a G and has the keys KDF(a (r_s + H(r_{1-s}))) for s = 0 and 1; the
receiver has KDF(b A) = that of s = c. The other one is a Diffie-Hellman value of a point that the
random oracle H moved out of the receiver's control: CDH.

H is separated by session, index and side; the KDF hashes the whole transcript of its OT with it.
"""

from __future__ import annotations

import hashlib

from Crypto.PublicKey.ECC import EccPoint

from otpipe.errors import ProtocolError
from otpipe.ot.curve import (
    POINT_BYTES,
    decode_point,
    encode_point,
    hash_to_point,
    random_scalar,
    times_base,
)

KEY_BYTES = 16

_POINT_DOMAIN = b"otpipe base OT v1 P256_XMD:SHA-256_SSWU_RO_"
_KEY_DOMAIN = b"otpipe base OT key v1"


class BaseOtReceiver:
    """Holds the choices. ``first_message`` goes out, then ``keys`` takes the sender's point."""

    def __init__(self, choices: list[int], session: bytes) -> None:
        self._choices, self._session = choices, session
        self._scalars = [random_scalar() for _ in choices]
        pairs = []
        for i, (choice, scalar) in enumerate(zip(choices, self._scalars, strict=True)):
            free = encode_point(times_base(random_scalar()))
            bound = times_base(scalar) + -_oracle(session, i, choice, free)
            # Both branches cost the same: only the place in the message depends on the choice.
            pair = (encode_point(bound), free)
            pairs.append(pair[choice] + pair[1 - choice])
        self.first_message = b"".join(pairs)

    def keys(self, answer: bytes, binding: bytes) -> list[bytes]:
        """The chosen key of each OT, 16 bytes.

        Args:
            answer: the sender's point, 64 bytes.
            binding: what both parties hash into every key (their nonces).

        Raises:
            ProtocolError: not a point of the group.
        """
        point = decode_point(answer, "The base OT point of the sender")
        out = []
        for i, (choice, scalar) in enumerate(zip(self._choices, self._scalars, strict=True)):
            pair = _pair(self.first_message, i)
            out.append(_key(binding, i, choice, answer, pair, point * scalar))
        return out

    def __repr__(self) -> str:
        return f"BaseOtReceiver({len(self._choices)} choices hidden)"


def send_base_ots(
    first_message: bytes, session: bytes, binding: bytes
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The sender's side: both keys of each OT, and the answer (64 bytes) for the receiver.

    Args:
        first_message: two points (128 bytes) for each OT.
        session: what separates the random oracle, as the receiver has it.
        binding: what both parties hash into every key.

    Raises:
        ProtocolError: a point that is not of the group, or a degenerate pair.
    """
    scalar = random_scalar()
    answer = encode_point(times_base(scalar))
    keys = []
    for i in range(len(first_message) // (2 * POINT_BYTES)):
        pair = _pair(first_message, i)
        points = [decode_point(pair[side], f"Point {side} of base OT {i}") for side in (0, 1)]
        both = []
        for side in (0, 1):
            shifted = points[side] + _oracle(session, i, side, pair[1 - side])
            if shifted.is_point_at_infinity():
                raise ProtocolError(
                    f"Base OT {i} would have the neutral element as key {side}; "
                    f"the peer is faulty or hostile."
                )
            both.append(_key(binding, i, side, answer, pair, shifted * scalar))
        keys.append((both[0], both[1]))
    return keys, answer


def _pair(message: bytes, i: int) -> tuple[bytes, bytes]:
    start = 2 * POINT_BYTES * i
    middle = start + POINT_BYTES
    return message[start:middle], message[middle : middle + POINT_BYTES]


def _oracle(session: bytes, i: int, side: int, other: bytes) -> EccPoint:
    """H for the point on ``side`` of OT i, of the point on the other side."""
    return hash_to_point(session + i.to_bytes(4, "big") + bytes([side]) + other, _POINT_DOMAIN)


def _key(
    binding: bytes, i: int, side: int, answer: bytes, pair: tuple[bytes, bytes], shared: EccPoint
) -> bytes:
    parts = (binding, i.to_bytes(4, "big"), bytes([side]), answer, *pair, encode_point(shared))
    digest = hashlib.sha256(_KEY_DOMAIN)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()[:KEY_BYTES]
