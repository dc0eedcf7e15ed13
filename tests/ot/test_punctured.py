"""Trees of seeds: the sender learns all leaves but one, and nothing tells which."""

from __future__ import annotations

import os

import numpy as np
import pytest
from Crypto.Cipher import AES
from ot_helpers import looks_uniform

from otpipe.ot.punctured import choices_for, grow_trees, punctured_leaves


def transferred(
    depths: tuple[int, ...], indices: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leaves of both sides and the message, with ideal base OTs."""
    count = sum(depths)
    keys = [(os.urandom(16), os.urandom(16)) for _ in range(count)]
    leaves, message = grow_trees(depths, keys)
    choices = choices_for(depths, indices)
    chosen = [pair[choice] for pair, choice in zip(keys, choices, strict=True)]
    return leaves, punctured_leaves(depths, indices, chosen, message), message


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_index_of_small_trees(depth: int) -> None:
    for index in range(1 << depth):
        leaves, punctured, message = transferred((depth,), [index])
        same = (leaves == punctured).all(axis=1)
        assert same.tolist() == [leaf != index for leaf in range(1 << depth)]
        assert not punctured[index].any()
        assert message.shape == (2 * depth, 16)


def test_trees_of_different_depths() -> None:
    depths, indices = (5, 5, 3, 8), [31, 0, 5, 200]
    leaves, punctured, _ = transferred(depths, indices)
    differs = np.flatnonzero((leaves != punctured).any(axis=1))
    assert differs.tolist() == [31, 32, 64 + 5, 72 + 200]


def test_nodes_are_aes_of_their_parent() -> None:
    """Zero keys leave the sums of the message bare: those of level one are its two nodes."""
    leaves, message = grow_trees((2,), [(bytes(16), bytes(16))] * 2)
    left, right = message[0].tobytes(), message[1].tobytes()
    grandchildren = [
        AES.new(node, AES.MODE_ECB).encrypt(counter.to_bytes(16, "little"))
        for node in (left, right)
        for counter in (0, 1)
    ]
    sums = [bytes(a ^ b for a, b in zip(*grandchildren[side::2], strict=True)) for side in (0, 1)]
    assert [message[2].tobytes(), message[3].tobytes()] == sums
    assert [leaf.tobytes() for leaf in leaves] == grandchildren


def test_the_unknown_leaf_is_not_in_reach_of_wrong_keys() -> None:
    """Without the other base OT key no sum of the message opens to anything about the leaf."""
    for index in range(8):
        leaves, punctured, message = transferred((3,), [index])
        unknown = leaves[index]
        assert not (message == unknown).all(axis=1).any()
        assert not (punctured == unknown).all(axis=1).any()
        assert not (np.bitwise_xor.reduce(punctured, axis=0) == unknown).all()


def test_the_message_looks_uniform_and_trees_are_fresh() -> None:
    depths = (4,) * 32
    messages = [transferred(depths, [index] * 32)[2] for index in (0, 15) for _ in range(10)]
    assert looks_uniform(np.concatenate(messages))
    first, second = (grow_trees((2,), [(bytes(16),) * 2] * 2)[0] for _ in range(2))
    assert not (first == second).all(axis=1).any()


def test_choices_are_the_other_side_of_the_path() -> None:
    assert choices_for((3,), [0b110]) == [0, 0, 1]
    assert choices_for((2, 1), [0, 1]) == [1, 1, 0]
