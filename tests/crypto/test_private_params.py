"""The set for private weights, packings, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from private_helpers import INSECURE, PRIVATE44

from otpipe.crypto.params import STANDARD_MAX_LOG2_Q
from otpipe.crypto.private_params import PRIVATE_PARAMS, PrivatePacking, choose_packing
from otpipe.errors import ParameterError


def test_the_set_in_use_is_pinned_and_inside_the_table() -> None:
    assert list(PRIVATE_PARAMS) == ["private44"]
    assert (PRIVATE44.ring_degree, PRIVATE44.log2_q, PRIVATE44.log2_p) == (8192, 128, 44)
    assert (PRIVATE44.first_bits, PRIVATE44.second_bits, PRIVATE44.flood_shift) == (56, 48, 18)
    assert PRIVATE44.log2_q <= STANDARD_MAX_LOG2_Q[PRIVATE44.ring_degree]
    assert (PRIVATE44.num_planes, PRIVATE44.upload_bytes, PRIVATE44.delta_shift) == (16, 16, 84)
    assert PRIVATE44.error_std >= 3.19 and PRIVATE44.security_bits == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring_degree": 4096}, "128-bit modulus; degree 4096 is 128-bit secure up to 109 bits"),
        ({"ring_degree": 64}, "ring degree 64; use one of"),
        ({"secret": "sparse"}, "covers 128 bits with 'ternary'"),
        ({"error_eta": 20}, "error width 3.16"),
        ({"log2_q": 120}, "120-bit modulus; use 128"),
        ({"log2_p": 48}, "48-bit messages and answers of 56 and 48 bits"),
        ({"first_bits": 72}, "answers of 72 and 48 bits; .* up to 64 and 56"),
        ({"first_bits": 64, "second_bits": 64}, "answers of 64 and 64 bits; .* up to 64 and 56"),
        ({"first_bits": 48, "second_bits": 56}, "answers of 48 and 56 bits"),
        ({"second_bits": 50}, "whole bytes"),
        ({"flood_shift": 72}, "floods from bit 72; use 1 to 71"),
        ({"flood_shift": 0}, "floods from bit 0"),
        ({"flood_shift": 19}, "floods 83 bits, which leaves no room below a 44-bit message"),
        ({"log2_p": 45}, "floods 82 bits, which leaves no room below a 45-bit message"),
    ],
)
def test_other_sets_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        dataclasses.replace(PRIVATE44, **change)


def test_the_small_set_is_for_tests_only() -> None:
    assert INSECURE.name not in PRIVATE_PARAMS and INSECURE not in PRIVATE_PARAMS.values()
    with pytest.raises(ParameterError, match="ring degree 64"):
        dataclasses.replace(PRIVATE44, ring_degree=INSECURE.ring_degree)


class TestPacking:
    def test_sizes(self) -> None:
        packing = PrivatePacking(PRIVATE44, 256, 4)
        assert (packing.stride, packing.outputs) == (1024, 8)
        assert packing.answer_bytes == 8192 * 7 + 8 * 256 * 6
        assert (packing.num_polynomials(9), packing.num_answers(9)) == (1 + 3, 2)
        assert packing.upload_total(9) == 4 * 8192 * 16
        assert packing.download_total(9) == 2 * packing.answer_bytes

    def test_a_full_batch_has_one_of_each(self) -> None:
        packing = choose_packing(PRIVATE44, 896, 1152, 8192)
        assert (packing.inputs, packing.outputs) == (1, 1)
        assert packing.answer_bytes == 8192 * 13

    @pytest.mark.parametrize("num_slots", [8, 64, 256, 2048])
    @pytest.mark.parametrize(("n", "m"), [(896, 1152), (4864, 896), (152064, 1792), (1, 1)])
    def test_the_choice_moves_the_fewest_bytes(self, num_slots: int, n: int, m: int) -> None:
        chosen = choose_packing(PRIVATE44, n, m, num_slots)
        inputs, totals = 1, []
        while inputs * num_slots <= 8192:
            packing = PrivatePacking(PRIVATE44, num_slots, inputs)
            totals.append(packing.upload_total(n) + packing.download_total(m))
            inputs *= 2
        assert chosen.upload_total(n) + chosen.download_total(m) == min(totals)

    @pytest.mark.parametrize("num_slots", [0, 4, 100, 16384])
    def test_slots_that_do_not_fit(self, num_slots: int) -> None:
        with pytest.raises(ParameterError, match="use a power of two from 8 to 8192"):
            choose_packing(PRIVATE44, 10, 10, num_slots)

    @pytest.mark.parametrize("inputs", [0, 3, 64])
    def test_inputs_that_do_not_fit(self, inputs: int) -> None:
        with pytest.raises(ParameterError, match=f"{inputs} inputs a polynomial do not fit 256"):
            PrivatePacking(PRIVATE44, 256, inputs)
