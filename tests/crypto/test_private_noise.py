"""What a batch tells about weights, whether it decrypts: the bounds, and measurements."""

from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from private_helpers import (
    INSECURE,
    MAP_INDEX,
    PRIVATE44,
    blocks,
    fresh_masks,
    random_pads,
    times_secret,
    use_backend,
)
from torch import Tensor

from otpipe.crypto import private_secrets
from otpipe.crypto.noise import MAX_LOG2_FAILURE
from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_noise import (
    HELLINGER_OF_ONE,
    MAX_LOG2_DISTANCE,
    check_batch,
    log2_distance,
    log2_failure,
)
from otpipe.crypto.private_params import PrivatePacking, choose_packing
from otpipe.crypto.private_rlwe import decrypt_block, encrypt_block, encrypt_key
from otpipe.crypto.private_secrets import AnswerSecrets, draw_secrets
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.rlwe import BatchSecret
from otpipe.errors import ParameterError
from otpipe.kernels import wide


def qwen_shapes(
    hidden: int, layers: int, kv: int, mlp: int, vocabulary: int
) -> list[tuple[int, int]]:
    """(n, m) of every map in private mode: the embedding has two digits an output."""
    layer = [(hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden)]
    return [(vocabulary, 2 * hidden), *layer * layers, (hidden, vocabulary)]


SHAPES = {
    "0.5b": qwen_shapes(896, 24, 128, 4864, 151936),
    "14b": qwen_shapes(5120, 48, 1024, 13824, 152064),
    "72b": qwen_shapes(8192, 80, 1024, 29568, 152064),
}


class TestDistance:
    @pytest.mark.parametrize(("name", "want"), [("0.5b", -44.8), ("14b", -42.7), ("72b", -41.6)])
    def test_of_published_shapes(self, name: str, want: float) -> None:
        """For the worst weights there are, a whole batch."""
        assert log2_distance(PRIVATE44, SHAPES[name]) == pytest.approx(want, abs=0.05)
        assert log2_distance(PRIVATE44, SHAPES[name]) <= MAX_LOG2_DISTANCE
        check_batch(PRIVATE44, SHAPES[name])

    def test_too_large_a_model_is_refused(self) -> None:
        with pytest.raises(ParameterError, match=r"statistical distance 2\^-39\.8"):
            check_batch(PRIVATE44, SHAPES["72b"] * 12)

    def test_it_is_what_its_terms_say(self) -> None:
        n, m, degree = 100, 7, 8192
        energy = m * degree * (n * (128 * 127) ** 2 * 10.5 + 2 * degree * (2 / 3) * 10.5)
        shift = math.sqrt(energy) / 2**18 + math.sqrt(m * degree)
        want = math.log2(math.sqrt(2) * 0.756 * shift / 2**64)
        assert log2_distance(PRIVATE44, [(n, m)]) == pytest.approx(want)

    def test_less_flooding_hides_less(self) -> None:
        less = dataclasses.replace(PRIVATE44, flood_shift=14)
        got = log2_distance(less, SHAPES["14b"]) - log2_distance(PRIVATE44, SHAPES["14b"])
        assert got == pytest.approx(4, abs=0.1)

    def test_batches_add_up_by_their_square_root(self) -> None:
        one, four = (log2_distance(PRIVATE44, SHAPES["14b"] * count) for count in (1, 4))
        assert four - one == pytest.approx(1)


class TestHellinger:
    """The bound on the law of three uniform words, on words of few values."""

    @staticmethod
    def law(values: int) -> NDArray[np.float64]:
        word = np.full(values, 1 / values)
        return np.convolve(np.convolve(word, word), word)

    @staticmethod
    def hellinger(law: NDArray[np.float64], shift: int) -> float:
        gap = np.zeros(shift)
        one, other = np.concatenate([law, gap]), np.concatenate([gap, law])
        return math.sqrt(0.5 * ((np.sqrt(one) - np.sqrt(other)) ** 2).sum())

    @pytest.mark.parametrize("values", [64, 256, 1024, 4096])
    def test_of_a_shift_by_one(self, values: int) -> None:
        got = self.hellinger(self.law(values), 1) * values
        limit = math.sqrt(0.5703)
        assert limit < got < limit + 2 / values
        assert limit < HELLINGER_OF_ONE

    @pytest.mark.parametrize("shift", [1, 2, 7, 40, 200])
    def test_of_any_shift_and_the_statistical_distance(self, shift: int) -> None:
        values = 1024
        law, gap = self.law(values), np.zeros(shift)
        hellinger = self.hellinger(law, shift)
        assert hellinger <= shift * self.hellinger(law, 1) + 1e-12
        moved = np.concatenate([gap, law])
        distance = 0.5 * np.abs(np.concatenate([law, gap]) - moved).sum()
        assert distance <= math.sqrt(2) * hellinger


