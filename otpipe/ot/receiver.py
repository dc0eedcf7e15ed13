"""The receiver's side of an OT session (the client's)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from otpipe.ot.channel import Channel
from otpipe.ot.extension import U64, TreeLayout, blocks_of, rounded
from otpipe.ot.extension_cpu import CpuExtensionReceiver
from otpipe.ot.handshake import set_up_receiver
from otpipe.ot.masks_cpu import ChoiceBits, CpuMasks, Message, Part, pad_words
from otpipe.ot.pads import TweakLedger, blocks_per_pad
from otpipe.ot.pads_cpu import CpuHash
from otpipe.ot.params import DEFAULT_OT_PARAMS, OtParams
from otpipe.ot.plan import MESSAGE_BYTES, Shape, answer_messages
from otpipe.ot.pool import CotPool
from otpipe.ot.requests import (
    Choices,
    ReceiveChosen,
    ReceiveCorrelated,
    ReceiveOneOfMany,
    ReceiverRequest,
)
from otpipe.ot.turn import Turn


class OtReceiver:
    """Receives oblivious transfers; has the choices. One per connection, one thread at a time.

    The mirror image of :class:`otpipe.ot.sender.OtSender`, which says what a call may raise.
    Computes on the CPU; the pool takes 17 bytes a COT.
    """

    def __init__(self, channel: Channel, params: OtParams = DEFAULT_OT_PARAMS) -> None:
        """``channel`` to the sender; ``params`` the same as the sender's."""
        self.params = params
        self._channel = channel
        self._turn = Turn("OtReceiver")
        self._pool: CotPool[np.ndarray] = CotPool(params, np.concatenate)
        self._extension: CpuExtensionReceiver | None = None
        self._masks: CpuMasks | None = None

    @property
    def available(self) -> int:
        """COTs in the pool."""
        return self._pool.available

    @property
    def taken(self) -> int:
        """COTs that calls have used so far."""
        return self._pool.num_taken

    def setup(self) -> None:
        """Base OTs and seeds; once, before anything else."""
        with self._turn.call("setup"):
            secrets = set_up_receiver(self._channel, self.params)
            self._extension = CpuExtensionReceiver(TreeLayout.of(self.params), secrets.leaves)
            self._masks = CpuMasks(CpuHash(secrets.session, TweakLedger(self.params)))

    def extend(self, count: int) -> None:
        """Add ``count`` COTs, rounded up to a multiple of 2048; bytes go to the sender only."""
        if count < 0:
            raise ValueError(f"A pool is extended by at least 0 COTs, not {count}.")
        with self._turn.call("extend"):
            self._extend(count)

    def exchange(self, requests: Sequence[ReceiverRequest]) -> list[Tensor]:
        """Several requests in one round.

        Returns:
            int64 (n,), or (n, words) where the request names words.

        Raises:
            ValueError: choices of another shape or dtype than wanted, or out of range.
        """
        shapes = [_shape(request) for request in requests]
        choices = [
            _checked(request, shape) for request, shape in zip(requests, shapes, strict=True)
        ]
        results = [np.empty((shape.count, shape.words), np.uint64) for shape in shapes]
        with self._turn.call("exchange"):
            self._receive(shapes, choices, results)
        return [
            torch.from_numpy(result.view(np.int64)[:, 0] if request.words is None else
                             result.view(np.int64))
            for request, result in zip(requests, results, strict=True)
        ]  # fmt: skip

    def receive_random(self, n: int, bits: int) -> tuple[Tensor, Tensor]:
        """Random OT, without a message unless the pool is too small.

        Returns:
            choice uint8 (n,), uniform, and m_choice int64 (n,), uniform mod 2^bits.
        """
        Shape(correlated=False, count=n, index_bits=1, words=1, bits=bits)
        if n < 0:
            raise ValueError(f"A random OT makes at least 0 transfers, not {n}.")
        with self._turn.call("receive_random"):
            if n == 0:
                return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
            self._extend(max(0, n - self._pool.available))
            first, (keys, choices) = self._pool.take(n)
            assert self._masks is not None
            pads = self._masks.chosen_pads(keys, choices, first, 1, blocks_per_pad(1, bits))
            values = pad_words(pads, 1, bits)[:, 0]
            return torch.from_numpy(choices.copy()), torch.from_numpy(values.view(np.int64))

    def receive_correlated(self, choice: Choices, bits: int, words: int | None = None) -> Tensor:
        """One ``ReceiveCorrelated``."""
        return self.exchange([ReceiveCorrelated(choice, bits, words)])[0]

    def receive_chosen(self, choice: Choices, bits: int, words: int | None = None) -> Tensor:
        """One ``ReceiveChosen``."""
        return self.exchange([ReceiveChosen(choice, bits, words)])[0]

    def receive_one_of_many(
        self, index: Choices, index_bits: int, bits: int, words: int | None = None
    ) -> Tensor:
        """One ``ReceiveOneOfMany``."""
        return self.exchange([ReceiveOneOfMany(index, index_bits, bits, words)])[0]

    def __repr__(self) -> str:
        return f"OtReceiver({self.params.name}, {self.available} COTs)"

    def __reduce__(self) -> str:
        raise TypeError("An OT session holds secrets of one connection and is never pickled.")

    def _extend(self, count: int) -> None:
        assert self._extension is not None
        self._pool.check_room(rounded(count))
        for size in blocks_of(count):
            first = self._pool.num_made
            t, choices, corrections = self._extension.block(first, size)
            payload = corrections.reshape(-1).view(np.uint8)
            self._channel.send(f"ot.corrections@{first}", payload)
            self._pool.put((t, choices), size)

    def _receive(self, shapes: list[Shape], choices: list[U64], results: list[U64]) -> None:
        """Send the masked choices, open the answers into ``results``."""
        total = sum(shape.cots for shape in shapes)
        if total == 0:
            return
        self._extend(max(0, total - self._pool.available))
        first, (keys, bits) = self._pool.take(total)
        assert self._masks is not None
        stream = ChoiceBits(shapes)
        randoms = stream.gathered(bits)
        chosen = np.concatenate(choices)
        payload = stream.packed(masked_choices(chosen, randoms))
        for i, lo in enumerate(range(0, payload.size, MESSAGE_BYTES)):
            self._channel.send(f"ot.choices@{first}.{i}", payload[lo : lo + MESSAGE_BYTES])

        cots = [0, *itertools.accumulate(shape.cots for shape in shapes)]
        elements = [0, *itertools.accumulate(shape.count for shape in shapes)]
        for i, pieces in enumerate(answer_messages(shapes)):
            parts, size = [], 0
            for request, lo, hi in pieces:
                shape, result = shapes[request], results[request][lo:hi]
                cot, element = cots[request] + lo * shape.index_bits, elements[request] + lo
                parts.append(Part(shape, hi - lo, cot, element, None, result))
                size += shape.answer_bytes(hi - lo)
            message = Message(parts)
            pads = self._masks.own_pads(message, keys, randoms, first)  # while the sender computes
            answers = self._channel.receive(f"ot.answers@{first}.{i}", size)
            self._masks.open(message, answers, chosen, pads)


