"""The server's answers against their definition in Python integers, on both backends."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from private_helpers import (
    INSECURE,
    INSECURE_LIMB,
    MAP_INDEX,
    MODULUS,
    PRIVATE44,
    blocks,
    decoded,
    drawn,
    exchange,
    fresh_masks,
    from_octets,
    linear_answers,
    plus,
    public_polynomials,
    random_map,
    random_pads,
    times,
    use_backend,
)

from otpipe.crypto import private_cpu, private_evaluate, private_secrets, private_torch
from otpipe.crypto.private_cpu import CompiledBackend
from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_matmul import MATMUL_PARAMS
from otpipe.crypto.private_params import PrivatePacking, PrivateParams, choose_packing
from otpipe.crypto.private_secrets import AnswerSecrets, MaskReused, draw_secrets
from otpipe.crypto.private_torch import TorchBackend
from otpipe.crypto.rlwe import BatchSecret
from otpipe.errors import ProtocolError

PRODUCT51 = MATMUL_PARAMS[1]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[AnswerSecrets]:
    """Everything that answers were hidden with, in order (one thread)."""
    seen: list[AnswerSecrets] = []

    def recorded(packing: PrivatePacking, out: AnswerSecrets) -> None:
        draw_secrets(packing, out)
        seen.append(AnswerSecrets(*(field.copy() for field in out)))

    monkeypatch.setattr(private_secrets, "draw_secrets", recorded)
    monkeypatch.setattr(private_cpu, "parallel_for", lambda body, total, grain: body(0, total))
    return seen


CASES = [
    (3, 5, 64, 1),  # keeps inputs
    (7, 9, 16, 1),
    (9, 6, 8, 4),
    (3, 23, 32, 2),  # keeps sums, the last polynomial half filled
    (6, 40, 8, 8),
]


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize(
    ("params", "layout"),
    [(INSECURE, "rows"), (INSECURE, "transposed"), (INSECURE_LIMB, "rows")],
    ids=["rows", "transposed", "whole limb"],
)
@pytest.mark.parametrize(("m", "n", "num_slots", "inputs"), CASES)
def test_answers_are_their_definition(
    m: int,
    n: int,
    num_slots: int,
    inputs: int,
    params: PrivateParams,
    layout: str,
    backend: str,
    record: list[AnswerSecrets],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small tiles, chunks and stages, so that every loop goes round more than once.
    use_backend(monkeypatch, backend)
    monkeypatch.setattr(private_evaluate, "STAGE_INPUTS", {"cpu": 16})
    for module in (private_cpu, private_torch):
        monkeypatch.setattr(module, "_ROWS", 3)
        monkeypatch.setattr(module, "_ANSWERS", 2)
    monkeypatch.setattr(private_cpu, "_CHUNK", 16)
    packing = PrivatePacking(params, num_slots, inputs)
    weight, multipliers = random_map(m, n)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    masks = fresh_masks(m, params)
    done = exchange(packing, weight, multipliers, 3, 2 * packing.answer_bytes, masks)

    a = public_polynomials(packing, done.a_key, n)
    b = from_octets(done.upload)
    ternary, error, flood = (np.concatenate(column) for column in zip(*record, strict=True))
    first, second = decoded(packing, done.answers)
    linear_a = linear_answers(packing, weight, multipliers, a[1:])
    linear_b = linear_answers(packing, weight, multipliers, b[1:])
    assert len(first) == packing.num_answers(m) == len(ternary)
    masks_Tm = masks.rows(0, num_slots)
    for answer in range(len(first)):
        u = ternary[answer].tolist()
        whole = plus(linear_a[answer], times(a[0], u), error[answer].tolist())
        assert first[answer] == [rounded(value, 128 - params.first_bits) for value in whole]
        whole = plus(linear_b[answer], times(b[0], u))
        want = []
        for place in range(packing.outputs):
            output = answer * packing.outputs + place
            for slot in range(num_slots):
                value = whole[place * packing.stride + slot]
                words = flood[answer, :, place * num_slots + slot]
                value += sum(int(word) for word in words) << params.flood_shift
                if output < m:
                    value -= int(masks_Tm[slot, output]) << params.delta_shift
                want.append(rounded(value, 128 - params.second_bits))
        assert second[answer] == want


def rounded(value: int, dropped: int) -> int:
    """round(value / 2^dropped), halves up, in the bits that are left."""
    return ((value % MODULUS) + (1 << (dropped - 1)) >> dropped) % (MODULUS >> dropped)


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("params", [INSECURE, INSECURE_LIMB], ids=["rows", "whole limb"])
def test_the_first_part_has_its_error(params: PrivateParams, backend: str) -> None:
    """Sums a little below half a unit: positive errors round up. Elsewhere rounding drops them."""
    packing, device = PrivatePacking(params, 64, 1), torch.device("cpu")
    hide = CompiledBackend(packing) if backend == "compiled" else TorchBackend(packing, device)
    hide.set_key(torch.zeros((1, 16, 64), dtype=torch.int8), torch.zeros((1, 64, 16)).byte())
    sums = hide.new_sums(4)
    sums[:, 0, 0] = (1 << 63) - 1 if params.first_bits == 64 else -1
    sums[:, 0, 1] = ((1 << (127 - params.first_bits)) - 1) >> 64
    first, _ = decoded(packing, hide.finish(sums, 0, fresh_masks(4, params)).numpy())
    ups = [value for row in first for value in row]
    assert set(ups) == {0, 1} and 64 < sum(ups) < 192


@pytest.mark.gpu
@pytest.mark.parametrize("params", [PRIVATE44, PRODUCT51], ids=lambda params: params.name)
@pytest.mark.parametrize(("m", "n", "num_slots"), [(70, 40, 8192), (40, 96, 512), (33, 300, 64)])
def test_cuda_answers_equal_cpu_answers(
    m: int, n: int, num_slots: int, params: PrivateParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_evaluate, "STAGE_INPUTS", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(private_cpu, "parallel_for", lambda body, total, grain: body(0, total))
    packing = choose_packing(params, n, m, num_slots)
    answers = packing.num_answers(m)
    fixed = drawn(answers, packing)
    weight, multipliers = random_map(m, n)
    secret, a_key, mask_key = BatchSecret.generate(params), os.urandom(32), os.urandom(32)
    sent = list(blocks(secret, packing, a_key, random_pads(num_slots, n), 50))
    got = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(private_secrets, "draw_secrets", handed_out(fixed))
        masks = private_secrets.MaskStream(mask_key, MAP_INDEX, m, params.log2_p)
        evaluator = PrivateEvaluator(
            weight.to(device), multipliers.to(device), packing, MAP_INDEX, a_key, masks
        )
        for first, block in sent:
            evaluator.add_block(first, torch.from_numpy(block).to(device))
        got.append(torch.cat([piece for _, piece in evaluator.answers(1 << 24)]))
    assert torch.equal(*got)


def handed_out(fixed: AnswerSecrets) -> Callable[[PrivatePacking, AnswerSecrets], None]:
    """Hands out the same secrets in order, however many at a time."""
    at = 0

    def take(packing: PrivatePacking, out: AnswerSecrets) -> None:
        nonlocal at
        for field, source in zip(out, fixed, strict=True):
            field[:] = source[at : at + len(field)]
        at += len(out.ternary)

    return take


class TestOrderAndShapes:
    packing = PrivatePacking(INSECURE, 16, 2)

    def evaluator(self) -> PrivateEvaluator:
        return PrivateEvaluator(
            *random_map(2, 3), self.packing, MAP_INDEX, bytes(32), fresh_masks(2)
        )

    def block(self, count: int) -> torch.Tensor:
        return torch.zeros((count, 64, 16), dtype=torch.uint8)

    def test_the_key_may_share_a_block(self) -> None:
        evaluator = self.evaluator()
        evaluator.add_block(0, self.block(3))
        assert len(list(evaluator.answers(1 << 20))) == 1

    def test_blocks_out_of_order(self) -> None:
        evaluator = self.evaluator()
        with pytest.raises(ProtocolError, match="Block 1 arrived out of order; polynomial 0"):
            evaluator.add_block(1, self.block(1))
        evaluator.add_block(0, self.block(1))
        with pytest.raises(ProtocolError, match="Block 0 arrived out of order; polynomial 1"):
            evaluator.add_block(0, self.block(1))

    @pytest.mark.parametrize(
        "block",
        [
            torch.zeros((4, 64, 16), dtype=torch.uint8),
            torch.zeros((0, 64, 16), dtype=torch.uint8),
            torch.zeros((1, 64, 15), dtype=torch.uint8),
            torch.zeros((1, 64, 16), dtype=torch.int8),
        ],
    )
    def test_blocks_of_another_shape(self, block: torch.Tensor) -> None:
        with pytest.raises(ProtocolError, match=r"expected uint8 \(1 to 3, 64, 16\)"):
            self.evaluator().add_block(0, block)

    def test_answers_too_early_and_twice(self) -> None:
        evaluator = self.evaluator()
        evaluator.add_block(0, self.block(2))
        with pytest.raises(ProtocolError, match="after 2 of 3 inputs"):
            evaluator.answers(1 << 20)
        evaluator.add_block(2, self.block(1))
        list(evaluator.answers(1 << 20))
        with pytest.raises(ProtocolError, match="a second time"):
            evaluator.answers(1 << 20)

    def test_answers_come_in_order_within_the_limit(self) -> None:
        evaluator = PrivateEvaluator(
            *random_map(11, 1), self.packing, MAP_INDEX, bytes(32), fresh_masks(11)
        )
        evaluator.add_block(0, self.block(2))
        size = self.packing.answer_bytes
        pieces = list(evaluator.answers(2 * size + 1))
        assert [first for first, _ in pieces] == [0, 2, 4]
        assert [tuple(piece.shape) for _, piece in pieces] == [(2, size), (2, size), (2, size)]


class TestMisuse:
    packing = PrivatePacking(INSECURE, 16, 1)

    def test_masks_hide_one_exchange(self) -> None:
        masks = fresh_masks(2)
        PrivateEvaluator(*random_map(2, 3), self.packing, 0, bytes(32), masks)
        with pytest.raises(MaskReused, match="draw a fresh mask key"):
            PrivateEvaluator(*random_map(2, 3), self.packing, 0, bytes(32), masks)

    def test_masks_of_another_map(self) -> None:
        with pytest.raises(ValueError, match=r"Masks of 3 outputs mod 2\^44 came for 2 outputs"):
            PrivateEvaluator(*random_map(2, 3), self.packing, 0, bytes(32), fresh_masks(3))

    @pytest.mark.parametrize("value", [-1, 128])
    def test_multipliers_out_of_range(self, value: int) -> None:
        weight, multipliers = random_map(2, 3)
        multipliers[1] = value
        with pytest.raises(ValueError, match="between 0 and 127"):
            PrivateEvaluator(weight, multipliers, self.packing, 0, bytes(32), fresh_masks(2))

    def test_multipliers_of_another_shape(self) -> None:
        weight, multipliers = random_map(2, 3)
        with pytest.raises(TypeError, match=r"Multipliers are int64 \(2,\)"):
            PrivateEvaluator(weight, multipliers[:1], self.packing, 0, bytes(32), fresh_masks(2))


def test_peak_bytes_counts_planes_sums_and_one_tile() -> None:
    full = choose_packing(PRIVATE44, 896, 9728, 8192)
    tile = 512 * 1024 * 4 * 4
    assert PrivateEvaluator.peak_bytes(9728, 896, full, "cpu") == 32 * 8192 * (896 + 512) + tile
    # inputs that are more than a stage and the outputs: sums of all outputs and one stage
    assert PrivateEvaluator.peak_bytes(896, 4864, full, "cpu") == 32 * 8192 * (1024 + 896) + tile
    # the largest map of a 14B model fits beside its weights on a GPU
    packing = choose_packing(PRIVATE44, 13824, 5120, 8192)
    assert PrivateEvaluator.peak_bytes(5120, 13824, packing, "cuda") < 4 << 30
