"""Parameter sets: inside the published table, or refused with a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from otpipe.crypto.params import (
    RLWE_PARAMS,
    STANDARD_MAX_LOG2_Q,
    RlweParams,
    params_for_ring,
)
from otpipe.errors import ParameterError

RING32 = RLWE_PARAMS["ring32"]


def test_the_table_is_the_standards() -> None:
    assert STANDARD_MAX_LOG2_Q == {
        1024: 27,
        2048: 54,
        4096: 109,
        8192: 218,
        16384: 438,
        32768: 881,
    }


@pytest.mark.parametrize("params", RLWE_PARAMS.values(), ids=lambda params: params.name)
def test_sets_in_use_are_inside_the_table(params: RlweParams) -> None:
    assert params.log2_q <= STANDARD_MAX_LOG2_Q[params.ring_degree]
    assert params.security_bits == 128
    assert params.error_std >= 3.19
    assert params_for_ring(params.log2_p) is params


def test_sets_in_use_are_pinned() -> None:
    ring32, ring8 = RLWE_PARAMS["ring32"], RLWE_PARAMS["ring8"]
    assert (ring32.ring_degree, ring32.log2_q, ring32.log2_p, ring32.answer_bits) == (
        2048,
        53,
        32,
        40,
    )
    assert (ring8.ring_degree, ring8.log2_q, ring8.log2_p, ring8.answer_bits) == (2048, 32, 8, 16)
    assert (ring32.num_planes, ring32.answer_bytes, ring8.num_planes, ring8.answer_bytes) == (
        7,
        5,
        4,
        2,
    )
    assert (ring32.upload_bytes, ring8.upload_bytes) == ((6, 7), (4,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log2_q": 55}, "55-bit modulus; degree 2048 is 128-bit secure up to 54 bits"),
        ({"ring_degree": 1024}, "degree 1024 is 128-bit secure up to 27 bits"),
        ({"ring_degree": 512}, "ring degree 512; use one of"),
        ({"ring_degree": 3000}, "ring degree 3000; use one of"),
        ({"secret": "sparse"}, "covers 128 bits with 'ternary'"),
        ({"security_bits": 192}, "claims 192 bits"),
        ({"error_eta": 20}, "error width 3.16"),
        ({"answer_bits": 56}, "must increase"),
        ({"answer_bits": 44}, "whole bytes"),
        ({"log2_p": 16}, "8 or 32 bits"),
        ({"upload_bytes": (6,)}, "the last one 7 bytes"),
        ({"ring_degree": 4096, "log2_q": 60}, "up to 56"),
    ],
)
def test_sets_outside_the_table_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        dataclasses.replace(RING32, **change)


def test_sets_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RING32.log2_q = 55  # type: ignore[misc]


def test_unknown_rings_slots_and_widths_are_refused() -> None:
    with pytest.raises(ParameterError, match="16-bit messages"):
        params_for_ring(16)
    for num_slots in (0, 3, 4096):
        with pytest.raises(ParameterError, match=f"batch of {num_slots} slots"):
            RING32.pack_factor(num_slots)
    with pytest.raises(ParameterError, match="5 upload bytes"):
        RING32.dropped_upload_bits(5)
    assert RING32.pack_factor(256) == 8
    assert (RING32.dropped_upload_bits(6), RING32.dropped_upload_bits(7)) == (5, 0)
