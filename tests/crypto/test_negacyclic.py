"""FFT products are exact integers, also for the inputs that the error bound is about."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crypto_helpers import negacyclic_matrix, signed

from otpipe.crypto import fft, negacyclic
from otpipe.crypto.params import RLWE_PARAMS
from otpipe.crypto.randomness import uniform_ternary
from otpipe.kernels import ring_gemm

DEGREE = 2048


def fft_product(values_JN: torch.Tensor, t_N: np.ndarray, bits: int) -> torch.Tensor:
    """values * t mod 2^bits, signed, through the compiled kernels."""
    tables = negacyclic.tables_for(negacyclic.spectrum(t_N))
    work = np.empty((4, DEGREE // 2))
    out = torch.empty((len(values_JN), DEGREE), dtype=torch.int64)
    for row, values in zip(out.numpy(), signed(values_JN, bits).numpy(), strict=True):
        negacyclic.times(values, -(-bits // 2), tables, work, row)
    return signed(out, bits)


def secrets() -> dict[str, np.ndarray]:
    alternating = np.ones(DEGREE, np.int8)
    alternating[1::2] = -1
    return {
        "random": uniform_ternary(DEGREE),
        "ones": np.ones(DEGREE, np.int8),
        "alternating": alternating,
        "zero": np.zeros(DEGREE, np.int8),
        "monomial": np.eye(1, DEGREE, DEGREE - 1, dtype=np.int8)[0],
    }


@pytest.mark.parametrize("bits", [16, 32, 40, 54, 56])
@pytest.mark.parametrize("name", secrets())
def test_products_are_exact(name: str, bits: int) -> None:
    t_N = secrets()[name]
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    random = torch.randint(-(2**55), 2**55, (3, DEGREE), generator=generator)
    largest = torch.full((1, DEGREE), half - 1)
    smallest = torch.full((1, DEGREE), -half)
    # The worst input of the bound: every limb at its largest magnitude, signs aligned with t.
    limb = (1 << (-(-bits // 2) - 1)) - 1
    aligned = torch.from_numpy(np.where(t_N[::-1] < 0, -1, 1).astype(np.int64)) * limb
    values = torch.cat([random, largest, smallest, aligned.view(1, -1)])
    want = signed(ring_gemm(values, negacyclic_matrix(t_N), 64), bits)
    assert torch.equal(fft_product(values, t_N, bits), want)


def test_the_bound_in_the_docstring_forgives_rounding() -> None:
    """E * |limb| * sqrt(N) * N < 1/2 for every set, with E = 25 u log2(N)."""
    for params in RLWE_PARAMS.values():
        degree = params.ring_degree
        limb_bits = -(-max(params.log2_q, params.answer_bits) // 2)
        assert limb_bits <= negacyclic.MAX_LIMB_BITS
        relative = 25 * 2.0**-53 * np.log2(degree)
        assert relative * 2.0 ** (limb_bits - 1) * degree**1.5 < 0.5
        # and the integers stay below 2^51, where adding 1.5 * 2^52 rounds correctly
        assert degree * 2.0 ** (limb_bits - 1) < 2.0**51


def test_the_order_of_the_transform_is_what_in_order_says() -> None:
    x = np.random.default_rng(1).standard_normal((2, fft.LENGTH))
    work, y = x.copy(), np.empty_like(x)
    fft.forward(*work, *y, fft.FORWARD)
    want = fft.in_order(np.fft.fft(x[0] + 1j * x[1]))
    assert np.abs(y - want).max() < 1e-12 * fft.LENGTH
    fft.inverse(*y, *work, fft.FORWARD, fft.INVERSE)
    assert np.abs(work / fft.LENGTH - x).max() < 1e-13
