"""The server's products against exact ring arithmetic, under both memory plans."""

from __future__ import annotations

import os

import pytest
import torch
from crypto_helpers import MAP_INDEX
from torch import Tensor

from otpipe.crypto import evaluate, evaluate_cuda
from otpipe.crypto.ciphertext_ops import (
    add_products,
    add_products_torch,
    round_products,
    round_sums_torch,
    split_packed,
    split_packed_torch,
)
from otpipe.crypto.evaluate import LinearEvaluator
from otpipe.crypto.params import RLWE_PARAMS, RlweParams
from otpipe.crypto.rlwe import expand_a
from otpipe.errors import ParameterError, ProtocolError
from otpipe.kernels import combine_planes, ring_gemm, unpack_uints

A_KEY = bytes(range(32))
RING32 = RLWE_PARAMS["ring32"]


def reference_answers(weight: Tensor, params: RlweParams, block: Tensor, num_slots: int) -> Tensor:
    """Definition: ring GEMMs, multiplication by X^(uT), rounding. (G, 2, N) in answer units."""
    m, n = weight.shape
    degree, pack = params.ring_degree, params.ring_degree // num_slots
    a_JDN = torch.from_numpy(expand_a(A_KEY, MAP_INDEX, 0, n, params))
    a = combine_planes(a_JDN.movedim(1, 0).int().contiguous(), 8 * params.num_planes).long()
    b = unpack_uints(block) << params.dropped_upload_bits(block.shape[2])
    halves = []
    for x_nN in (a, b):
        sums = ring_gemm(x_nN.t().contiguous(), weight, 64).t()
        packed = torch.zeros((-(-m // pack), degree), dtype=torch.int64)
        for i in range(m):
            start = (i % pack) * num_slots
            rolled = torch.roll(sums[i], start)
            rolled[:start] *= -1
            packed[i // pack] += rolled
        dropped = params.log2_q - params.answer_bits
        halves.append(((packed + (1 << (dropped - 1))) >> dropped) % (1 << params.answer_bits))
    return torch.stack(halves, 1)


def run(evaluator: LinearEvaluator, block: Tensor, step: int, max_bytes: int = 1 << 18) -> Tensor:
    for first in range(0, len(block), step):
        evaluator.add_block(first, block[first : first + step])
    pieces, due = [], 0
    for first_group, piece in evaluator.answers(max_bytes):
        assert first_group == due and piece.device.type == "cpu"
        assert piece.numel() <= max_bytes or len(piece) == 1
        due += len(piece)
        pieces.append(piece.clone())
    return torch.cat(pieces)


def random_case(
    m: int, n: int, params: RlweParams, upload_bytes: int, layout: str
) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-127, 128, (m, n), dtype=torch.int8)
    weight[0] = -128
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    octets = torch.frombuffer(
        bytearray(os.urandom(n * params.ring_degree * upload_bytes)), dtype=torch.uint8
    )
    return weight, octets.view(n, params.ring_degree, upload_bytes)


CASES = [
    ("ring32", 9, 7, 2048, 6, "rows"),
    ("ring32", 9, 7, 2048, 7, "rows"),
    ("ring32", 21, 5, 256, 6, "transposed"),
    ("ring32", 5, 23, 512, 7, "transposed"),
    ("ring32", 3, 40, 64, 6, "rows"),
    ("ring8", 9, 7, 2048, 4, "rows"),
    ("ring8", 5, 23, 128, 4, "transposed"),
]


@pytest.mark.parametrize(("name", "m", "n", "num_slots", "upload_bytes", "layout"), CASES)
def test_answers_are_exact(
    name: str,
    m: int,
    n: int,
    num_slots: int,
    upload_bytes: int,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small tiles and stages, so that every loop goes round more than once.
    monkeypatch.setattr(evaluate, "STAGE_INPUTS", 8)
    monkeypatch.setattr(evaluate, "TILE_ROWS", 4)
    params = RLWE_PARAMS[name]
    weight, block = random_case(m, n, params, upload_bytes, layout)
    evaluator = LinearEvaluator(weight, params, MAP_INDEX, A_KEY, num_slots, upload_bytes)
    answer = run(evaluator, block, step=3)
    want = reference_answers(weight, params, block, num_slots)
    assert answer.shape == (*want.shape, params.answer_bytes)
    assert torch.equal(unpack_uints(answer), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "m", "n", "num_slots", "upload_bytes", "layout"), CASES)
def test_cuda_answers_equal_cpu_answers(
    name: str,
    m: int,
    n: int,
    num_slots: int,
    upload_bytes: int,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "STAGE_INPUTS", 16)
    monkeypatch.setattr(evaluate_cuda, "TILE_ROWS", 64)
    params = RLWE_PARAMS[name]
    weight, block = random_case(m, n, params, upload_bytes, layout)
    answers = []
    for device in ("cpu", "cuda"):
        placed = weight.to(device)
        evaluator = LinearEvaluator(placed, params, MAP_INDEX, A_KEY, num_slots, upload_bytes)
        answers.append(run(evaluator, block.to(device), step=3))
    assert torch.equal(*answers)


class TestCompiledKernelsEqualTheirTwins:
    @pytest.mark.parametrize("num_bytes", [4, 6, 7])
    def test_split_packed(self, num_bytes: int) -> None:
        block = torch.randint(0, 256, (5, 2048, num_bytes), dtype=torch.uint8)
        got = torch.empty((5, num_bytes, 2048), dtype=torch.int8)
        split_packed(block, got)
        assert torch.equal(got, split_packed_torch(block))
        unaligned = torch.cat([torch.zeros(3, dtype=torch.uint8), block.view(-1)])[3:]
        split_packed(unaligned.view_as(block), got)
        assert torch.equal(got, split_packed_torch(block))

    @pytest.mark.parametrize("shift", [0, 6])
    def test_add_products(self, shift: int) -> None:
        products = torch.randint(-(2**31), 2**31 - 1, (19, 7, 2048)).int()
        sums = torch.randint(-(2**63), 2**63 - 1, (19, 2048))
        want = sums.clone()
        add_products(products, shift, sums)
        add_products_torch(products, shift, want)
        assert torch.equal(sums, want)

    @pytest.mark.parametrize("name", ["ring32", "ring8"])
    @pytest.mark.parametrize("pack", [1, 2, 32])
    def test_round_products(self, name: str, pack: int) -> None:
        params = RLWE_PARAMS[name]
        products = torch.randint(-(2**31), 2**31 - 1, (pack * 2 + 1, 4, 2048)).int()
        answer = torch.zeros((5, 2, 2048, params.answer_bytes), dtype=torch.uint8)
        round_products(products, 6, pack, params, answer, 1, 1)
        sums = torch.zeros((len(products), 2048), dtype=torch.int64)
        add_products_torch(products, 6, sums)
        assert torch.equal(answer[1:4, 1], round_sums_torch(sums, pack, params))
        assert not answer[:, 0].any() and not answer[4].any() and not answer[0].any()


class TestMisuse:
    def evaluator(self) -> LinearEvaluator:
        weight = torch.ones((2, 3), dtype=torch.int8)
        return LinearEvaluator(weight, RING32, MAP_INDEX, A_KEY, 2048, 6)

    def block(self, count: int) -> Tensor:
        return torch.zeros((count, 2048, 6), dtype=torch.uint8)

    def test_blocks_out_of_order(self) -> None:
        evaluator = self.evaluator()
        evaluator.add_block(0, self.block(1))
        with pytest.raises(ProtocolError, match="Block 2 arrived out of order; coordinate 1"):
            evaluator.add_block(2, self.block(1))
        with pytest.raises(ProtocolError, match="Block 0 arrived out of order"):
            evaluator.add_block(0, self.block(1))

    @pytest.mark.parametrize(
        "block",
        [
            torch.zeros((4, 2048, 6), dtype=torch.uint8),
            torch.zeros((0, 2048, 6), dtype=torch.uint8),
            torch.zeros((1, 2048, 7), dtype=torch.uint8),
            torch.zeros((1, 1024, 6), dtype=torch.uint8),
            torch.zeros((1, 2048, 6), dtype=torch.int8),
            torch.zeros(2048 * 6, dtype=torch.uint8),
        ],
    )
    def test_blocks_of_another_shape(self, block: Tensor) -> None:
        with pytest.raises(ProtocolError, match=r"expected uint8 \(1 to 3, 2048, 6\)"):
            self.evaluator().add_block(0, block)

    def test_answers_before_the_last_block(self) -> None:
        evaluator = self.evaluator()
        evaluator.add_block(0, self.block(2))
        with pytest.raises(ProtocolError, match="after 2 of 3 inputs"):
            evaluator.answers(1 << 20)

    def test_answers_twice(self) -> None:
        evaluator = self.evaluator()
        evaluator.add_block(0, self.block(3))
        assert len(list(evaluator.answers(1 << 20))) == 1
        with pytest.raises(ProtocolError, match="a second time"):
            evaluator.answers(1 << 20)

    def test_slots_and_widths_outside_the_set(self) -> None:
        weight = torch.ones((2, 3), dtype=torch.int8)
        with pytest.raises(ParameterError, match="3 slots"):
            LinearEvaluator(weight, RING32, MAP_INDEX, A_KEY, 3, 6)
        with pytest.raises(ParameterError, match="5 upload bytes"):
            LinearEvaluator(weight, RING32, MAP_INDEX, A_KEY, 2048, 5)


def test_peak_bytes_counts_planes_sums_and_one_tile() -> None:
    wide = LinearEvaluator.peak_bytes(9728, 896, RING32, 6, "cpu")
    assert wide == 896 * 2048 * 13 + 384 * 2048 * 4 * 7
    tall = LinearEvaluator.peak_bytes(896, 4864, RING32, 6, "cpu")
    assert tall == 2048 * 2048 * 13 + 2 * 896 * 2048 * 8 + 384 * 2048 * 4 * 7
    # the largest map of a 14B model fits beside its weights on a GPU
    assert LinearEvaluator.peak_bytes(5120, 13824, RING32, 7, "cuda") < 1 << 29
