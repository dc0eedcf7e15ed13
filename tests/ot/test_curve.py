"""The group of the base OTs: known answers, and every malformed point."""

from __future__ import annotations

import pytest

from otpipe.errors import ProtocolError
from otpipe.ot import curve

RFC_DOMAIN = b"QUUX-V01-CS02-with-P256_XMD:SHA-256_SSWU_RO_"


@pytest.mark.parametrize(
    ("message", "x", "y"),
    [
        (
            b"",
            "2c15230b26dbc6fc9a37051158c95b79656e17a1a920b11394ca91c44247d3e4",
            "8a7a74985cc5c776cdfe4b1f19884970453912e9d31528c060be9ab5c43e8415",
        ),
        (
            b"abc",
            "0bb8b87485551aa43ed54f009230450b492fead5f1cc91658775dac4a3388a0f",
            "5c41b3d0731a27a7b14bc0bf0ccded2d8751f83493404c84a88e71ffd424212e",
        ),
    ],
)
def test_hash_to_point_has_the_vectors_of_rfc_9380(message: bytes, x: str, y: str) -> None:
    """Appendix J.1.1."""
    point = curve.hash_to_point(message, RFC_DOMAIN)
    assert curve.encode_point(point).hex() == x + y


def test_zero_maps_to_the_curve_too() -> None:
    """The exceptional case of the map: Z^2 u^4 + Z u^2 = 0."""
    x, y = curve._map_to_curve(0)
    assert (y * y - (x**3 + curve._A * x + curve._B)) % curve._P == 0
    assert y % 2 == 0


def test_points_survive_the_wire() -> None:
    for scalar in (1, 2, curve._ORDER - 1, curve.random_scalar()):
        point = curve.times_base(scalar)
        assert curve.decode_point(curve.encode_point(point), "It") == point


def test_scalars_are_never_zero_and_never_twice() -> None:
    scalars = [curve.random_scalar() for _ in range(100)]
    assert len(set(scalars)) == 100
    assert all(0 < scalar < curve._ORDER for scalar in scalars)
    assert sum(scalar.bit_length() < 250 for scalar in scalars) < 20


GOOD = curve.encode_point(curve.times_base(7))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (bytes(64), "Point 3 is the point at infinity; the peer is faulty or hostile"),
        (GOOD[:32] + bytes(32), "Point 3 is not a point of P-256; the peer is faulty or hostile"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "Point 3 is not a point of P-256"),
        (bytes(31) + b"\x01" + bytes(31) + b"\x01", "Point 3 is not a point of P-256"),
        (bytes([255]) * 64, "Point 3 is not a point of P-256"),
        (GOOD[:63], "Point 3 has 63 bytes, not 64"),
    ],
)
def test_malformed_points_are_refused(encoded: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        curve.decode_point(encoded, "Point 3")


def test_coordinates_have_one_encoding() -> None:
    """x + p is the same field element: it is not accepted as a second spelling."""
    for u in range(1, 400):
        x, y = curve._map_to_curve(u)
        if x + curve._P < 1 << 256:
            break
    else:  # the chance of this is (1 - 2^-32)^400
        x, y = 0, pow(curve._B, (curve._P + 1) // 4, curve._P)
    assert (y * y - (x**3 + curve._A * x + curve._B)) % curve._P == 0
    spelled = (x + curve._P).to_bytes(32, "big") + y.to_bytes(32, "big")
    with pytest.raises(ProtocolError, match="is not a point"):
        curve.decode_point(spelled, "It")


def test_infinity_has_no_encoding_and_a_tag_has_a_length() -> None:
    point = curve.times_base(5)
    with pytest.raises(ValueError, match="point at infinity has no encoding"):
        curve.encode_point(point + -point)
    with pytest.raises(ValueError, match="domain tag has 1 to 255 bytes, not 0"):
        curve.hash_to_point(b"", b"")
