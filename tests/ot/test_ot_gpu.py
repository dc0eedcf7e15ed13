"""The sender on CUDA: every pass bit for bit the compiled one, and whole sessions."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from asked import MIXED, Asked, cpu_math, device_math
from ot_helpers import both, make_pair, random_choices, random_values, reduced

from otpipe.kernels.aes_planes import expand_keys, key_planes
from otpipe.ot import (
    OtParams,
    ReceiveCorrelated,
    ReceiveOneOfMany,
    SendCorrelated,
    SendOneOfMany,
    sender_device,
    torch_ops,
)
from otpipe.ot.extension import TreeLayout, correction_bytes
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import TweakLedger, blocks_per_pad
from otpipe.ot.params import OT_PARAMS
from otpipe.ot.plan import Shape
from otpipe.ot.sender_cpu import CpuSenderMath
from otpipe.ot.sender_device import DeviceSenderMath

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def maths(params: OtParams) -> tuple[CpuSenderMath, DeviceSenderMath]:
    """The same sender twice."""
    layout = TreeLayout.of(params)
    seeds = np.frombuffer(os.urandom(16 * params.num_leaves), np.uint8).reshape(-1, 16)
    secrets = SenderSecrets(os.urandom(16), seeds, os.urandom(64))
    return (
        CpuSenderMath(secrets, layout, TweakLedger(params)),
        DeviceSenderMath(secrets, layout, TweakLedger(params), CUDA),
    )


def test_triton_is_what_runs() -> None:
    assert sender_device._triton_ops().__name__ == "otpipe.ot.triton_ops"


@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
@pytest.mark.parametrize("count", [2048, 40960])
def test_extension(params: OtParams, count: int) -> None:
    cpu, cuda = maths(params)
    corrections = np.frombuffer(os.urandom(correction_bytes(params, count)), np.uint8)
    first = (1 << 39) - 2048  # the AES counter passes 2^32
    want = cpu.cots(first, count, corrections)
    assert torch.equal(cuda.cots(first, count, corrections).cpu(), want)


@pytest.mark.parametrize("shapes", [
    *MIXED,
    [Shape(False, 5, 1, 256, 64), Shape(False, 20_000, 4, 1, 2), Shape(True, 777, 1, 1, 1)],
    [Shape(False, 10_000, 8, 1, 37), Shape(True, 20_000, 22, 1, 40), Shape(False, 33, 3, 1, 13)],
    [Shape(True, 1, 64, 1, 64), Shape(True, 2, 1, 256, 64), Shape(True, 100, 46, 64, 47)],
])  # fmt: skip
def test_answers(shapes: list[Shape]) -> None:
    asked = Asked.of(shapes)
    want, got = asked.answered(cpu_math()), asked.answered(device_math("cuda"), "cuda")
    assert np.array_equal(got.packed, want.packed)
    for result, wanted in zip(got.results, want.results, strict=True):
        assert (result is None) == (wanted is None)
        assert result is None or wanted is None or torch.equal(result, wanted)


def test_random_messages() -> None:
    keys = random_values((5000, 2))
    want = cpu_math().random_pairs(keys, 3000, 37)
    got = device_math("cuda").random_pairs(keys.to(CUDA), 3000, 37)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_triton_passes_equal_their_twins() -> None:
    from otpipe.ot import triton_ops

    bases, offsets = (random_values((n, 2)).view(torch.int32).to(CUDA) for n in (50, 8))
    keys = expand_keys(np.frombuffer(os.urandom(16), np.uint8)[None])
    planes = torch.from_numpy(key_planes(keys)[0]).contiguous().to(CUDA)
    flips = random_choices(50, 3).long().to(CUDA)
    arguments = (bases, offsets, planes, (1 << 40) - 60, 3, flips, blocks_per_pad(3, 64))
    assert torch.equal(triton_ops.hash_all(*arguments), torch_ops.hash_all(*arguments))
    rows = random_values((128, 80)).view(torch.int32).to(CUDA)
    assert torch.equal(triton_ops.transposed(rows), torch_ops.transposed(rows))
    for words, bits in ((1, 1), (2, 64), (3, 43), (5, 37), (128, 1), (16, 8), (256, 64)):
        pads = random_values((999, 2 * blocks_per_pad(words, bits))).to(CUDA)
        got, want = (ops.pad_words(pads, words, bits) for ops in (triton_ops, torch_ops))
        assert torch.equal(got, want)
    for index_bits in range(1, 9):
        own = random_values((77 * index_bits, 2)).to(CUDA)
        got, want = (ops.combined(own, index_bits) for ops in (triton_ops, torch_ops))
        assert torch.equal(got, want)
    for bits in range(1, 65):
        values = random_values((1001,), bits).to(CUDA)
        assert torch.equal(triton_ops.pack(values, bits), torch_ops.pack(values, bits))


def test_sessions_with_a_sender_on_cuda() -> None:
    pair = make_pair(device="cuda")
    correlation, table = random_values((5000, 3), 44), random_values((700, 256, 2), 37)
    choice, index = random_choices(5000), random_choices(700, 8)
    sent, got = both(
        lambda: pair.sender.exchange([
            SendCorrelated(correlation.cuda(), 44), SendOneOfMany(table.cuda(), 37)
        ]),
        lambda: pair.receiver.exchange([
            ReceiveCorrelated(choice, 44, 3), ReceiveOneOfMany(index, 8, 37, 2)
        ]),
    )  # fmt: skip
    assert sent[0] is not None
    assert sent[0].is_cuda
    assert torch.equal(got[0], reduced(sent[0].cpu() + choice[:, None] * correlation, 44))
    assert torch.equal(got[1], table[torch.arange(700), index.long()])
    (m0, m1), (random, chosen) = both(
        lambda: pair.sender.send_random(3000, 64), lambda: pair.receiver.receive_random(3000, 64)
    )
    assert torch.equal(chosen, torch.where(random.bool(), m1.cpu(), m0.cpu()))


def test_tensors_of_another_device_are_refused() -> None:
    sender = make_pair(device="cuda").sender
    with pytest.raises(ValueError, match=r"torch.int64 on cpu; this session wants int64 on cuda:0"):
        sender.send_correlated(torch.zeros(1, dtype=torch.int64), 8)
