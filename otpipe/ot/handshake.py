"""Setup of an OT session: base OTs in the reverse direction, then the seeds. One round.

    sender -> receiver   hello, nonce, 128 pairs of points (base OT, the sender of the extension
                         receives: its choices are Delta)
    receiver -> sender   hello, nonce, point, masked sums of the receiver's trees

Both nonces bind the keys of the base OTs and name the session in the hash.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from otpipe.errors import ProtocolError
from otpipe.ot.base_ot import BaseOtReceiver, send_base_ots
from otpipe.ot.channel import Bytes, Channel
from otpipe.ot.curve import POINT_BYTES
from otpipe.ot.extension import TreeLayout
from otpipe.ot.params import BLOCK_BYTES, OtParams
from otpipe.ot.punctured import choices_for, grow_trees, punctured_leaves

VERSION = 1
NONCE_BYTES = 32
HELLO_BYTES = 4 + NONCE_BYTES

_SENDER_LABEL = "ot.setup.sender@0"
_RECEIVER_LABEL = "ot.setup.receiver@0"


@dataclass(frozen=True)
class SenderSecrets:
    """What the sender has after setup: Delta (16 bytes) and all leaves but those at its indices."""

    delta: bytes = field(repr=False)
    leaves: Bytes = field(repr=False)
    session: bytes


@dataclass(frozen=True)
class ReceiverSecrets:
    """What the receiver has after setup: all leaves, (leaves, 16)."""

    leaves: Bytes = field(repr=False)
    session: bytes


def set_up_sender(channel: Channel, params: OtParams) -> SenderSecrets:
    """The sender's side.

    Raises:
        ProtocolError: another version or parameter set, or a malformed point.
    """
    layout = TreeLayout.of(params)
    delta = os.urandom(BLOCK_BYTES)
    indices = layout.delta_indices(delta)
    nonce = os.urandom(NONCE_BYTES)
    base = BaseOtReceiver(choices_for(layout.depths, indices), nonce)
    _send(channel, _SENDER_LABEL, _hello(params) + nonce + base.first_message)

    num_sums = 2 * params.kappa
    size = HELLO_BYTES + POINT_BYTES + num_sums * BLOCK_BYTES
    reply = channel.receive(_RECEIVER_LABEL, size).tobytes()
    session = nonce + _peer_nonce(reply, params, "receiver")
    point = reply[HELLO_BYTES : HELLO_BYTES + POINT_BYTES]
    sums = np.frombuffer(reply[HELLO_BYTES + POINT_BYTES :], np.uint8).reshape(num_sums, -1)
    keys = base.keys(point, session)
    leaves = punctured_leaves(layout.depths, indices, keys, sums)
    return SenderSecrets(delta, leaves, session)


def set_up_receiver(channel: Channel, params: OtParams) -> ReceiverSecrets:
    """The receiver's side; raises as ``set_up_sender``."""
    layout = TreeLayout.of(params)
    size = HELLO_BYTES + 2 * params.kappa * POINT_BYTES
    first = channel.receive(_SENDER_LABEL, size).tobytes()
    sender_nonce = _peer_nonce(first, params, "sender")
    nonce = os.urandom(NONCE_BYTES)
    session = sender_nonce + nonce
    base_keys, point = send_base_ots(first[HELLO_BYTES:], sender_nonce, session)
    leaves, sums = grow_trees(layout.depths, base_keys)
    _send(channel, _RECEIVER_LABEL, _hello(params) + nonce + point + sums.tobytes())
    return ReceiverSecrets(leaves, session)


def _hello(params: OtParams) -> bytes:
    return bytes([ord("O"), ord("T"), VERSION, params.k])


def _peer_nonce(message: bytes, params: OtParams, peer: str) -> bytes:
    own = _hello(params)
    if message[:3] != own[:3]:
        raise ProtocolError(
            f"The {peer} does not speak version {VERSION} of the OT setup; "
            f"use the same release of otpipe on both sides."
        )
    if message[3] != params.k:
        raise ProtocolError(
            f"The {peer} uses SoftSpokenOT with k = {message[3]}, this side k = {params.k}; "
            f"use the same OT parameters on both sides."
        )
    return message[4:HELLO_BYTES]


def _send(channel: Channel, label: str, payload: bytes) -> None:
    channel.send(label, np.frombuffer(payload, np.uint8))
