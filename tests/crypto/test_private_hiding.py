"""What the client sees is what a simulator makes that knows the results, not the weights.

Two maps as different as can be, all weights 127 with all multipliers 127 and all weights 0, get
masks that make their results equal. Then the client's views are compared: the first parts, and the
noise of the second parts, which is what is left after decryption. The client also knows its own
errors, so the sharpest statistic it has is a matched filter with the noise a guessed map would
make. Each statistic is also applied to answers with a planted fault, which it has to see.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from crypto_helpers import looks_uniform
from hiding_helpers import NORMAL_LIMIT, Unrounded, first_part_fits, matched_filter, plant
from numpy.typing import NDArray
from private_helpers import (
    INSECURE,
    MAP_INDEX,
    PRIVATE44,
    Exchange,
    centred,
    decoded,
    drawn,
    exchange,
    random_pads,
    results,
    times_secret,
)
from torch import Tensor

from otpipe.crypto.private_params import PrivatePacking
from otpipe.crypto.private_secrets import MaskStream, fresh_mask_key
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.randomness import random_bytes
from otpipe.crypto.rlwe import BatchSecret
from otpipe.kernels import wide

#: of a Kolmogorov-Smirnov statistic: chance exceeds it about once in 10^6
KS_LIMIT = 2.7
#: from the value of all weights to noise and guess
NoiseOf = Callable[[int], tuple[NDArray[np.float64], NDArray[np.float64]]]


class ChosenMasks(MaskStream):
    """Masks given by a table (T, m)."""

    def __init__(self, table_Tm: NDArray[np.int64]) -> None:
        super().__init__(fresh_mask_key(), MAP_INDEX, table_Tm.shape[1], 44)
        self._table = table_Tm

    def rows(self, first_slot: int, count: int) -> NDArray[np.int64]:
        return self._table[first_slot : first_slot + count]

    def tiles(self, first_answer: int, packing: PrivatePacking, out: NDArray[np.int64]) -> None:
        first = first_answer * packing.outputs
        chosen = self._table[: packing.num_slots, first : first + out[..., 0].size].T
        out.reshape(-1, packing.num_slots)[: len(chosen)] = chosen


def all_weights(value: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.full((m, n), value, dtype=torch.int8), torch.full((m,), 127)


def run(packing: PrivatePacking, maps: tuple[Tensor, Tensor], want: NDArray[np.uint64]) -> Exchange:
    """An exchange whose masks make the results equal to ``want`` (m, T)."""
    r_Tn = random_pads(packing.num_slots, maps[0].shape[1])
    no_masks = np.zeros((packing.num_slots, len(want)), np.int64)
    masks_mT = (results(*maps, r_Tn, no_masks) - want) & np.uint64((1 << 44) - 1)
    masks = ChosenMasks(masks_mT.T.astype(np.int64))
    done = exchange(packing, *maps, polynomials=64, masks=masks, r_Tn=r_Tn)
    assert np.array_equal(done.got, want)
    return done


def random_results(m: int, num_slots: int) -> NDArray[np.uint64]:
    return random_bytes(8 * m * num_slots).view(np.uint64).reshape(m, -1) >> np.uint64(20)


def kolmogorov_smirnov(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Two-sample statistic, scaled: exceeds 2.7 with probability about 1e-6 for equal laws."""
    values = np.sort(np.concatenate([x, y]))
    ranks = [np.searchsorted(np.sort(z), values, side="right") / z.size for z in (x, y)]
    return float(np.abs(ranks[0] - ranks[1]).max() * np.sqrt(x.size * y.size / (x.size + y.size)))


