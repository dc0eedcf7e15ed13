"""Packed little-endian integers, against int.to_bytes and against the torch twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.kernels import pack_uints, unpack_uints
from otpipe.kernels.packing import pack_uints_torch, unpack_uints_torch


@given(
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
    num_bytes=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_equals_int_to_bytes(numbers: list[int], num_bytes: int) -> None:
    values = torch.tensor(numbers, dtype=torch.int64)
    packed = pack_uints(values, num_bytes)
    modulus = 1 << (8 * num_bytes)
    want = b"".join((number % modulus).to_bytes(num_bytes, "little") for number in numbers)
    assert packed.numpy().tobytes() == want
    back = unpack_uints(packed)
    assert [int(v) % modulus for v in back] == [number % modulus for number in numbers]
    assert num_bytes == 8 or bool((back >= 0).all())


@pytest.mark.parametrize("num_bytes", range(1, 9))
def test_compiled_kernels_equal_their_twins(num_bytes: int) -> None:
    values = torch.randint(-(2**63), 2**63 - 1, (3, 41, 1000))
    packed = pack_uints(values, num_bytes)
    assert packed.shape == (3, 41, 1000, num_bytes)
    assert torch.equal(packed, pack_uints_torch(values, num_bytes))
    assert torch.equal(unpack_uints(packed), unpack_uints_torch(packed))
    view = packed[:, ::2]
    assert torch.equal(unpack_uints(view), unpack_uints_torch(view))


def test_unaligned_bytes_are_read() -> None:
    values = torch.arange(64) * 12345678901
    frame = torch.cat([torch.zeros(3, dtype=torch.uint8), pack_uints(values, 5).view(-1)])
    assert torch.equal(unpack_uints(frame[3:].view(64, 5)), values & ((1 << 40) - 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_bytes", range(1, 9))
def test_cuda_equals_cpu(num_bytes: int) -> None:
    values = torch.randint(-(2**63), 2**63 - 1, (5, 33))
    packed = pack_uints(values.cuda(), num_bytes)
    assert torch.equal(packed.cpu(), pack_uints(values, num_bytes))
    assert torch.equal(unpack_uints(packed).cpu(), unpack_uints(packed.cpu()))


@pytest.mark.parametrize("num_bytes", [0, 9])
def test_impossible_widths_are_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bytes"):
        pack_uints(torch.zeros(2, dtype=torch.int64), num_bytes)
    with pytest.raises(ValueError, match="1 to 8 bytes"):
        unpack_uints(torch.zeros((2, num_bytes), dtype=torch.uint8))


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        pack_uints(torch.zeros(2, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match="uint8"):
        unpack_uints(torch.zeros((2, 4), dtype=torch.int8))
