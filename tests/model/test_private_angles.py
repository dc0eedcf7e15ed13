"""Rotary angles: right, and the same bits whatever library computes cosines."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from otpipe.model.clear_ops import RopeTables, inverse_frequencies
from otpipe.model.private_angles import cos_sin, rotary_rows
from otpipe.model.spec import RopeSpec


@pytest.mark.parametrize("largest", [0.5, 7.0, 8192.0, 2.0**25])
def test_cosines_and_sines(largest: float) -> None:
    angles = np.linspace(0, largest, 100_001)
    cos, sin = cos_sin(angles)
    assert np.abs(cos - np.cos(angles)).max() < 1e-15
    assert np.abs(sin - np.sin(angles)).max() < 1e-15


def test_rows_are_those_of_the_float_tables() -> None:
    rope = RopeSpec(1e6, "llama3", 32.0, 1.0, 4.0, 8192)
    frequencies = inverse_frequencies(rope, 128).tolist()
    want = RopeTables(rope, 128).rows(4000, 4100)
    got = rotary_rows(frequencies, 4000, 100)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == torch.float64
        assert float((mine - theirs).abs().max()) < 1e-6


def test_the_bits_are_fixed() -> None:
    """A machine with another digest would not understand its peer."""
    frequencies = (np.arange(1, 65, dtype=np.float64) / 64).tolist()
    cos, sin = rotary_rows(frequencies, 0, 512)
    digest = hashlib.sha256(cos.numpy().tobytes() + sin.numpy().tobytes()).hexdigest()
    assert digest == "37eef4a83b222e11afb63127d40b2f1325c661e34471fee96bb46d18ce2b31bf"
