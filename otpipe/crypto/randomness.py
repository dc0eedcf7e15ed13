"""Key derivation, the AES-256-CTR keystream, and samplers of secrets.

Secrets come from the operating system: a sampler draws a fresh 256-bit key from ``os.urandom`` and
expands it with AES-256-CTR.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from numba.extending import intrinsic
from numpy.typing import NDArray

from otpipe.kernels import aes_native
from otpipe.kernels.cpu import Array, kernel, parallel_for

KEY_BYTES = 32
_DOMAIN = b"otpipe key v1"
_AES_BLOCK = 16
_CHUNK_BLOCKS = 8192  # 128 KiB of counters and as much output stay in the second-level cache
_PARALLEL_BYTES = 1 << 18


class _Scratch(threading.local):
    """Counter blocks of one thread."""

    def __init__(self) -> None:
        self.counters = np.empty((_CHUNK_BLOCKS, 2), np.uint64)
        self.octets = memoryview(self.counters).cast("B")  # type: ignore[arg-type]


_scratch = _Scratch()

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


class Keystream:
    """The AES-256-CTR keystream of one key and nonce, with random access. Thread-safe.

    CTR is the block cipher applied to nonce || block number (NIST SP 800-38A, section 6.5). With
    the processor's AES instructions, blocks are made and encrypted in registers; without them, they
    are made here and encrypted by pycryptodome.

    key: 32 bytes. nonce: 8 bytes, or an int encoded big-endian; the counter block is
    nonce || 64-bit big-endian block number.

    Attributes, for ``aes_native.encrypt_counters_256``:
        round_keys: uint64 (15, 2); only with AES instructions.
        prefix: the nonce as a signed little-endian integer.
    """

    __slots__ = ("_cipher", "prefix", "round_keys")

    def __init__(self, key: bytes, nonce: int | bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"A keystream key has {KEY_BYTES} bytes, not {len(key)}.")
        prefix = nonce.to_bytes(8, "big") if isinstance(nonce, int) else nonce
        if len(prefix) != 8:
            raise ValueError(f"A keystream nonce has 8 bytes, not {len(prefix)}.")
        if aes_native.NATIVE:
            self.round_keys = np.empty((15, 2), np.uint64)
            aes_native.expand_key_256(np.frombuffer(key, "<u8"), self.round_keys)
        else:
            self._cipher = AES.new(key, AES.MODE_ECB)
        self.prefix = int.from_bytes(prefix, "little", signed=True)

    def fill(self, offset_bytes: int, out: NDArray[Any]) -> None:
        """Fill ``out``, C-contiguous uint8, with the stream from byte ``offset_bytes``.

        Random access: any split of a stream into calls gives the same bytes. Long ones are made on
        several cores.
        """
        if out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise TypeError(f"keystream fills contiguous uint8 arrays, got {out.dtype}.")
        _check_range(offset_bytes, out.size)
        flat = out.reshape(-1)
        if flat.size <= _PARALLEL_BYTES:
            self._fill(offset_bytes, flat)
            return

        def body(lo: int, hi: int) -> None:
            self._fill(offset_bytes + lo, flat[lo:hi])

        parallel_for(body, flat.size, _PARALLEL_BYTES)

    def _fill(self, offset: int, out: NDArray[np.uint8]) -> None:
        if (offset | out.size) % _AES_BLOCK == 0:
            self._encrypt(offset // _AES_BLOCK, 0, out.size // _AES_BLOCK, out)
            return
        head = min(-offset % _AES_BLOCK, out.size)
        tail = (out.size - head) % _AES_BLOCK
        block = (offset + head) // _AES_BLOCK
        if head:
            skip = offset % _AES_BLOCK
            out[:head] = self._block(offset // _AES_BLOCK)[skip : skip + head]
        whole = out[head : out.size - tail]
        self._encrypt(block, 0, whole.size // _AES_BLOCK, whole)
        if tail:
            out[out.size - tail :] = self._block(block + whole.size // _AES_BLOCK)[:tail]

    def rows(self, offset_bytes: int, stride: int, out_RB: NDArray[np.uint8]) -> None:
        """Row i of ``out``, C-contiguous (R, B), is the stream from offset_bytes + i * stride.

        All three lengths are multiples of 16.
        """
        num_rows, row_bytes = out_RB.shape
        if offset_bytes % _AES_BLOCK or stride % _AES_BLOCK or row_bytes % _AES_BLOCK:
            raise ValueError(f"Rows of {row_bytes} bytes, {stride} apart: use multiples of 16.")
        _check_range(offset_bytes, (num_rows - 1) * stride + row_bytes)
        first, skipped = offset_bytes // _AES_BLOCK, (stride - row_bytes) // _AES_BLOCK
        self._encrypt(first, skipped, row_bytes // _AES_BLOCK, out_RB.reshape(-1))

    def _block(self, number: int) -> NDArray[np.uint8]:
        out = np.empty(_AES_BLOCK, np.uint8)
        self._encrypt(number, 0, 1, out)
        return out

    def _encrypt(self, first: int, skipped: int, row_blocks: int, out: NDArray[np.uint8]) -> None:
        """Whole blocks, leaving out ``skipped`` block numbers after each ``row_blocks``."""
        total = out.size // _AES_BLOCK
        if total == 0:
            return  # ``first`` may be 2^64, where the stream ends
        number = first - (first >> 63 << 64)  # as a signed integer, which compiled code takes
        if aes_native.NATIVE:
            aes_native.encrypt_counters_256(
                self.round_keys, self.prefix, number, skipped, row_blocks, out
            )
            return
        counters, octets = _scratch.counters, _scratch.octets
        for done in range(0, total, _CHUNK_BLOCKS):
            count = min(_CHUNK_BLOCKS, total - done)
            _count(self.prefix, number, skipped, row_blocks, done, counters[:count])
            piece = out[done * _AES_BLOCK : (done + count) * _AES_BLOCK]
            self._cipher.encrypt(octets[: count * _AES_BLOCK], output=piece.data)

    def __repr__(self) -> str:
        return "Keystream(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("A keystream holds a key and is never pickled.")


def _check_range(offset_bytes: int, num_bytes: int) -> None:
    if offset_bytes < 0 or offset_bytes + num_bytes > _AES_BLOCK << 64:
        raise ValueError(f"Keystream bytes from {offset_bytes} lie outside its 2^68 bytes.")


@kernel
def _count(
    prefix: int,
    first: int,
    skipped: int,
    row_blocks: int,
    done: int,
    counters: Array,
) -> None:
    """Counter blocks ``done`` .. of rows of ``row_blocks`` numbers: uint64 pairs, big-endian."""
    row, column = done // row_blocks, done % row_blocks
    at = 0
    while at < counters.shape[0]:
        stop = min(counters.shape[0], at + row_blocks - column)
        number = np.uint64(first) + np.uint64(row * (row_blocks + skipped) + column)
        for i in range(at, stop):
            counters[i, 0] = np.uint64(prefix)
            counters[i, 1] = aes_native.byte_swapped(number + np.uint64(i - at))
        at, row, column = stop, row + 1, 0


def keystream(key: bytes, nonce: int | bytes, offset_bytes: int, out: NDArray[Any]) -> None:
    """``Keystream.fill``, for a key that is used once."""
    Keystream(key, nonce).fill(offset_bytes, out)


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
        filled += _accept_ternary(random_bytes(count - filled + 64), out[filled:])
    return out


@kernel
def _accept_ternary(octets: Array, out: Array) -> int:
    """Fill ``out`` from the bytes below 255, mod 3, less 1; returns how many there were."""
    filled = 0
    for k in range(octets.shape[0]):
        if octets[k] < np.uint8(255) and filled < out.shape[0]:
            out[filled] = np.int8(octets[k] % np.uint8(3)) - np.int8(1)
            filled += 1
    return filled


def centered_binomial(count: int, eta: int) -> NDArray[np.int8]:
    """``count`` secret values, centred binomial with parameter ``eta`` <= 24: variance eta / 2.

    The difference of two sums of eta bits, computed as the population count of 2 eta bits less eta:
    complementing the subtracted bits leaves them uniform.
    """
    if not 1 <= eta <= 24:
        raise ValueError(f"A centred binomial here has eta from 1 to 24, not {eta}.")
    words = -(-2 * eta // 16)
    bits = random_bytes(words * count * 2).view(np.uint16).reshape(words, count)
    out = np.empty(count, np.int8)
    _popcount(bits, (1 << (2 * eta - 16 * (words - 1))) - 1, eta, out)
    return out


def _emit_ones(_context: Any, x: Any) -> Any:
    return x(x), lambda _, builder, __, args: builder.ctpop(args[0])


#: number of ones of an integer: LLVM's ctpop, which it also knows for vectors
_ones: Any = intrinsic(_emit_ones)


@kernel
def _popcount(bits: Array, last_mask: int, eta: int, out: Array) -> None:
    """out = number of ones in each column of uint16 ``bits``, the last row masked, less eta."""
    last, mask = bits[bits.shape[0] - 1], np.uint16(last_mask)
    for k in range(out.shape[0]):
        out[k] = np.int8(_ones(np.uint16(last[k] & mask))) - np.int8(eta)
    for word in range(bits.shape[0] - 1):
        row = bits[word]
        for k in range(out.shape[0]):
            out[k] += np.int8(_ones(row[k]))
