"""SoftSpokenOT: q = t + u Delta for every k, on every path, at any position."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ot_helpers import looks_uniform

from otpipe.errors import ParameterError
from otpipe.kernels import aes_native
from otpipe.ot import extension_kernels
from otpipe.ot.extension import TreeLayout, blocks_of, correction_bytes, rounded
from otpipe.ot.extension_cpu import CpuExtensionReceiver, CpuExtensionSender
from otpipe.ot.handshake import SenderSecrets
from otpipe.ot.pads import TweakLedger
from otpipe.ot.params import OT_PARAMS, OtParams
from otpipe.ot.sender_device import DeviceSenderMath
from otpipe.ot.torch_ops import transposed

PATHS = [False] + ([True] if aes_native.NATIVE else [])


def ideal_seeds(
    params: OtParams, delta: bytes
) -> tuple[TreeLayout, NDArray[np.uint8], NDArray[np.uint8]]:
    """Layout, all leaves, and those of the sender, which lacks one of each tree."""
    layout = TreeLayout.of(params)
    leaves = np.frombuffer(os.urandom(16 * params.num_leaves), np.uint8).reshape(-1, 16)
    punctured = leaves.copy()
    punctured[layout.leaf_starts[:-1] + np.array(layout.delta_indices(delta))] = 0
    return layout, leaves, punctured


def holds(
    q: NDArray[np.uint64], t: NDArray[np.uint64], choices: NDArray[np.uint8], delta: bytes
) -> bool:
    offset = choices[:, None].astype(np.uint64) * np.frombuffer(delta, np.uint64)
    return np.array_equal(q, t ^ offset)


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
def test_correlation(params: OtParams, native: bool) -> None:
    delta = os.urandom(16)
    layout, leaves, punctured = ideal_seeds(params, delta)
    receiver = CpuExtensionReceiver(layout, leaves, native)
    sender = CpuExtensionSender(layout, punctured, delta, native)
    count = 4096 if native else 2048
    t, choices, corrections = receiver.block(2048, count)
    assert corrections.nbytes == correction_bytes(params, count)
    assert holds(sender.block(2048, count, corrections), t, choices, delta)
    assert abs(int(choices.sum()) - count / 2) < 6 * count**0.5 / 2
    assert not holds(sender.block(2048, count, corrections), t, choices, os.urandom(16))


@pytest.mark.skipif(not aes_native.NATIVE, reason="no AES instructions")
def test_compiled_and_portable_paths_agree_and_positions_are_absolute() -> None:
    params = OT_PARAMS["softspoken3"]
    layout, leaves, _ = ideal_seeds(params, bytes(16))
    first = (1 << 39) - 2048  # the AES counter passes 2^32
    whole = CpuExtensionReceiver(layout, leaves, True).block(first, 4096)
    halves = [
        CpuExtensionReceiver(layout, leaves, False).block(first + at, 2048) for at in (0, 2048)
    ]
    for i, axis in ((0, 0), (1, 0), (2, 1)):
        assert np.array_equal(whole[i], np.concatenate([half[i] for half in halves], axis))


@pytest.mark.parametrize("delta", [bytes(16), b"\xff" * 16, bytes(15) + b"\x80"])
def test_extreme_deltas(delta: bytes) -> None:
    params = OT_PARAMS["softspoken5"]
    layout, leaves, punctured = ideal_seeds(params, delta)
    t, choices, corrections = CpuExtensionReceiver(layout, leaves).block(0, 2048)
    sender = CpuExtensionSender(layout, punctured, delta)
    assert holds(sender.block(0, 2048, corrections), t, choices, delta)


def test_the_senders_unknown_leaves_do_not_matter() -> None:
    delta = os.urandom(16)
    params = OT_PARAMS["softspoken4"]
    layout, leaves, punctured = ideal_seeds(params, delta)
    corrections = np.zeros((params.num_trees - 1, 2048 // 64), np.uint64)
    results = [
        CpuExtensionSender(layout, seeds, delta).block(0, 2048, corrections)
        for seeds in (leaves, punctured)
    ]
    assert np.array_equal(*results)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_torch_twin(k: int) -> None:
    params = OT_PARAMS[f"softspoken{k}"]
    delta = os.urandom(16)
    layout, _, punctured = ideal_seeds(params, delta)
    corrections = np.frombuffer(os.urandom(correction_bytes(params, 2048)), np.uint8)
    secrets = SenderSecrets(delta, punctured, b"session")
    twin = DeviceSenderMath(secrets, layout, TweakLedger(params), torch.device("cpu"))
    first = (1 << 39) + 2048
    got = twin.cots(first, 2048, corrections).numpy().view(np.uint64)
    words = corrections.view(np.uint64).reshape(-1, 32)
    assert np.array_equal(
        got, CpuExtensionSender(layout, punctured, delta).block(first, 2048, words)
    )


def test_transposition_moves_every_bit() -> None:
    rows = np.frombuffer(os.urandom(128 * 16 * 8), np.uint64).reshape(128, 16)
    out = np.empty((16 * 64, 2), np.uint64)
    extension_kernels.transpose_bits(rows, out)
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(bits.T, np.unpackbits(out.view(np.uint8), axis=1, bitorder="little"))
    twin = transposed(torch.from_numpy(rows.view(np.int32).copy()))
    assert np.array_equal(twin.numpy().view(np.uint64), out)


@pytest.mark.parametrize("params", OT_PARAMS.values(), ids=lambda params: params.name)
def test_the_sender_sees_uniform_corrections(params: OtParams) -> None:
    """Each is masked by a stream that the sender lacks; together with all it knows, still."""
    delta = os.urandom(16)
    layout, leaves, punctured = ideal_seeds(params, delta)
    t, choices, corrections = CpuExtensionReceiver(layout, leaves).block(0, 4096)
    assert looks_uniform(corrections.view(np.uint8))
    q = CpuExtensionSender(layout, punctured, delta).block(0, 4096, corrections)
    assert looks_uniform(q.view(np.uint8))
    assert looks_uniform(t.view(np.uint8))
    # no row of the corrections is the choices, or their complement
    packed = np.packbits(choices, bitorder="little")
    distance = np.bitwise_count(corrections.view(np.uint8) ^ packed).sum(axis=1)
    assert (abs(distance.astype(int) - 2048) < 6 * 32).all()


def test_secret_bits_are_spread_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's unpackbits reads a table at each byte, here of the choices and of Delta."""
    row = np.frombuffer(os.urandom(8 * 32), np.uint64)
    spread = np.empty(2048, np.uint8)
    extension_kernels.spread_bits(row, spread)
    assert np.array_equal(spread, np.unpackbits(row.view(np.uint8), bitorder="little"))

    def table(*args: object, **options: object) -> None:
        raise AssertionError("a secret was looked up in a table")

    monkeypatch.setattr(np, "unpackbits", table)
    params, delta = OT_PARAMS["softspoken4"], os.urandom(16)
    layout, leaves, punctured = ideal_seeds(params, delta)
    t, choices, corrections = CpuExtensionReceiver(layout, leaves).block(0, 2048)
    q = CpuExtensionSender(layout, punctured, delta).block(0, 2048, corrections)
    assert holds(q, t, choices, delta)


