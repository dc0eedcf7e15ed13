"""The noise budget: choices pinned, and measured noise inside what it predicts."""

from __future__ import annotations

import math
import os

import pytest
import torch
from crypto_helpers import MAP_INDEX, exchange, phase_noise, random_pads

from otpipe.crypto.evaluate import LinearEvaluator
from otpipe.crypto.noise import MAX_LOG2_FAILURE, NoiseBudget, choose_upload_bytes
from otpipe.crypto.params import RLWE_PARAMS
from otpipe.crypto.rlwe import BatchSecret, encrypt_block
from otpipe.errors import ParameterError

RING32, RING8 = RLWE_PARAMS["ring32"], RLWE_PARAMS["ring8"]


class TestChooseUploadBytes:
    @pytest.mark.parametrize(
        ("max_row_l2", "in_features", "pack", "want"),
        [
            (0.0, 1, 1, 6),
            (127 * math.sqrt(896), 896, 1, 6),  # every weight extreme: still rounded
            (32 * math.sqrt(5120), 5120, 1, 6),  # rows as real models have them
            (105 * math.sqrt(13824), 13824, 1, 7),
            (32 * math.sqrt(13824), 13824, 2, 7),
            (32 * math.sqrt(13824), 13824, 8, 7),
        ],
    )
    def test_ring32(self, max_row_l2: float, in_features: int, pack: int, want: int) -> None:
        assert choose_upload_bytes(RING32, max_row_l2, in_features, pack) == want

    @pytest.mark.parametrize("pack", [1, 4, 32])
    def test_ring8_never_rounds(self, pack: int) -> None:
        assert choose_upload_bytes(RING8, 30 * math.sqrt(151936), 151936, pack) == 4

    def test_refuses_what_would_not_decrypt(self) -> None:
        with pytest.raises(ParameterError, match="prepare more slots"):
            choose_upload_bytes(RING32, 127 * math.sqrt(13824), 13824, 1)
        with pytest.raises(ParameterError, match=r"batches of 1 slots .* prepare more slots"):
            choose_upload_bytes(RING32, 5000, 13824, 2048)

    @pytest.mark.parametrize("max_row_l2", [-1.0, 128 * math.sqrt(100) + 1, math.nan, math.inf])
    def test_refuses_impossible_norms(self, max_row_l2: float) -> None:
        with pytest.raises(ParameterError, match="row norm"):
            choose_upload_bytes(RING32, max_row_l2, 100, 1)

    def test_refuses_impossible_pack_factors(self) -> None:
        with pytest.raises(ParameterError, match="power of two"):
            choose_upload_bytes(RING32, 10, 100, 3)

    def test_more_noise_never_means_fewer_bytes(self) -> None:
        chosen = [choose_upload_bytes(RING32, float(l2), 5120, 1) for l2 in range(0, 9000, 100)]
        assert chosen == sorted(chosen) and set(chosen) == {6, 7}


def test_failure_bound_is_the_union_of_its_parts() -> None:
    budget = NoiseBudget(RING32, 2000.0, 896, 1, 6)
    assert budget.std == pytest.approx(
        math.sqrt(
            budget.error_std**2 + budget.upload_rounding_std**2 + budget.answer_rounding_std**2
        )
    )
    assert budget.allowed == 127
    assert budget.upload_rounding_std == pytest.approx(2000 * 32 / math.sqrt(12) / 2**13)
    assert budget.error_std == pytest.approx(2000 * math.sqrt(10.5) / 2**13)
    assert NoiseBudget(RING32, 2000.0, 896, 1, 7).upload_rounding_std == 0
    # a secret with more than 3N/4 nonzeros: no better than this, whatever the other noise
    assert -49 < RING32.log2_heavy_secret < -48
    assert budget.log2_failure <= MAX_LOG2_FAILURE


@pytest.mark.parametrize(
    ("name", "n", "num_slots", "extreme"),
    [
        ("ring32", 900, 2048, False),
        ("ring32", 900, 2048, True),
        ("ring32", 2500, 512, False),
        ("ring8", 900, 2048, True),
        ("ring8", 900, 64, True),
    ],
)
def test_measured_noise_is_what_was_predicted(
    name: str, n: int, num_slots: int, extreme: bool
) -> None:
    params = RLWE_PARAMS[name]
    pack = params.pack_factor(num_slots)
    weight = torch.full((8 * pack, n), 127, dtype=torch.int8)
    if not extreme:
        weight = torch.randint(-127, 128, (8 * pack, n), dtype=torch.int8)
    done = exchange(params, weight, num_slots, block_size=512)
    assert (done.got == done.want).all()
    l2 = float(weight.double().norm(dim=1).max())
    budget = NoiseBudget(params, l2, n, pack, done.upload_bytes)
    noise = phase_noise(done.secret, done.answer, done.want).double()
    assert noise.abs().max() < budget.allowed
    # The prediction takes 3N/4 nonzeros in t; there are about 2N/3.
    assert 0.8 < float(noise.std()) / budget.std < 1.1
    # Equal rows have equal noise, so that the extreme weights give only N independent values.
    independent = params.ring_degree if extreme else noise.numel()
    assert abs(float(noise.mean())) < 6 * budget.std / math.sqrt(independent) + 0.1


@pytest.mark.slow
def test_widest_map_with_extreme_weights() -> None:
    """The embedding of a 151936-token vocabulary; eight outputs stand for all."""
    params, n, m, num_slots = RING8, 151936, 8, 2048
    weight = torch.full((m, n), 127, dtype=torch.int8)
    weight[1::2] = -127
    budget = NoiseBudget(params, 127 * math.sqrt(n), n, 1, 4)
    assert choose_upload_bytes(params, budget.max_row_l2, n, 1) == 4
    secret, a_key = BatchSecret.generate(params), os.urandom(32)
    evaluator = LinearEvaluator(weight, params, MAP_INDEX, a_key, num_slots, 4)
    total = torch.zeros(num_slots, dtype=torch.int64)
    for first in range(0, n, 2048):
        r_TJ = random_pads(params, num_slots, min(2048, n - first))
        total += torch.from_numpy(r_TJ).sum(1)
        block = encrypt_block(secret, a_key, MAP_INDEX, first, r_TJ, 4)
        evaluator.add_block(first, torch.from_numpy(block))
    answer = torch.cat([piece for _, piece in evaluator.answers(1 << 24)])
    want_mT = (weight[:, :1].long() * total).to(torch.uint8).numpy()
    noise = phase_noise(secret, answer, want_mT).double()
    assert noise.abs().max() < budget.allowed
    assert 0.8 < float(noise.std()) / budget.std < 1.1
