"""The sender's side of an OT session (the server's)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from otpipe.ot.channel import Channel
from otpipe.ot.extension import TreeLayout, blocks_of, correction_bytes, rounded
from otpipe.ot.handshake import set_up_sender
from otpipe.ot.masks_cpu import ChoiceBits
from otpipe.ot.pads import TweakLedger
from otpipe.ot.params import DEFAULT_OT_PARAMS, OtParams
from otpipe.ot.plan import Shape, answer_messages, choice_messages
from otpipe.ot.pool import CotPool
from otpipe.ot.requests import SendChosen, SendCorrelated, SenderRequest, SendOneOfMany
from otpipe.ot.sender_cpu import CpuSenderMath, Job, SenderMath
from otpipe.ot.sender_device import DeviceSenderMath
from otpipe.ot.turn import Turn


class OtSender:
    """Sends oblivious transfers; holds Delta. One per connection, one thread at a time.

    Every call needs the matching call of the peer's ``OtReceiver``, in the same order. Transfers
    come from a pool of correlated OTs that ``extend`` fills ahead of time; a call that finds too
    few makes them itself, in the same round. The pool takes 16 bytes a COT on ``device``.

    Raises, from any call but the constructor:
        RuntimeError: called out of order, at the same time as another call, or after an error.
        ProtocolError: the peer sent something else than is due.
        ParameterError: the session has made as many transfers as its parameters allow.
    After an error a session cannot be used again.
    """

    def __init__(
        self,
        channel: Channel,
        device: torch.device | str = "cpu",
        params: OtParams = DEFAULT_OT_PARAMS,
    ) -> None:
        """
        Args:
            channel: to the receiver.
            device: where the tensors of all calls are, and where masks are computed.
            params: the same as the receiver's.
        """
        self.params = params
        self.device = torch.empty(0, device=device).device
        self._channel = channel
        self._turn = Turn("OtSender")
        self._pool: CotPool[Tensor] = CotPool(params, lambda parts: torch.cat(list(parts)))
        self._math: SenderMath | None = None

    @property
    def available(self) -> int:
        """COTs in the pool."""
        return self._pool.available

    @property
    def taken(self) -> int:
        """COTs that calls have used so far."""
        return self._pool.num_taken

    def setup(self) -> None:
        """Base OTs and seeds; once, before anything else. One round, in which this side begins."""
        with self._turn.call("setup"):
            secrets = set_up_sender(self._channel, self.params)
            layout, ledger = TreeLayout.of(self.params), TweakLedger(self.params)
            if self.device.type == "cpu":
                self._math = CpuSenderMath(secrets, layout, ledger)
            else:
                self._math = DeviceSenderMath(secrets, layout, ledger, self.device)

    def extend(self, count: int) -> None:
        """Add ``count`` COTs, rounded up to a multiple of 2048; bytes go to this side only."""
        if count < 0:
            raise ValueError(f"A pool is extended by at least 0 COTs, not {count}.")
        with self._turn.call("extend"):
            self._extend(count)

    def exchange(self, requests: Sequence[SenderRequest]) -> list[Tensor | None]:
        """Serve several requests in one round.

        Args:
            requests: in the order of the receiver's; n = 0 is allowed.

        Returns:
            For each request: x of a ``SendCorrelated``, shaped like its correlation, else None.

        Raises:
            ValueError: a tensor of another shape, dtype or device than its request wants.
        """
        tensors = [self._tensor(request) for request in requests]
        shapes = [
            _shape(request, tensor) for request, tensor in zip(requests, tensors, strict=True)
        ]
        results = [
            torch.empty(tensor.shape, dtype=torch.int64, device=self.device)
            if shape.correlated
            else None
            for shape, tensor in zip(shapes, tensors, strict=True)
        ]
        with self._turn.call("exchange"):
            self._serve(shapes, tensors, results)
        return [
            result.view(request.correlation.shape)
            if isinstance(request, SendCorrelated) and result is not None
            else None
            for request, result in zip(requests, results, strict=True)
        ]

    def send_random(self, n: int, bits: int) -> tuple[Tensor, Tensor]:
        """Random OT, without a message unless the pool is too small.

        Returns:
            m0, m1: int64 (n,), uniform mod 2^bits; the receiver has one of each pair.
        """
        Shape(correlated=False, count=n, index_bits=1, words=1, bits=bits)
        if n < 0:
            raise ValueError(f"A random OT makes at least 0 transfers, not {n}.")
        with self._turn.call("send_random"):
            if n == 0:
                empty = torch.empty(0, dtype=torch.int64, device=self.device)
                return empty, empty.clone()
            self._extend(max(0, n - self._pool.available))
            first, (keys,) = self._pool.take(n)
            assert self._math is not None
            return self._math.random_pairs(keys, first, bits)

    def send_correlated(self, correlation: Tensor, bits: int) -> Tensor:
        """One ``SendCorrelated``: x, shaped like ``correlation``."""
        (x,) = self.exchange([SendCorrelated(correlation, bits)])
        assert x is not None
        return x

    def send_chosen(self, m0: Tensor, m1: Tensor, bits: int) -> None:
        """One ``SendChosen``."""
        self.exchange([SendChosen(m0, m1, bits)])

    def send_one_of_many(self, messages: Tensor, bits: int) -> None:
        """One ``SendOneOfMany``."""
        self.exchange([SendOneOfMany(messages, bits)])

    def __repr__(self) -> str:
        return f"OtSender({self.params.name}, {self.device}, {self.available} COTs)"

    def __reduce__(self) -> str:
        raise TypeError("An OT session holds secrets of one connection and is never pickled.")

    def _extend(self, count: int) -> None:
        assert self._math is not None
        self._pool.check_room(rounded(count))
        for size in blocks_of(count):
            first = self._pool.num_made
            due = correction_bytes(self.params, size)
            corrections = self._channel.receive(f"ot.corrections@{first}", due)
            self._pool.put((self._math.cots(first, size, corrections),), size)

    def _serve(
        self, shapes: list[Shape], tensors: list[Tensor], results: list[Tensor | None]
    ) -> None:
        """Take the choices, send the answers, fill ``results``."""
        total = sum(shape.cots for shape in shapes)
        if total == 0:
            return
        assert self._math is not None
        self._extend(max(0, total - self._pool.available))
        first, (keys,) = self._pool.take(total)
        choices = ChoiceBits(shapes)
        received = [
            self._channel.receive(f"ot.choices@{first}.{i}", size)
            for i, size in enumerate(choice_messages(shapes))
        ]
        flips = choices.unpacked(received[0] if len(received) == 1 else np.concatenate(received))
        cots = [0, *itertools.accumulate(shape.cots for shape in shapes)]
        elements = [0, *itertools.accumulate(shape.count for shape in shapes)]
        for i, pieces in enumerate(answer_messages(shapes)):
            jobs = []
            for request, lo, hi in pieces:
                shape, result = shapes[request], results[request]
                jobs.append(
                    Job(
                        shape,
                        cots[request] + lo * shape.index_bits,
                        elements[request] + lo,
                        tensors[request][lo:hi],
                        None if result is None else result[lo:hi],
                    )
                )
            payload = self._math.answers(jobs, keys, flips, first)
            self._channel.send(f"ot.answers@{first}.{i}", payload)

    def _tensor(self, request: SenderRequest) -> Tensor:
        """The request's values as int64 (n, w), or (n, M, w) where messages are chosen from."""
        if isinstance(request, SendCorrelated):
            given = {"correlation": request.correlation}
        elif isinstance(request, SendChosen):
            given = {"m0": request.m0, "m1": request.m1}
            if request.m0.shape != request.m1.shape:
                raise ValueError(
                    f"m0 has shape {tuple(request.m0.shape)} and m1 {tuple(request.m1.shape)}; "
                    f"give both the same."
                )
        else:
            given = {"messages": request.messages}
        dims = 2 if isinstance(request, SendOneOfMany) else 1
        for name, tensor in given.items():
            if tensor.dtype != torch.int64 or tensor.device != self.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}; this session wants int64 "
                    f"on {self.device}."
                )
            if tensor.ndim not in (dims, dims + 1):
                raise ValueError(
                    f"{name} has {tensor.ndim} dimensions; give {dims} or, with words, {dims + 1}."
                )
        values = (
            torch.stack(list(given.values()), 1) if "m0" in given else next(iter(given.values()))
        )
        wanted = 2 if isinstance(request, SendCorrelated) else 3
        return values.unsqueeze(-1) if values.ndim < wanted else values


def _shape(request: SenderRequest, tensor: Tensor) -> Shape:
    """Sizes of a request whose values are (n, w) or (n, M, w)."""
    if isinstance(request, SendCorrelated):
        n, words = tensor.shape
        return Shape(True, n, request.factor_bits, words, request.bits)
    n, num_messages, words = tensor.shape
    index_bits = num_messages.bit_length() - 1
    if num_messages != 1 << index_bits:
        raise ValueError(f"A transfer chooses among 2, 4, ... 256 messages, not {num_messages}.")
    return Shape(False, n, index_bits, words, request.bits)
