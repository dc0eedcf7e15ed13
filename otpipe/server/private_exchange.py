"""One exchange of the preparation with private weights, on the rank that owns the map.

MASKED_BEGIN, a turn, OLE_READY, the client's ciphertexts block by block, then the answers. See
docs/private_preprocessing.md; the masks of a finished exchange go into the rank's ledger.
"""

from __future__ import annotations

import time

import torch

from otpipe.crypto.private_evaluate import PrivateEvaluator
from otpipe.crypto.private_params import MIN_SLOTS, PrivatePacking, choose_packing
from otpipe.errors import ConnectionLost, ProtocolError
from otpipe.protocol.messages import (
    A_KEY_BYTES,
    MAX_OLE_BLOCK_BYTES,
    MessageType,
    OleAnswer,
    OleBlock,
    OleReady,
    send_message,
)
from otpipe.protocol.private_messages import BATCH_ID_BYTES, MaskedBegin
from otpipe.protocol.wire import MIN_BYTES_PER_S, FrameConnection
from otpipe.protocol.wire_channel import peer_error
from otpipe.server.private_rank import PARAMS, PrivateRank

ANSWER_FRAME_BYTES = 2 << 20
"""Of answers; a client decrypts one frame while the next arrives."""

SLACK_S = 30.0
"""Waiting that an exchange of any size may cost the server, beyond what its bytes take."""

MAX_SLOTS = 2048
"""Of a batch, as the store of a client holds them."""


def serve_exchange(connection: FrameConnection, rank: PrivateRank, request: MaskedBegin) -> None:
    """Serve one exchange whose MASKED_BEGIN has arrived.

    Raises:
        ProtocolError: the request or a block is not what may come.
        ConnectionLost: the client is gone, or too slow.
    """
    packing = _checked(rank, request)
    if not rank.ole_turns.take(connection.peer_has_left):
        raise ConnectionLost("it did not wait for its turn to prepare")
    try:
        exchange = rank.ledger.new_exchange(request.batch, request.map_index, request.num_slots)
        weights = rank.weights[request.map_index]
        evaluator = PrivateEvaluator(
            weights.weight,
            weights.multipliers,
            packing,
            request.map_index,
            request.a_key,
            exchange.stream,
        )
        send_message(connection, OleReady(request.map_index))
        _receive_blocks(connection, rank, packing, request.map_index, evaluator)
        # Before the client has the last answer, after which it may use the slots. An exchange that
        # breaks off here is repeated under another key, which takes the place of this one.
        rank.ledger.finish(exchange)
        for first, answers in evaluator.answers(max(ANSWER_FRAME_BYTES, packing.answer_bytes)):
            message = OleAnswer(request.map_index, first, len(answers))
            send_message(connection, message, answers.reshape(-1).numpy())
    finally:
        rank.ole_turns.give_back()


def _checked(rank: PrivateRank, request: MaskedBegin) -> PrivatePacking:
    """The packing of a request that may be served."""
    if request.map_index not in rank.weights:
        raise ProtocolError(
            f"map {request.map_index} was asked for on rank {rank.rank}, which has "
            f"{sorted(rank.weights)}"
        )
    slots = request.num_slots
    if not MIN_SLOTS <= slots <= MAX_SLOTS or slots & (slots - 1):
        raise ProtocolError(
            f"a batch of {slots} slots was asked for; a power of two from {MIN_SLOTS} to "
            f"{MAX_SLOTS} is allowed"
        )
    for name, due in (("batch", BATCH_ID_BYTES), ("a_key", A_KEY_BYTES)):
        found = len(getattr(request, name))
        if found != due:
            raise ProtocolError(f"{name} has {found} bytes; {due} are due")
    shape = rank.description.maps[request.map_index]
    return choose_packing(PARAMS, shape.in_features, shape.out_features, slots)


def _receive_blocks(
    connection: FrameConnection,
    rank: PrivateRank,
    packing: PrivatePacking,
    map_index: int,
    evaluator: PrivateEvaluator,
) -> None:
    """Take the key and the encrypted pads, in order and at a lowest pace."""
    params = packing.params
    polynomial_bytes = params.ring_degree * params.upload_bytes
    shape = rank.description.maps[map_index]
    total = packing.num_polynomials(shape.in_features)
    patience_s = SLACK_S + total * polynomial_bytes / MIN_BYTES_PER_S
    received = 0
    buffer = torch.empty(0, dtype=torch.uint8)
    while received < total:
        started_s = time.monotonic()
        message_type, header, announced = connection.receive_head()
        if message_type == MessageType.ERROR:
            raise peer_error("client", header)
        if message_type != MessageType.OLE_BLOCK:
            raise ProtocolError(
                f"message type {message_type} arrived inside a preprocessing exchange; only "
                "OLE_BLOCK may follow until all polynomials are sent"
            )
        block = OleBlock.parse(header)
        most = min(total - received, MAX_OLE_BLOCK_BYTES // polynomial_bytes)
        if block.first != received or not 1 <= block.count <= most:
            raise ProtocolError(
                f"polynomials {block.first} to {block.first + block.count} arrived; due are "
                f"{received} to at most {received + most}"
            )
        if buffer.numel() < block.count * polynomial_bytes:
            pinned = rank.device.type == "cuda"
            buffer = torch.empty(
                block.count * polynomial_bytes, dtype=torch.uint8, pin_memory=pinned
            )
        memory = buffer[: block.count * polynomial_bytes]
        payload = connection.receive_payload(
            announced,
            memory.numel(),
            lambda _, memory=memory: memory.numpy(),  # type: ignore[misc]
        )
        rank.audit(payload)
        patience_s -= time.monotonic() - started_s
        if patience_s < 0:
            raise ProtocolError(
                f"the blocks of map {map_index} came more slowly than {MIN_BYTES_PER_S} bytes/s; "
                "prepare over a faster line"
            )
        evaluator.add_block(
            received, memory.view(block.count, params.ring_degree, params.upload_bytes)
        )
        received += block.count
