"""FFT products of 128-bit coefficients are exact, also for the inputs the error bound is about."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from crypto_helpers import negacyclic_matrix
from numpy.typing import NDArray
from private_helpers import integers, times
from torch import Tensor

from otpipe.crypto import negacyclic, negacyclic_wide
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivateParams
from otpipe.crypto.randomness import uniform_ternary
from otpipe.kernels import wide
from otpipe.kernels.ring_gemm import int8_matmul


def compiled_product(x_JN: Tensor, t_N: NDArray[np.int8], bits: int) -> Tensor:
    """x * t mod 2^128 through the compiled kernels, x signed mod 2^bits: (2, J, N)."""
    count, degree = x_JN.shape[1:]
    num_limbs, limb_bits = negacyclic_wide.limbs(bits, degree)
    real, imag = negacyclic.twist(degree)
    folded, parts = negacyclic_wide.buffer(count, num_limbs, degree)
    if bits == 128:
        words = x_JN.movedim(0, -1).contiguous().numpy().view(np.uint64)
        negacyclic_wide.fold_all(words, limb_bits, real, imag, parts)
    else:
        octets = x_JN[0].contiguous().view(torch.uint8).view(count, degree, 8)
        packed = octets[..., : bits // 8].contiguous().view(count, -1).numpy().view(np.uint64)
        negacyclic_wide.fold_packed(packed, bits // 8, limb_bits, real, imag, parts)
    negacyclic.multiply(folded, negacyclic.spectrum(t_N))
    out = np.empty((2, count, degree), np.uint64)
    for j in range(count):
        negacyclic_wide.unfold(parts[j], limb_bits, real, imag, out[0, j], out[1, j])
    return torch.from_numpy(out.view(np.int64))


def torch_product(x_JN: Tensor, t_N: NDArray[np.int8]) -> Tensor:
    limbs = negacyclic_wide.limbs(128, x_JN.shape[-1])
    spectra = negacyclic_wide.limb_spectra_torch(x_JN, *limbs)
    by_M = negacyclic_wide.spectrum_torch(torch.from_numpy(t_N))
    return negacyclic_wide.product_torch(spectra, by_M, limbs[1])


def toeplitz_matrix(t_N: NDArray[np.int8]) -> Tensor:
    """int8 (N, N) whose row k has t[k - j] at j, negated where that wraps around."""
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([-t_N, t_N])[1:], t_N.size)
    return torch.from_numpy(np.ascontiguousarray(windows[:, ::-1]))


def toeplitz_product(x_JN: Tensor, matrix: Tensor) -> Tensor:
    """x * t by an int8 ring GEMM with the Toeplitz matrix of t: no transform."""
    digits = wide.to_digits(x_JN)  # (16, J, N)
    products = int8_matmul(digits.view(-1, len(matrix)), matrix.t())
    total = torch.zeros_like(x_JN)
    for i, part in enumerate(products.view(16, *x_JN.shape[1:])):
        wide.add_(total, wide.shifted_left(wide.from_signed(part.long()), 8 * i))
    return total


def secrets(degree: int) -> dict[str, NDArray[np.int8]]:
    alternating = np.ones(degree, np.int8)
    alternating[1::2] = -1
    return {
        "random": uniform_ternary(degree),
        "ones": np.ones(degree, np.int8),
        "alternating": alternating,
        "monomial": np.eye(1, degree, degree - 1, dtype=np.int8)[0],
    }


def signed_values(t_N: NDArray[np.int8], bits: int) -> Tensor:
    """Random, extreme and worst-case inputs mod 2^bits, sign-extended: (2, J, N)."""
    degree = t_N.size
    num_limbs, limb_bits = negacyclic_wide.limbs(bits, degree)
    generator = torch.Generator().manual_seed(bits)
    random = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 3, degree), generator=generator)
    random[:, 1] = torch.tensor([0, -(1 << 63)])[:, None]
    random[:, 2] = torch.tensor([-1, (1 << 63) - 1])[:, None]
    # The worst input of the bound: every limb at its largest magnitude, signs aligned with t.
    limb = (1 << (limb_bits - 1)) - 1
    aligned = np.where(t_N[::-1] < 0, -1, 1).astype(np.int64) * limb
    worst = torch.zeros((2, 1, degree), dtype=torch.int64)
    for i in range(num_limbs):
        part = wide.from_signed(torch.from_numpy(aligned)[None])
        wide.add_(worst, wide.shifted_left(part, i * limb_bits))
    values = torch.cat([random, worst], 1)
    if bits < 128:
        values = wide.from_signed((values[0] << (64 - bits)) >> (64 - bits))
    return values


@pytest.mark.parametrize("name", ["random", "ones", "alternating", "monomial"])
def test_products_are_exact_at_full_size(name: str) -> None:
    t_N = secrets(8192)[name]
    matrix = toeplitz_matrix(t_N)
    for bits in (56, 128):
        x_JN = signed_values(t_N, bits)
        want = toeplitz_product(x_JN, matrix)
        assert torch.equal(compiled_product(x_JN, t_N, bits), want)
        assert torch.equal(torch_product(x_JN, t_N), want)


def test_products_equal_python_integers() -> None:
    for t_N in secrets(64).values():
        x_JN = signed_values(t_N, 128)
        want = [times(x, t_N.tolist()) for x in integers(x_JN)]
        assert integers(compiled_product(x_JN, t_N, 128)) == want
        assert integers(torch_product(x_JN, t_N)) == want
        assert torch.equal(toeplitz_matrix(t_N), negacyclic_matrix(t_N))
        assert integers(toeplitz_product(x_JN, toeplitz_matrix(t_N))) == want


@pytest.mark.parametrize("params", PRIVATE_PARAMS.values(), ids=lambda params: params.name)
def test_the_bound_in_the_docstring_forgives_rounding(params: PrivateParams) -> None:
    """E * 2^(l-1) * sqrt(N) * N < 1/2 with a factor to spare, E = 25 u log2(N)."""
    degree = params.ring_degree
    for bits in (params.log2_q, params.first_bits):
        number, width = negacyclic_wide.limbs(bits, degree)
        relative = 25 * 2.0**-53 * math.log2(degree)
        assert relative * 2.0 ** (width - 1) * degree**1.5 < 0.06
        assert number * width > bits
        # and the integers stay below 2^51, where adding 1.5 * 2^52 rounds correctly
        assert degree * 2.0 ** (width - 1) < 2.0**51
    assert negacyclic_wide.limbs(128, 8192) == (6, 22)
    assert negacyclic_wide.limbs(56, 8192) == (3, 19)


def test_degrees_without_an_exact_product_are_refused() -> None:
    with pytest.raises(ValueError, match="would need limbs of"):
        negacyclic_wide.limbs(128, 1 << 20)


@pytest.mark.gpu
def test_products_are_exact_on_cuda() -> None:
    t_N = secrets(8192)["alternating"]
    x_JN = signed_values(t_N, 128)
    limbs = negacyclic_wide.limbs(128, 8192)
    spectra = negacyclic_wide.limb_spectra_torch(x_JN.cuda(), *limbs)
    by_M = negacyclic_wide.spectrum_torch(torch.from_numpy(t_N).cuda())
    got = negacyclic_wide.product_torch(spectra, by_M, limbs[1])
    assert torch.equal(got.cpu(), toeplitz_product(x_JN, toeplitz_matrix(t_N)))
