"""Exact integer linear algebra: the one primitive (``ring_gemm``) that everything rests on."""

from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.kernels.ring_gemm import combine_planes, digit_planes, int8_matmul, ring_gemm

__all__ = [
    "combine_planes",
    "digit_planes",
    "int8_matmul",
    "pack_uints",
    "ring_gemm",
    "unpack_uints",
]