def test_layout_covers_128_bits() -> None:
    for params in OT_PARAMS.values():
        layout = TreeLayout.of(params)
        assert sum(layout.depths) == 128
        assert len(layout.tree_of_row) == 128
        assert layout.leaf_starts[-1] == params.num_leaves
        delta = os.urandom(16)
        indices = layout.delta_indices(delta)
        value = sum(i << int(at) for i, at in zip(indices, layout.row_starts, strict=False))
        assert value == int.from_bytes(delta, "little")


def test_block_sizes() -> None:
    assert rounded(0) == 0
    assert rounded(1) == 2048
    assert blocks_of(0) == []
    assert blocks_of(2049) == [4096]
    assert blocks_of((1 << 18) + 1) == [1 << 18, 2048]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k = 0; use 1 \(IKNP\) to 8"),
        ({"k": 9}, r"k = 9; use 1 \(IKNP\) to 8"),
        ({"k": 4, "kappa": 80}, "asks for 80 bits over P-256; use 128 bits over P-256"),
        ({"k": 4, "group": "secp160r1"}, "over secp160r1; use 128 bits over P-256"),
        ({"k": 4, "log2_epoch": 9}, "keep 10 <= epoch <= session and 11 <= ses"),
        ({"k": 4, "log2_max_cots": 41}, r"2\^41 a session; keep"),
        ({"k": 4, "log2_epoch": 10, "log2_max_cots": 10}, r"2\^10 a session; keep"),
        ({"k": 4, "log2_epoch": 20, "log2_max_cots": 19}, r"2\^19 a session; keep"),
    ],
)
def test_sets_outside_the_table_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        OtParams("made up", **options)  # type: ignore[arg-type]
