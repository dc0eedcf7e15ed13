"""Key derivation, the AES-256-CTR keystream, and samplers of secrets.

Secrets come from the operating system: a sampler draws a fresh 256-bit key from ``os.urandom`` and
expands it with AES-256-CTR.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from numpy.typing import NDArray

from otpipe.kernels.cpu import parallel_for

KEY_BYTES = 32
_DOMAIN = b"otpipe key v1"
_AES_BLOCK = 16
_ZEROS = bytes(1 << 16)  # small enough to stay in the cache while it is encrypted again and again
_PARALLEL_BYTES = 1 << 18

Label = str | int | bytes


def derive_key(master: bytes, *labels: Label) -> bytes:
    """A 32-byte key for one purpose: HKDF-Expand with SHA-256 (RFC 5869, section 2.3).

    ``master`` is 32 uniform bytes (so no extract step is needed). Labels are encoded with their
    type and length: no two label sequences collide. Integers are non-negative, below 2^64.
    """
    if len(master) != KEY_BYTES:
        raise ValueError(f"A master key has {KEY_BYTES} bytes, not {len(master)}.")
    return hkdf_expand(master, _DOMAIN + b"".join(_encode_label(label) for label in labels))


def hkdf_expand(pseudorandom_key: bytes, info: bytes) -> bytes:
    """First 32 bytes of HKDF-Expand (RFC 5869): T(1) = HMAC(PRK, info || 0x01)."""
    return hmac.new(pseudorandom_key, info + b"\x01", hashlib.sha256).digest()


def _encode_label(label: Label) -> bytes:
    if isinstance(label, bool):
        raise TypeError("A key label is a str, int or bytes, not a bool.")
    if isinstance(label, int):
        kind, value = b"i", label.to_bytes(8, "little")
    elif isinstance(label, str):
        kind, value = b"s", label.encode()
    else:
        kind, value = b"b", bytes(label)
    return kind + len(value).to_bytes(4, "little") + value


def keystream(key: bytes, nonce: int | bytes, offset_bytes: int, out: NDArray[Any]) -> None:
    """Fill ``out`` with the AES-256-CTR keystream of (key, nonce) from byte ``offset_bytes``.

    key: 32 bytes. nonce: 8 bytes, or an int encoded big-endian; the counter block is
    nonce || 64-bit big-endian block number. out: C-contiguous uint8. Random access: any split of a
    stream into calls gives the same bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"A keystream key has {KEY_BYTES} bytes, not {len(key)}.")
    prefix = nonce.to_bytes(8, "big") if isinstance(nonce, int) else nonce
    if len(prefix) != 8:
        raise ValueError(f"A keystream nonce has 8 bytes, not {len(prefix)}.")
    if out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise TypeError(f"keystream fills contiguous uint8 arrays, got {out.dtype}.")
    if offset_bytes < 0 or offset_bytes + out.size > _AES_BLOCK << 64:
        raise ValueError(f"Keystream bytes from {offset_bytes} lie outside its 2^68 bytes.")
    flat = out.reshape(-1)

    def body(lo: int, hi: int) -> None:
        _keystream_range(key, prefix, offset_bytes + lo, flat[lo:hi])

    parallel_for(body, flat.size, _PARALLEL_BYTES)


def _keystream_range(key: bytes, prefix: bytes, offset: int, out: NDArray[np.uint8]) -> None:
    if out.size == 0:
        return
    block, skip = divmod(offset, _AES_BLOCK)
    cipher = AES.new(key, AES.MODE_CTR, nonce=prefix, initial_value=block)
    if skip:
        cipher.encrypt(_ZEROS[:skip])
    zeros = memoryview(_ZEROS)
    for lo in range(0, out.size, len(_ZEROS)):
        piece = out[lo : lo + len(_ZEROS)]
        cipher.encrypt(zeros[: piece.size], output=piece.data)


def random_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Fresh secret bytes: AES-256-CTR under an OS-random key that is then dropped."""
    out = np.empty(num_bytes, np.uint8)
    keystream(os.urandom(KEY_BYTES), 0, 0, out)
    return out


def uniform_ternary(count: int) -> NDArray[np.int8]:
    """``count`` secret values, uniform in {-1, 0, 1}, by rejection from bytes (255 = 3 * 85)."""
    out = np.empty(count, np.int8)
    filled = 0
    while filled < count:
        octets = random_bytes(count - filled + 64)
        accepted = octets[octets < 255][: count - filled]
        out[filled : filled + accepted.size] = (accepted % 3).astype(np.int8) - 1
        filled += accepted.size
    return out


def centered_binomial(count: int, eta: int) -> NDArray[np.int8]:
    """``count`` secret values, centred binomial with parameter ``eta`` <= 24: variance eta / 2.

    The difference of two sums of eta bits, computed as the population count of 2 eta bits less eta:
    complementing the subtracted bits leaves them uniform.
    """
    if not 1 <= eta <= 24:
        raise ValueError(f"A centred binomial here has eta from 1 to 24, not {eta}.")
    words = -(-2 * eta // 16)
    bits = random_bytes(words * count * 2).view(np.uint16).reshape(words, count)
    bits[-1] &= np.uint16((1 << (2 * eta - 16 * (words - 1))) - 1)
    ones = np.bitwise_count(bits)
    total = ones[0].view(np.int8)
    for row in ones[1:]:
        total += row.view(np.int8)
    total -= np.int8(eta)
    return total
