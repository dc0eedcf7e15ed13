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

_ROUNDS = 10
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


@intrinsic
def _encrypt_addresses(typing_context: Any, out: Any, blocks: Any, round_keys: Any) -> Any:
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
            states = [builder.load(at(args[1], offset, vector), align=8) for offset in offsets]
            states = [builder.xor(state, key(0)) for state in states]
            for index in range(1, _ROUNDS + 1):
                function = step if index < _ROUNDS else last
                states = [builder.call(function, [state, key(index)]) for state in states]
            for state, offset in zip(states, offsets, strict=True):
                builder.store(state, at(args[0], offset, vector), align=8)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), codegen


_encrypt_group: Any = _encrypt_addresses


@kernel
def encrypt_group(blocks: Array, round_keys: Array, out: Array) -> None:
    """out = AES(blocks), sixteen blocks (16, 2) uint64 under round keys (11, 2) uint64."""
    _encrypt_group(
        np.uintp(out.ctypes.data), np.uintp(blocks.ctypes.data), np.uintp(round_keys.ctypes.data)
    )
