"""The client's attention products of one text, on the lines to all ranks; see ``rlwe_products``.

All ranks prepare at once, each against a thread of its own here: a rank computes for its own layers
and needs nothing of the others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from otpipe.client.link import ServerLink
from otpipe.client.preparation import QUEUE_TIMEOUT_S, Progress
from otpipe.errors import ConnectionLost, OtpipeError, ProtocolError
from otpipe.ot import Stock
from otpipe.protocol.messages import Error, MessageType, Ping, send_message
from otpipe.protocol.private_messages import Prepare, PrepareReady
from otpipe.protocol.wire import FrameConnection, Header
from otpipe.protocol.wire_channel import WireChannel
from otpipe.secure.party import Party
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts

POLL_S = 0.2
"""How often progress is told, and a failure of one rank ends the work on the others."""

PING_EVERY_S = 60.0
"""How often a rank that is done is told that the client waits for others: it drops idle ones."""


@dataclass
class RankLine:
    """One rank's end of a session."""

    link: ServerLink
    connection: FrameConnection
    channel: WireChannel
    party: Party
    stock: Stock

    def ping(self) -> None:
        """Show the rank that this client is there; between requests.

        Raises:
            ConnectionLost, ServerRefused, ProtocolError: the session has ended.
        """
        self.link.send(Ping())
        self.link.receive(MessageType.PONG, lambda _: 0)

    def tell(self, error: BaseException) -> None:
        """Tell the rank of an error that is not the end of the connection; not in mid-frame."""
        if isinstance(error, OtpipeError) and not isinstance(error, ConnectionLost):
            with contextlib.suppress(OtpipeError):
                send_message(self.connection, Error("the client ended the session on an error"))


class TextProducts:
    """What one text has of every rank. For one thread, but for those that it starts itself."""

    def __init__(
        self,
        lines: Mapping[int, RankLine],
        sizes: AttentionSizes,
        layers: Mapping[int, Sequence[int]],
    ) -> None:
        """
        Args:
            lines: by rank.
            sizes: of every layer.
            layers: those that each rank runs.
        """
        self._lines, self._sizes, self._layers = lines, sizes, layers
        self._products = {
            rank: PreparedProducts("client", line.channel, sizes, layers[rank])
            for rank, line in lines.items()
        }
        self.num_prepared = 0
        """Positions that the text may have so far."""

    @property
    def is_used(self) -> bool:
        """Whether a mask has opened something: the text has begun, and no other may."""
        return any(products.is_used for products in self._products.values())

    def of(self, rank: int) -> PreparedProducts:
        """For the layers of one rank."""
        return self._products[rank]

    def prepare(self, count: int, progress: Progress | None = None) -> int:
        """Prepare the next ``count`` positions on all ranks.

        On an error the connections are closed.

        Args:
            progress: told of bytes on the wire.

        Returns:
            How often a rank was waited for outside of its channel.
        """
        first = self.num_prepared
        failures: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                self._prepare_on(rank, first, count)
            except BaseException as error:
                self._lines[rank].tell(error)
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"products {rank}", daemon=True)
            for rank in self._lines
        ]
        up, down = self._sizes.preparation_bytes(first, first + count)
        total = (up + down) * sum(map(len, self._layers.values()))
        before = self._carried()
        last_ping_s = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while not failures and any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(POLL_S / len(threads))
                if progress is not None and not failures:
                    progress(min(self._carried() - before, total - 1), total)
                if time.monotonic() - last_ping_s > PING_EVERY_S:
                    last_ping_s = time.monotonic()
                    for line, thread in zip(self._lines.values(), threads, strict=True):
                        if not thread.is_alive():
                            line.ping()
        finally:
            if failures or any(thread.is_alive() for thread in threads):
                for line in self._lines.values():
                    line.link.close()
                for thread in threads:
                    thread.join()
        if failures:
            raise failures[0]
        if progress is not None:
            progress(total, total)
        self.num_prepared += count
        return len(threads)

    def _prepare_on(self, rank: int, first: int, count: int) -> None:
        def due(header: Header) -> int:
            if PrepareReady.parse(header).first != first:
                raise ProtocolError(f"the server made ready for other positions than {first} on")
            return 0

        link = self._lines[rank].link
        link.send(Prepare(first, count))
        link.receive(MessageType.PREPARE_READY, due, timeout_s=QUEUE_TIMEOUT_S)
        self._products[rank].prepare(count)

    def _carried(self) -> int:
        """Bytes of ciphertexts so far, both directions."""
        channels = [line.channel for line in self._lines.values()]
        up = sum(channel.sent_bytes["products.upload"] for channel in channels)
        return up + sum(channel.received_bytes["products.answers"] for channel in channels)
