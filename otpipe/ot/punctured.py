"""All but one of 2^d seeds: a punctured GGM tree, from d oblivious transfers.

The receiver of the extension draws a root and grows a binary tree; the sender of the extension
learns every leaf but one, at an index of its own, and the receiver does not learn which. That is
the (2^d - 1)-of-2^d OT that SoftSpokenOT starts from (Roy, CRYPTO 2022; the tree is that
of Goldreich, Goldwasser, Micali 1986, transferred level by level as in Boyle et al., CCS 2019).

For each level the receiver sends two sums, of all left and of all right children, each masked by
one key of a base OT. The sender, whose path goes to side a at that level, knows all other nodes of
the level above, so that the sum of side 1 - a gives it the sibling of its path: it chooses 1 - a.

A node s has the children AES_s(0) and AES_s(1). Node bits: the first level is the highest bit.
"""

from __future__ import annotations

import os

import numpy as np
from Crypto.Cipher import AES
from numpy.typing import NDArray

from otpipe.ot.params import BLOCK_BYTES

Blocks = NDArray[np.uint8]  # (., 16)

_TWO_COUNTERS = bytes(BLOCK_BYTES) + (1).to_bytes(BLOCK_BYTES, "little")


def grow_trees(
    depths: tuple[int, ...], base_keys: list[tuple[bytes, bytes]]
) -> tuple[Blocks, Blocks]:
    """The receiver's side: fresh trees, and what the sender needs to know all leaves but one.

    Args:
        depths: levels of each tree.
        base_keys: both keys of each base OT, sum(depths) of them, in order of trees and levels.

    Returns:
        Leaves of all trees, one after the other, (leaves, 16); the message, (2 sum(depths), 16).
    """
    leaves, message = [], []
    keys = iter(base_keys)
    for depth in depths:
        nodes = np.frombuffer(os.urandom(BLOCK_BYTES), np.uint8).reshape(1, BLOCK_BYTES)
        for _ in range(depth):
            nodes = _children(nodes)
            for side, key in enumerate(next(keys)):
                total = np.bitwise_xor.reduce(nodes[side::2], axis=0)
                message.append(total ^ np.frombuffer(key, np.uint8))
        leaves.append(nodes)
    return np.concatenate(leaves), np.stack(message)


def choices_for(depths: tuple[int, ...], indices: list[int]) -> list[int]:
    """The sender's choices in the base OTs, so that leaf ``indices[tree]`` stays unknown."""
    return [
        1 - ((index >> level) & 1)
        for depth, index in zip(depths, indices, strict=True)
        for level in reversed(range(depth))
    ]


def punctured_leaves(
    depths: tuple[int, ...], indices: list[int], chosen_keys: list[bytes], message: Blocks
) -> Blocks:
    """The sender's side: leaves of all trees, (leaves, 16), with zeros at each unknown leaf.

    Args:
        depths: levels of each tree.
        indices: the unknown leaf of each tree.
        chosen_keys: results of the base OTs with ``choices_for``.
        message: the receiver's, (2 sum(depths), 16).
    """
    leaves = []
    at = 0
    for depth, index in zip(depths, indices, strict=True):
        nodes = np.zeros((1, BLOCK_BYTES), np.uint8)  # the node on the path is kept at zero
        for level in reversed(range(depth)):
            above, side = index >> (level + 1), 1 - ((index >> level) & 1)
            nodes = _children(nodes)
            nodes[2 * above : 2 * above + 2] = 0
            masked = message[2 * at + side] ^ np.frombuffer(chosen_keys[at], np.uint8)
            nodes[2 * above + side] = masked ^ np.bitwise_xor.reduce(nodes[side::2], axis=0)
            at += 1
        leaves.append(nodes)
    return np.concatenate(leaves)


def _children(nodes: Blocks) -> Blocks:
    """(m, 16) -> (2 m, 16)."""
    grown = b"".join(AES.new(node.tobytes(), AES.MODE_ECB).encrypt(_TWO_COUNTERS) for node in nodes)
    return np.frombuffer(bytearray(grown), np.uint8).reshape(-1, BLOCK_BYTES)