class TestFailure:
    def test_of_the_set_in_use(self) -> None:
        # 2^11 for half a message, less 1536 of flooding, 128 for the second part, 2 for the rest
        assert PRIVATE44.allowed_rounding == 382
        assert log2_failure(PRIVATE44) == pytest.approx(-164.6, abs=0.1)
        assert log2_failure(PRIVATE44) <= MAX_LOG2_FAILURE

    def test_too_few_bits_are_refused(self) -> None:
        narrow = dataclasses.replace(PRIVATE44, first_bits=48, flood_shift=17)
        with pytest.raises(ParameterError, match="would decrypt wrongly with probability"):
            check_batch(narrow, [(10, 10)])

    def test_a_secret_is_rarely_heavy(self) -> None:
        assert PRIVATE44.log2_heavy_secret == pytest.approx(-194, abs=1)


def test_measured_noise_is_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and multipliers at their largest, the flooding left out: what remains of B - A t,
    coefficient by coefficient, against the energy in ``log2_distance``."""
    use_backend(monkeypatch, "torch")
    n, packing = 300, PrivatePacking(PRIVATE44, 8192, 1)
    seen: list[tuple[Tensor, Tensor]] = []

    def unrounded(self: TorchBackend, first: Tensor, second: Tensor) -> Tensor:
        seen.append((first, second))
        return torch.zeros((first.shape[1], packing.answer_bytes), dtype=torch.uint8)

    def unflooded(packing: PrivatePacking, out: AnswerSecrets) -> None:
        draw_secrets(packing, out)
        out.flood[:] = 0

    monkeypatch.setattr(TorchBackend, "rounded", unrounded)
    monkeypatch.setattr(private_secrets, "draw_secrets", unflooded)
    weight = torch.full((2, n), -128, dtype=torch.int8)
    weight[1] = torch.tensor([-128, 127]).repeat(n // 2)
    secret, a_key = BatchSecret.generate(PRIVATE44), os.urandom(32)
    masks = fresh_masks(2, PRIVATE44)
    evaluator = PrivateEvaluator(weight, torch.full((2,), 127), packing, MAP_INDEX, a_key, masks)
    no_pads = np.zeros((8192, n), np.uint64)
    for first, block in blocks(secret, packing, a_key, no_pads, 100):
        evaluator.add_block(first, torch.from_numpy(block))
    list(evaluator.answers(1 << 24))
    first_GN, second_GN = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
    known = times_secret(first_GN, secret)
    noise = wide.add_(second_GN.view(2, 2, 8192).clone(), wide.negated(known))
    noise[1] += torch.from_numpy(masks.rows(0, 8192).T) << 20
    assert torch.equal(noise[1], noise[0] >> 63)  # small: the high limb is the sign
    measured = noise[0].double().square().mean(1)
    predicted = n * (128 * 127) ** 2 * 10.5 + 2 * 8192 * (2 / 3) * 10.5
    # 8192 coefficients: their mean square has a relative deviation of sqrt(2 / 8192)
    assert (measured / predicted - 1).abs().max() < 6 * math.sqrt(2 / 8192)


def exact_with_extreme_weights(packing: PrivatePacking, n: int) -> bool:
    """Whether rows of n weights 127 and -128, with multipliers 127, give exact results."""
    params, num_slots = packing.params, packing.num_slots
    weight = torch.full((2, n), 127, dtype=torch.int8)
    weight[1] = -128
    multipliers = torch.full((2,), 127)
    secret, a_key, masks = BatchSecret.generate(params), os.urandom(32), fresh_masks(2, params)
    evaluator = PrivateEvaluator(weight, multipliers, packing, MAP_INDEX, a_key, masks)
    evaluator.add_block(0, torch.from_numpy(encrypt_key(secret, a_key, MAP_INDEX)))
    total = np.zeros(num_slots, np.uint64)
    number, step = 1, (1 << 19) // params.ring_degree * packing.inputs
    for first in range(0, n, step):
        r_Tn = random_pads(num_slots, min(step, n - first))
        total += r_Tn.sum(1, dtype=np.uint64)
        block = encrypt_block(secret, packing, a_key, MAP_INDEX, number, r_Tn)
        evaluator.add_block(number, torch.from_numpy(block))
        number += len(block)
    answers = torch.cat([piece for _, piece in evaluator.answers(1 << 24)]).numpy()
    factors = (weight[:, 0].long() * multipliers).numpy().astype(np.uint64)
    want = factors[:, None] * total - masks.rows(0, num_slots).T.astype(np.uint64)
    got = decrypt_block(secret, packing, answers, 2)
    return np.array_equal(got, want & np.uint64((1 << 44) - 1))


@pytest.mark.slow
def test_widest_layer_at_full_size() -> None:
    """``down`` of a 72B model; two outputs stand for all."""
    assert exact_with_extreme_weights(choose_packing(PRIVATE44, 29568, 8192, 1024), 29568)


def test_rows_of_a_whole_vocabulary() -> None:
    """The embedding, longer than int32 sums allow at once, in the small ring."""
    assert exact_with_extreme_weights(PrivatePacking(INSECURE, 16, 4), 152064)
