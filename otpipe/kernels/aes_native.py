"""AES-NI inside compiled kernels: sixteen blocks at once, in registers.

numba has no AES, but lets a function emit LLVM's own intrinsics. Where the processor has them, four
(VAES with AVX-512) or two (VAES with AVX2) blocks share an instruction. Where it has no AES
instruction at all, ``NATIVE`` is False and callers encrypt with pycryptodome.

Blocks are rows (2,) of uint64 arrays, little-endian: the bytes of a block in order.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from otpipe.kernels.cpu import Array, kernel

GROUP = 16
"""Blocks of one call."""

_ROUNDS_128, _ROUNDS_256 = 10, 14
_config: Any = nb.config


def _blocks_per_vector() -> int:
    """How many blocks one instruction of this processor encrypts; 0 without AES instructions."""
    if _config.CPU_NAME or _config.CPU_FEATURES:
        return 0  # numba compiles for another processor than this one
    features = llvm.get_host_cpu_features()
    if not features.get("aes"):
        return 0
    if not (features.get("vaes") and _config.ENABLE_AVX):
        return 1
    return 4 if features.get("avx512f") else 2


_WIDTH = _blocks_per_vector()
NATIVE = _WIDTH > 0
"""Whether kernels of this module may be called on this processor."""


def _encryption(rounds: int) -> Any:
    """out[i] = AES(blocks[i]) for sixteen blocks; arguments are addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        one = ir.VectorType(word, 2)
        vector = ir.VectorType(word, 2 * _WIDTH)
        suffix = {1: "", 2: ".256", 4: ".512"}[_WIDTH]
        kind = ir.FunctionType(vector, [vector, vector])
        step, last = (
            builder.module.declare_intrinsic(f"llvm.x86.aesni.{name}{suffix}", (), kind)
            for name in ("aesenc", "aesenclast")
        )

        def at(address: Any, offset: int, of: Any) -> Any:
            moved = builder.add(address, ir.Constant(address.type, offset))
            return builder.inttoptr(moved, of.as_pointer())

        def key(index: int) -> Any:
            narrow = builder.load(at(args[2], 16 * index, one), align=8)
            pattern = ir.Constant(ir.VectorType(ir.IntType(32), 2 * _WIDTH), [0, 1] * _WIDTH)
            return builder.shuffle_vector(narrow, narrow, pattern)

        size = 16 * _WIDTH
        # no more states at once than there are registers for them
        batch = min(8 * size, 16 * GROUP)
        for start in range(0, 16 * GROUP, batch):
            offsets = range(start, start + batch, size)
            states = [builder.load(at(args[1], offset, vector), align=1) for offset in offsets]
            states = [builder.xor(state, key(0)) for state in states]
            for index in range(1, rounds + 1):
                function = step if index < rounds else last
                states = [builder.call(function, [state, key(index)]) for state in states]
            for state, offset in zip(states, offsets, strict=True):
                builder.store(state, at(args[0], offset, vector), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), codegen


def _typed_128(_context: Any, out: Any, blocks: Any, round_keys: Any) -> Any:
    return _encryption(_ROUNDS_128)


def _typed_256(_context: Any, out: Any, blocks: Any, round_keys: Any) -> Any:
    return _encryption(_ROUNDS_256)


_encrypt_group: Any = intrinsic(_typed_128)
_encrypt_group_256: Any = intrinsic(_typed_256)


def _typed_substitution(_context: Any, word: Any) -> Any:
    """SubWord of a 32-bit word in the low half, RotWord of that in the high half."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(64), 2)
        kind = ir.FunctionType(vector, [vector, ir.IntType(8)])
        assist = builder.module.declare_intrinsic("llvm.x86.aesni.aeskeygenassist", (), kind)
        index = ir.IntType(32)
        high = builder.shl(args[0], ir.Constant(args[0].type, 32))
        state = builder.insert_element(ir.Constant(vector, [0, 0]), high, ir.Constant(index, 1))
        result = builder.call(assist, [state, ir.Constant(ir.IntType(8), 0)])
        return builder.extract_element(result, ir.Constant(index, 1))

    return types.uint64(types.uint64), codegen


_substituted: Any = intrinsic(_typed_substitution)


@kernel
def encrypt_group(blocks: Array, round_keys: Array, out: Array) -> None:
    """out = AES(blocks), sixteen blocks (16, 2) uint64 under round keys (11, 2) uint64."""
    _encrypt_group(
        np.uintp(out.ctypes.data), np.uintp(blocks.ctypes.data), np.uintp(round_keys.ctypes.data)
    )


@kernel
def expand_key_256(key: Array, round_keys: Array) -> None:
    """Key schedule of AES-256 (FIPS 197, section 5.2): uint64 (4,) to (15, 2), little-endian."""
    low_half = np.uint64(0xFFFFFFFF)
    words = np.empty(60, np.uint64)
    for i in range(4):
        words[2 * i], words[2 * i + 1] = key[i] & low_half, key[i] >> np.uint64(32)
    for i in range(8, 60):
        word = words[i - 1]
        if i % 8 == 0:
            word = (_substituted(word) >> np.uint64(32)) ^ np.uint64(1 << (i // 8 - 1))
        elif i % 8 == 4:
            word = _substituted(word) & low_half
        words[i] = words[i - 8] ^ word
    for i in range(30):
        round_keys[i // 2, i % 2] = words[2 * i] | words[2 * i + 1] << np.uint64(32)


@kernel
def encrypt_counters_256(
    round_keys: Array, prefix: int, first: int, skipped: int, row_blocks: int, out: Array
) -> None:
    """AES-256 of counter blocks into uint8 ``out``, 16 bytes each.

    round_keys: uint64 (15, 2). A counter block is the eight bytes of ``prefix``, little-endian, and
    a big-endian number, counted from ``first``; after each ``row_blocks`` of them ``skipped`` are
    left out.
    """
    total = out.shape[0] // 16
    counters, spare = np.empty((GROUP, 2), np.uint64), np.empty((GROUP, 2), np.uint64)
    keys, source = np.uintp(round_keys.ctypes.data), np.uintp(counters.ctypes.data)
    target, spare_address = np.uintp(out.ctypes.data), np.uintp(spare.ctypes.data)
    spare_bytes = spare.view(np.uint8).reshape(16 * GROUP)
    for i in range(GROUP):
        counters[i, 0] = np.uint64(prefix)
    number, column = np.uint64(first), 0
    for done in range(0, total, GROUP):
        for i in range(GROUP):
            if column == row_blocks:
                number += np.uint64(skipped)
                column = 0
            counters[i, 1] = byte_swapped(number)
            number += np.uint64(1)
            column += 1
        if done + GROUP <= total:
            _encrypt_group_256(target + np.uintp(16 * done), source, keys)
        else:
            _encrypt_group_256(spare_address, source, keys)
            for k in range(16 * (total - done)):
                out[16 * done + k] = spare_bytes[k]


@kernel
def byte_swapped(x: Any) -> Any:
    """A uint64 with its bytes in the opposite order."""
    x = ((x & np.uint64(0xFF00FF00FF00FF)) << np.uint64(8)) | (
        (x >> np.uint64(8)) & np.uint64(0xFF00FF00FF00FF)
    )
    x = ((x & np.uint64(0xFFFF0000FFFF)) << np.uint64(16)) | (
        (x >> np.uint64(16)) & np.uint64(0xFFFF0000FFFF)
    )
    return (x << np.uint64(32)) | (x >> np.uint64(32))
