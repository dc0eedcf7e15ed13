"""Sampling against the logits warpers of transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otpipe.client.sampling import Sampler, SamplingParams
from otpipe.errors import OtpipeError, UsageError


def distribution(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """Probability of each token (V,), from the weights that ``choose`` draws by."""
    tokens, weights = sampler._candidates(logits, int(logits.argmax()))
    probabilities = np.zeros(logits.size)
    probabilities[slice(None) if tokens is None else tokens] = weights / weights.sum()
    return probabilities


def transformers_distribution(params: SamplingParams, logits: np.ndarray) -> np.ndarray:
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("vocab", [1, 7, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 3000, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.35, 1e-9])
def test_same_distribution_as_transformers(
    vocab: int, temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
    # All different, so that the cuts of both are determined.
    rng = np.random.default_rng(vocab)
    logits = (rng.permutation(vocab) * (12 / vocab) + rng.random(vocab) * 1e-3).astype(np.float32)
    ours = distribution(Sampler(params), logits)
    theirs = transformers_distribution(params, logits)
    assert ours == pytest.approx(theirs, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.integers(-20, 20), min_size=1, max_size=40),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 45),
)
def test_ties_at_the_top_k_cut_all_stay_as_in_transformers(
    logits: list[int], temperature: float, top_k: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    array = np.array(logits, dtype=np.float32)
    ours = distribution(Sampler(params), array)
    assert ours == pytest.approx(transformers_distribution(params, array), abs=1e-12)


@pytest.mark.parametrize("top_p", [0.02, 0.04, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.5, 8])
def test_nucleus_of_any_size_in_a_large_vocabulary(top_p: float, spread: float) -> None:
    logits = np.random.default_rng(0).permutation(20_000) * np.float32(spread / 20_000)
    params = SamplingParams(temperature=1, top_p=top_p)
    ours = distribution(Sampler(params), logits.astype(np.float32))
    theirs = transformers_distribution(params, logits.astype(np.float32))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_draws_follow_the_distribution() -> None:
    logits = np.array([0.5, 2.0, -1.0, 1.0, 0.0, -30.0], dtype=np.float32)
    for params in (
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.5, top_k=3, seed=2),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3),
    ):
        sampler = Sampler(params)
        draws = 20_000
        counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=logits.size)
        expected = transformers_distribution(params, logits)
        deviation = np.sqrt(expected * (1 - expected) / draws)
        assert np.all(np.abs(counts / draws - expected) <= 5 * deviation + 1e-9)
        assert np.all(counts[expected == 0] == 0)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([1, 3, 3, 2], dtype=np.float32)
    assert Sampler(SamplingParams()).choose(logits) == 1
    assert Sampler(SamplingParams(temperature=0, top_k=2, top_p=0.1)).choose(logits) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = np.array([-3e38, 5, 3e38, 0], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.9))
    assert {sampler.choose(logits) for _ in range(20)} == {2}


def test_a_huge_temperature_is_uniform() -> None:
    logits = np.array([-3e4, 5, 3e4, 0], dtype=np.float32)
    probabilities = distribution(Sampler(SamplingParams(temperature=1e300)), logits)
    assert probabilities == pytest.approx(np.full(4, 0.25))


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_choose_leaves_the_logits_alone_and_returns_int() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    before = logits.copy()
    logits.flags.writeable = False
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_k=9, top_p=0.5)):
        assert type(Sampler(params).choose(logits)) is int
    assert np.array_equal(before, logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros(10, dtype=np.float32)
    logits[[4, 6]] = bad
    with pytest.raises(OtpipeError, match=r"2 of 10 logits .* first is token 4"):
        Sampler(SamplingParams(temperature=temperature)).choose(logits)


def test_logits_of_several_rows_are_our_bug() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3\)"):
        Sampler(SamplingParams()).choose(np.zeros((2, 3), dtype=np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; use 0"),
        ({"temperature": math.nan}, "temperature is nan; use 0"),
        ({"temperature": math.inf}, "temperature is inf; use 0"),
        ({"temperature": "1"}, "temperature is '1'; use 0"),
        ({"top_p": 0}, "top_p is 0; use a number above 0"),
        ({"top_p": 1.01}, "top_p is 1.01; use a number above 0"),
        ({"top_p": math.nan}, "top_p is nan; use a number above 0"),
        ({"top_k": -1}, "top_k is -1; use 0"),
        ({"top_k": 2.0}, "top_k is 2.0; use 0"),
        ({"top_k": True}, "top_k is True; use 0"),
        ({"seed": -1}, "seed is -1; use an integer"),
        ({"seed": 2**64}, "seed is 18446744073709551616; use an integer"),
        ({"seed": "x"}, "seed is 'x'; use an integer"),
    ],
)
def test_parameters_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(message)