def masked_choices(choices: U64, randoms: U64) -> U64:
    """What the sender sees of choices: under the random ones of the COTs (Beaver, CRYPTO 1995)."""
    return choices ^ randoms


def _given(request: ReceiverRequest) -> Choices:
    return request.index if isinstance(request, ReceiveOneOfMany) else request.choice


def _shape(request: ReceiverRequest) -> Shape:
    given = _given(request)
    if given.ndim != 1:
        raise ValueError(f"Choices have one dimension, not {given.ndim}.")
    words = 1 if request.words is None else request.words
    index_bits = request.index_bits if isinstance(request, ReceiveOneOfMany) else 1
    correlated = isinstance(request, ReceiveCorrelated)
    if isinstance(request, ReceiveCorrelated):
        index_bits = request.factor_bits
    return Shape(correlated, len(given), index_bits, words, request.bits)


def _checked(request: ReceiverRequest, shape: Shape) -> U64:
    """The choices as uint64 (n,), in range."""
    given = _given(request)
    if isinstance(given, Tensor):
        if given.device.type != "cpu" or given.is_floating_point() or given.is_complex():
            raise ValueError(
                f"Choices are {given.dtype} on {given.device}; give integers on the CPU."
            )
        given = given.detach().numpy()
    elif not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"Choices are {given.dtype}; give integers.")
    if given.size and (int(given.min()) < 0 or int(given.max()) >= shape.num_messages):
        raise ValueError(
            f"Choices lie in [0, {shape.num_messages}); at least one of {given.size} does not."
        )
    return given.astype(np.uint64)