# --- before rounding, in the small ring: the exact noise -----------------------------------------


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> NoiseOf:
    """Function from the value of all weights to the noise of an exchange with 256 outputs.

    Returns the noise, and c W e for all weights and multipliers 127: (m * T,) each.
    """
    record, packing, m, n = Unrounded(monkeypatch), PrivatePacking(INSECURE, 64, 1), 256, 20

    def make(value: int) -> tuple[NDArray, NDArray]:
        record.forget()
        want = random_results(m, 64)
        done = run(packing, all_weights(value, m, n), want)
        noise = record.noise(done.secret, packing, torch.from_numpy(want.astype(np.int64)))
        return noise.reshape(-1), np.tile(127.0 * 127 * record.errors(64).sum(0), m)

    return make


def ideal_noise(count: int) -> NDArray[np.float64]:
    """The simulator's noise: flooding, and nothing else."""
    words = random_bytes(24 * count).view(np.int64).reshape(3, count)
    return words.astype(np.float64).sum(0) * 2.0**18


class TestNoise:
    def test_it_is_the_flooding_whatever_the_weights(self, unrounded: NoiseOf) -> None:
        left = {value: unrounded(value) for value in (0, 127)}
        for noise, guess in left.values():
            assert kolmogorov_smirnov(noise, ideal_noise(1 << 16)) < KS_LIMIT
            assert abs(matched_filter(noise, guess)) < NORMAL_LIMIT
        assert kolmogorov_smirnov(left[0][0], left[127][0]) < KS_LIMIT

    def test_no_flooding_is_seen(self, unrounded: NoiseOf, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, lambda secrets: secrets._replace(flood=0 * secrets.flood))
        left = {value: unrounded(value) for value in (0, 127)}
        assert kolmogorov_smirnov(left[0][0], left[127][0]) > KS_LIMIT
        assert matched_filter(*left[127]) > NORMAL_LIMIT
        assert abs(matched_filter(*left[0])) < NORMAL_LIMIT

    def test_too_little_flooding_is_seen(
        self, unrounded: NoiseOf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A flooding of 2^22, eight times the noise: no histogram shows it, the filter does."""
        plant(monkeypatch, lambda secrets: secrets._replace(flood=secrets.flood >> 60))
        assert matched_filter(*unrounded(127)) > NORMAL_LIMIT

    def test_flooding_that_repeats_is_seen(
        self, unrounded: NoiseOf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The differences of two outputs would be free of it."""
        honest = unrounded(127)[0].reshape(256, 64)
        fixed = drawn(1, PrivatePacking(INSECURE, 64, 1)).flood
        plant(monkeypatch, lambda s: s._replace(flood=np.repeat(fixed, len(s.flood), 0)))
        broken = unrounded(127)[0].reshape(256, 64)
        assert np.abs(np.diff(honest, axis=0)).min() > 2.0**40
        assert np.abs(np.diff(broken, axis=0)).max() < 2.0**40


# --- what leaves, at full size -------------------------------------------------------------------


def simulated(packing: PrivatePacking, secret: BatchSecret, want: NDArray[np.uint64]) -> Exchange:
    """The simulator: A uniform, B = A t + Delta * result + f, rounded. No weights, no upload."""
    count = packing.num_answers(len(want))
    degree = packing.params.ring_degree
    first = torch.from_numpy(random_bytes(16 * count * degree).view(np.int64))
    first = first.view(2, count, degree)
    second = times_secret(first, secret).view(2, count, packing.outputs, packing.stride)
    second = second[..., : packing.num_slots].contiguous()
    second[1] += torch.from_numpy(want.astype(np.int64)).view(count, packing.outputs, -1) << 20
    words = torch.from_numpy(random_bytes(24 * second[0].numel()).view(np.int64))
    for word in words.view(3, *second.shape[1:]):
        wide.add_(second, wide.shifted_left(wide.from_signed(word), packing.params.flood_shift))
    answers = TorchBackend(packing, torch.device("cpu")).rounded(first, second).numpy()
    return Exchange(packing, secret, b"", np.empty(0, np.uint8), answers, want, want)


def parts_of(done: Exchange) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes of the first and second parts: (G * N, 7) and (G * S, 6)."""
    params = done.packing.params
    split = params.ring_degree * params.first_bytes
    first = np.ascontiguousarray(done.answers[:, :split]).reshape(-1, params.first_bytes)
    second = np.ascontiguousarray(done.answers[:, split:]).reshape(-1, params.second_bytes)
    return first, second


def noise_after_decryption(done: Exchange) -> NDArray[np.float64]:
    """What a client finds beside its results, in units of 2^(128 - 56)."""
    packing, params = done.packing, done.packing.params
    first, second = parts_of(done)
    lifted = np.zeros((len(first), 8), np.uint8)
    lifted[:, 1:] = first  # times 2^8, so that the product wraps at 2^64
    first_GN = torch.from_numpy(lifted.view(np.int64).reshape(-1, params.ring_degree))
    known = times_secret(wide.from_signed(first_GN), done.secret)[0]
    known = known.view(-1, packing.outputs, packing.stride)[..., : packing.num_slots]
    lifted = np.zeros((len(second), 8), np.uint8)
    lifted[:, 2:] = second
    phase = torch.from_numpy(lifted.view(np.int64)).view(known.shape) - known
    want = torch.from_numpy(done.want.astype(np.int64)).view(known.shape) << 20
    return ((phase - want) >> 8).double().view(-1).numpy()


@pytest.mark.parametrize(("num_slots", "inputs"), [(8192, 1), (256, 4)])
def test_views_equal_the_simulators(num_slots: int, inputs: int) -> None:
    packing = PrivatePacking(PRIVATE44, num_slots, inputs)
    m, n = 3 * packing.outputs, 24
    want = random_results(m, num_slots)
    views = [run(packing, all_weights(value, m, n), want) for value in (0, 127)]
    views.append(simulated(packing, views[0].secret, want))
    assert len({view.answers.shape for view in views}) == 1
    for view in views:
        assert all(looks_uniform(part) for part in parts_of(view))
    noises = [noise_after_decryption(view) for view in views]
    assert max(float(np.abs(noise).max()) for noise in noises) < 2.0**11
    for i in range(3):
        assert kolmogorov_smirnov(noises[i], noises[i - 1]) < KS_LIMIT


# --- the first part ------------------------------------------------------------------------------


def matching_weights(done: Exchange) -> list[int]:
    """All int8 weights that explain the first answer of a map with one input, by trial."""
    one, first = torch.ones(1, dtype=torch.int64), done.answers[:1]
    return [
        value
        for value in range(-127, 128)
        if first_part_fits(done.packing, done.a_key, first, torch.tensor([[value]]), one)
    ]


class TestFirstPart:
    packing = PrivatePacking(INSECURE, 64, 1)

    def exchange(self, value: int = 77) -> Exchange:
        weight = torch.full((2, 1), value, dtype=torch.int8)
        return run(self.packing, (weight, torch.ones(2, dtype=torch.int64)), random_results(2, 64))

    def test_no_weight_explains_it(self) -> None:
        assert matching_weights(self.exchange()) == []

    def test_without_re_randomisation_it_tells_the_weight(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(monkeypatch, lambda s: s._replace(ternary=0 * s.ternary, error=0 * s.error))
        assert matching_weights(self.exchange()) == [77]

    def test_errors_alone_do_not_hide_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, lambda s: s._replace(ternary=0 * s.ternary))
        assert matching_weights(self.exchange()) == [77]

    def test_a_repeated_u_tells_the_difference_of_two_rows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not self.rows_are_equal(self.exchange())
        fixed = drawn(1, self.packing).ternary
        plant(monkeypatch, lambda s: s._replace(ternary=np.repeat(fixed, len(s.ternary), 0)))
        assert self.rows_are_equal(self.exchange())

    def rows_are_equal(self, done: Exchange) -> bool:
        """Whether two answers differ by small errors only, as those of equal rows would."""
        (one, two), _ = decoded(done.packing, done.answers)
        off = (centred(x - y, 1 << 56) for x, y in zip(one, two, strict=True))
        return all(abs(value) <= 1 for value in off)
