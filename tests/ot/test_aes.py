"""AES in all its forms against the standard's vectors and pycryptodome."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES

from otpipe.kernels import aes_native
from otpipe.kernels.aes_planes import encrypt_planes, expand_keys, key_planes, sub_bytes, to_planes

FIPS_KEY = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
FIPS_PLAIN = bytes.fromhex("00112233445566778899aabbccddeeff")
FIPS_CIPHER = bytes.fromhex("69c4e0d86a7b0430d8cdb78070b4c55a")


def inverse(byte: int) -> int:
    """In GF(2^8) with the polynomial of AES; 0 for 0."""

    def product(a: int, b: int) -> int:
        total = 0
        for i in range(8):
            if b >> i & 1:
                total ^= a << i
        for i in reversed(range(8, 16)):
            if total >> i & 1:
                total ^= 0x11B << (i - 8)
        return total

    power = 1
    for _ in range(254):
        power = product(power, byte)
    return power


def test_the_circuit_is_the_s_box_of_its_definition() -> None:
    octets = np.arange(256, dtype=np.int32)
    planes = sub_bytes(*((octets >> bit) & 1 for bit in range(8)))
    got = sum((plane & 1) << bit for bit, plane in enumerate(planes))
    for byte in range(256):
        x = inverse(byte)
        affine = x
        for turn in range(1, 5):
            affine ^= ((x << turn) | (x >> (8 - turn))) & 0xFF
        assert got[byte] == affine ^ 0x63


def test_key_schedule_of_fips_197() -> None:
    """Appendix A.1."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    (round_keys,) = expand_keys(np.frombuffer(key, np.uint8)[None])
    assert round_keys[0].tobytes() == key
    assert round_keys[1].tobytes().hex() == "a0fafe1788542cb123a339392a6c7605"
    assert round_keys[10].tobytes().hex() == "d014f9a8c9ee2589e13f0cc8b6630ca6"
    with pytest.raises(ValueError, match=r"AES-128 keys are uint8 \(K, 16\)"):
        expand_keys(np.zeros((1, 32), np.uint8))


def plane_encrypt(key: bytes, plain: bytes, use_torch: bool) -> bytes:
    words = np.frombuffer(plain, np.int32).reshape(-1, 2, 4)
    state = [words[:, i % 2, i // 2] for i in range(8)]
    planes = key_planes(expand_keys(np.frombuffer(key, np.uint8)[None]))[0]
    if use_torch:
        tensors = tuple(torch.from_numpy(word.copy()) for word in state)
        out = to_planes(*encrypt_planes(to_planes(*tensors), torch.from_numpy(planes)))
        state = [word.numpy() for word in out]
    else:
        state = list(to_planes(*encrypt_planes(to_planes(*state), planes)))
    return np.stack(state, -1).reshape(-1, 4, 2).transpose(0, 2, 1).tobytes()


@pytest.mark.parametrize("use_torch", [False, True], ids=["numpy", "torch"])
def test_planes_encrypt_as_the_standard_and_as_pycryptodome(use_torch: bool) -> None:
    """Appendix C.1; the two blocks of a lane do not touch each other."""
    assert plane_encrypt(FIPS_KEY, FIPS_PLAIN + bytes(16), use_torch)[:16] == FIPS_CIPHER
    assert plane_encrypt(FIPS_KEY, bytes(16) + FIPS_PLAIN, use_torch)[16:] == FIPS_CIPHER
    key, plain = os.urandom(16), os.urandom(16 * 64)
    assert plane_encrypt(key, plain, use_torch) == AES.new(key, AES.MODE_ECB).encrypt(plain)


def test_planes_are_their_own_inverse() -> None:
    words = np.frombuffer(os.urandom(4 * 8 * 10), np.int32).reshape(8, 10)
    assert np.array_equal(np.stack(to_planes(*to_planes(*words))), words)


_ONE_WIDTH = """
import os
import numpy as np
from Crypto.Cipher import AES
from otpipe.kernels import aes_native
from otpipe.kernels.aes_planes import expand_keys
assert aes_native._WIDTH >= {width}
aes_native._WIDTH = {width}
key, plain = os.urandom(16), os.urandom(256)
round_keys = expand_keys(np.frombuffer(key, np.uint8)[None]).view(np.uint64)[0]
out = np.empty((16, 2), np.uint64)
blocks = np.frombuffer(plain, np.uint64).reshape(16, 2).copy()
aes_native.encrypt_group(blocks, round_keys, out)
assert out.tobytes() == AES.new(key, AES.MODE_ECB).encrypt(plain)
"""


@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_width_that_this_processor_has(width: int, tmp_path: Path) -> None:
    """Blocks of one instruction: 128, 256 and 512 bits."""
    if width > aes_native._WIDTH:
        pytest.skip(f"this processor encrypts {aes_native._WIDTH} blocks at once")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    code = _ONE_WIDTH.format(width=width)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.skipif(not aes_native.NATIVE, reason="no AES instructions")
def test_native_encrypts_as_the_standard_and_as_pycryptodome() -> None:
    for key, plain in [(FIPS_KEY, FIPS_PLAIN * 16), (os.urandom(16), os.urandom(256))]:
        round_keys = expand_keys(np.frombuffer(key, np.uint8)[None]).view(np.uint64)[0]
        blocks = np.frombuffer(plain, np.uint64).reshape(16, 2).copy()
        out = np.empty_like(blocks)
        aes_native.encrypt_group(blocks, round_keys, out)
        assert out.tobytes() == AES.new(key, AES.MODE_ECB).encrypt(plain)
        if plain.startswith(FIPS_PLAIN):
            assert out[0].tobytes() == FIPS_CIPHER
