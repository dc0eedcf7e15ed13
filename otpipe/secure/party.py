"""The client's and the server's implementation of the secure operations: one class, two roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from otpipe.kernels.packing import pack_uints, unpack_uints
from otpipe.ot.channel import Channel
from otpipe.secure import comparison, lookups, products, resizing
from otpipe.secure.rounds import Give, Request, Step, Swap, Tell, Values, drive
from otpipe.secure.shares import Share, random_ring, reduced
from otpipe.secure.tables import FieldFunction, PiecewiseTable

T = TypeVar("T")
Role = Literal["server", "client"]


class OtSession(Protocol):
    """What a party needs of an OT session: ``otpipe.ot.OtSender`` or ``OtReceiver``, set up."""

    def exchange(self, requests: Sequence[Any]) -> list[Any]:
        """Several requests in one round; see ``otpipe.ot``."""


class Party:
    """One of the two parties. See :class:`otpipe.secure.operations.SecureOperations`.

    Both parties run the same steps in the same order, with shares of the same shapes. Semi-honest:
    a party that deviates from the program can make results wrong and is not noticed; what it
    receives stays masked, but wrong results may show in what the other does with them.

    One thread at a time. Raises what the OT session and the channel raise.
    """

    def __init__(
        self,
        role: Role,
        session: OtSession,
        channel: Channel,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            role: the server sends in all oblivious transfers, the client chooses.
            session: of that role, set up.
            channel: to the other party; the one that the session uses.
            device: of all shares; "cpu" for the client.
        """
        if role not in ("server", "client"):
            raise ValueError(f"A party is the server or the client, not {role!r}.")
        self.is_server = role == "server"
        self.device = torch.empty(0, device=device).device
        self._session = session
        self._channel = channel
        self._rounds = 0

    def run(self, step: Step[T]) -> T:
        """Run one step to its end; the other party runs the same one."""
        return drive(step, self._serve)

    # --- local ----------------------------------------------------------------------------------

    def public(self, values: Tensor, bits: int, frac: int = 0) -> Share:
        """See ``SecureOperations``."""
        data = values.to(self.device, torch.int64)
        return Share.of(data if self.is_server else torch.zeros_like(data), bits, frac)

    def add_public(self, x: Share, values: Tensor | int) -> Share:
        """See ``SecureOperations``."""
        if isinstance(values, Tensor):
            values = values.to(self.device)
        if not self.is_server:
            values = values * 0
        return Share.of(x.data + values, x.bits, x.frac)

    def shifted(self, x: Share, shifts: Sequence[int], bits: int) -> Share:
        """See ``SecureOperations``."""
        return resizing.shifted(x, x.data, shifts, bits, up=self.is_server)

    def random(self, shape: Sequence[int], bits: int, frac: int = 0) -> Share:
        """See ``SecureOperations``: each party draws its own part."""
        return Share(random_ring(shape, bits, self.device), bits, frac)

    # --- with messages --------------------------------------------------------------------------

    def rescale(self, x: Share, shift: int, bits: int, *, nonnegative: bool = False) -> Step[Share]:
        """See ``SecureOperations``."""
        return resizing.rescale(self.is_server, x, shift, bits, nonnegative)

    def select(
        self, condition: Share, x: Share, bits: int, *, nonnegative: bool = False
    ) -> Step[Share]:
        """See ``SecureOperations``."""
        return resizing.select(self.is_server, condition, x, bits, nonnegative)

    def mul(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """See ``SecureOperations``."""
        return products.mul(self.is_server, x, y, bits)

    def mul_rows(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """See ``SecureOperations``."""
        return products.mul_rows(self.is_server, x, y, bits)

    def square_sum(self, x: Share, bits: int) -> Step[Share]:
        """See ``SecureOperations``."""
        return products.square_sum(self.is_server, x, bits)

    def matmul(self, x: Share, y: Share, bits: int) -> Step[Share]:
        """See ``SecureOperations``."""
        return products.matmul(self.is_server, x, y, bits)

    def is_negative(self, x: Share) -> Step[Share]:
        """See ``SecureOperations``."""
        return comparison.is_negative(self.is_server, x)

    def less_than(self, x: Share, y: Share) -> Step[Share]:
        """See ``SecureOperations``."""
        return comparison.is_negative(self.is_server, x - y)

    def max(self, x: Share) -> Step[Share]:
        """See ``SecureOperations``."""
        return comparison.row_max(self.is_server, x)

    def lookup(
        self, x: Share, index_bits: int, function: FieldFunction, field_bits: Sequence[int]
    ) -> Step[list[Share]]:
        """See ``SecureOperations``."""
        return lookups.lookup(self.is_server, x, index_bits, function, field_bits)

    def evaluate(self, x: Share, table: PiecewiseTable) -> Step[Share]:
        """See ``SecureOperations``."""
        return lookups.evaluate(self.is_server, x, table)

    def swap(self, x: Share) -> Step[Tensor]:
        """See ``SecureOperations``."""
        (peer,) = yield [Swap(x.data, x.bits)]
        return Share.of(x.data + peer, x.bits).data

    def reveal_to_client(self, x: Share) -> Step[Tensor | None]:
        """See ``SecureOperations``."""
        (told,) = yield [Tell(x.data, x.bits)]
        if told is None:
            return None
        half = 1 << (x.bits - 1)
        return Share.of(x.data + told + half, x.bits).data - half

    def give_to_server(self, values: Tensor, bits: int) -> Step[Tensor | None]:
        """See ``SecureOperations``."""
        own = values.to(self.device, torch.int64)
        (given,) = yield [Give(own if self.is_server else reduced(own, bits), bits)]
        return given

    # --- one round ------------------------------------------------------------------------------

    def _serve(self, requests: Sequence[Request]) -> list[Any]:
        """Client to server, then server to client: plain values join the OT messages."""
        if not requests:
            return []
        numbered = list(enumerate(requests))
        transfers = [i for i, request in numbered if not isinstance(request, Values)]
        upward = [(i, request) for i, request in numbered if isinstance(request, Swap | Give)]
        downward = [(i, request) for i, request in numbered if isinstance(request, Swap | Tell)]
        results: list[Any] = [None] * len(requests)
        label = f"secure.values@{self._rounds}"
        self._rounds += 1
        if self.is_server:
            peer = self._receive(label, upward)
        else:
            self._send(label, upward)
        if transfers:
            answers = self._session.exchange([requests[i] for i in transfers])
            for i, answer in zip(transfers, answers, strict=True):
                results[i] = answer
        if self.is_server:
            self._send(label, downward)
        else:
            peer = self._receive(label, downward)
        for i, values in peer:
            results[i] = values
        return results

    def _send(self, label: str, requests: Sequence[tuple[int, Values]]) -> None:
        if requests:
            parts = [
                pack_uints(request.values.cpu(), value_bytes(request.bits)).reshape(-1).numpy()
                for _, request in requests
            ]
            self._channel.send(label, np.concatenate(parts))

    def _receive(
        self, label: str, requests: Sequence[tuple[int, Values]]
    ) -> list[tuple[int, Tensor]]:
        if not requests:
            return []
        sizes = [request.values.numel() * value_bytes(request.bits) for _, request in requests]
        payload = torch.from_numpy(self._channel.receive(label, sum(sizes)))
        values = []
        for (index, request), part in zip(requests, payload.split(sizes), strict=True):
            shaped = part.view(*request.values.shape, value_bytes(request.bits))
            values.append((index, reduced(unpack_uints(shaped).to(self.device), request.bits)))
        return values


def value_bytes(bits: int) -> int:
    """Bytes of one plain value on the wire."""
    return -(-bits // 8)
