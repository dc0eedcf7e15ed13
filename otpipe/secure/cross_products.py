"""One preparation over a channel: shares of X Y, X the server's matrix, Y the client's.

The client sends its encrypted matrix, the server answers. Nothing here is a step of a program: a
preparation runs between programs, on the channel of a party whose rounds are done.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from otpipe.crypto.private_matmul import (
    ANSWER_BLOCK_BYTES,
    UPLOAD_BLOCK,
    MatmulParams,
    Piece,
    ProductPlan,
    ProductServer,
    client_share,
    upload,
)
from otpipe.crypto.private_rlwe import PrivateSecret
from otpipe.crypto.randomness import KEY_BYTES
from otpipe.crypto.rlwe import BatchSecret
from otpipe.ot.channel import Channel


class CrossProducts:
    """One party of one preparation. The client's secrets and its a_key are dropped with it.

    Args:
        is_server: which party.
        channel: to the other one.
        number: of this preparation of its text, the same at both parties.
    """

    def __init__(self, is_server: bool, channel: Channel, number: int) -> None:
        self._is_server, self._channel = is_server, channel
        self._label = f"{number}.{{}}"
        self._messages = self._exchanges = 0
        self._secrets: dict[MatmulParams, PrivateSecret] = {}
        if is_server:
            received = channel.receive(self._next("products.key"), KEY_BYTES)
            self._a_key = received.tobytes()
        else:
            self._a_key = os.urandom(KEY_BYTES)
            channel.send(self._next("products.key"), np.frombuffer(self._a_key, np.uint8).copy())

    def multiply(self, factors: Sequence[tuple[ProductPlan, Tensor]]) -> list[Tensor]:
        """Own shares of several products X Y, int64 (m, T) in [0, 2^k) of each plan's set, CPU.

        All in one round: the client sends everything, then the server does. So the server works
        on one product while the client encrypts the next, and holds the answers meanwhile, and the
        uploads that it has not worked on.

        factors: plans, and of each the own factor, int64 in [0, 2^k): X (m, n) at the server, on
        the device that computes; Y (n, T) at the client, CPU.

        Raises:
            ProtocolError: the peer sent something else than is due.
        """
        parts = [(plan, piece, own) for plan, own in factors for piece in plan.pieces]
        shares = iter(self._serve(parts) if self._is_server else self._ask(parts))
        return [torch.cat([next(shares) for _ in plan.pieces], 1) for plan, _ in factors]

    def _ask(self, parts: Sequence[tuple[ProductPlan, Piece, Tensor]]) -> list[Tensor]:
        for plan, piece, y_nT in parts:
            self._exchanges += 1
            secret = self._secret(plan.params)
            for block in upload(secret, plan, piece, self._a_key, self._exchanges, y_nT):
                self._channel.send(self._next("products.upload"), block.reshape(-1))
        return [self._received_share(plan, piece) for plan, piece, _ in parts]

    def _received_share(self, plan: ProductPlan, piece: Piece) -> Tensor:
        packing = piece.packing
        answers = np.empty((packing.num_answers(plan.rows), packing.answer_bytes), np.uint8)
        step = max(1, ANSWER_BLOCK_BYTES // packing.answer_bytes)
        for lo in range(0, len(answers), step):
            part = answers[lo : lo + step]
            received = self._channel.receive(self._next("products.answers"), part.size)
            part[:] = received.reshape(part.shape)
        return client_share(self._secret(plan.params), plan, piece, answers)

    def _secret(self, params: MatmulParams) -> PrivateSecret:
        if params not in self._secrets:
            self._secrets[params] = BatchSecret.generate(params)
        return self._secrets[params]

    def _serve(self, parts: Sequence[tuple[ProductPlan, Piece, Tensor]]) -> list[Tensor]:
        arrived: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        plans = [(plan, piece) for plan, piece, _ in parts]
        threading.Thread(
            target=self._receive_uploads, args=(plans, arrived), name="uploads", daemon=True
        ).start()
        held: list[Tensor] = []
        shares = []
        for plan, piece, x_mn in parts:
            self._exchanges += 1
            server = ProductServer(x_mn, plan, piece, self._a_key, self._exchanges)
            for at, _ in _upload_blocks(plan, piece):
                block = arrived.get()
                if isinstance(block, BaseException):
                    raise block
                server.add_block(at, block)
            held += [answers for _, answers in server.answers()]
            shares.append(server.share())
        for answers in held:
            self._channel.send(self._next("products.answers"), answers.reshape(-1).numpy())
        return shares

    def _receive_uploads(
        self,
        plans: Sequence[tuple[ProductPlan, Piece]],
        arrived: queue.SimpleQueue[Tensor | BaseException],
    ) -> None:
        """Take all uploads of a round as they come, in a thread of its own.

        A product may take longer to compute than a peer may leave bytes unread. Nothing is sent
        meanwhile. Ends with the connection.
        """
        try:
            for plan, piece in plans:
                for _, count in _upload_blocks(plan, piece):
                    shape = (count, plan.params.ring_degree, plan.params.upload_bytes)
                    received = self._channel.receive(
                        self._next("products.upload"), math.prod(shape)
                    )
                    arrived.put(torch.from_numpy(received.reshape(shape)))
        except BaseException as error:
            arrived.put(error)

    def _next(self, kind: str) -> str:
        self._messages += 1
        return f"{kind}@" + self._label.format(self._messages)


def _upload_blocks(plan: ProductPlan, piece: Piece) -> Iterator[tuple[int, int]]:
    """First polynomial and number of the blocks of an upload; the key comes alone."""
    total = piece.packing.num_polynomials(plan.inputs)
    at, count = 0, 1
    while at < total:
        yield at, count
        at += count
        count = min(UPLOAD_BLOCK, total - at)
