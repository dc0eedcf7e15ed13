"""A session with a server of private weights: one connection, OT session and party for each rank.

The client runs the whole program of the model; every stage of it runs against the rank that owns
the stage. Whatever goes wrong ends the session, on all ranks: the shares that the ranks hold of the
text, and the attention products prepared for it, are gone with it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.mode import AHEAD
from otpipe.client.operation_meter import OperationMeter
from otpipe.client.preparation import Progress
from otpipe.client.private_pads import PassPads, spans_of
from otpipe.client.private_products import RankLine, TextProducts
from otpipe.client.store import SlotLease
from otpipe.errors import ProtocolError
from otpipe.model.private_maps import ClientMaps
from otpipe.model.private_program import PrivateProgram, Runner, Stage
from otpipe.model.program import LogitsFor
from otpipe.ot import OtReceiver, Stock
from otpipe.pipeline.placement import GATEWAY_RANK, Placement
from otpipe.protocol.messages import MessageType, send_message
from otpipe.protocol.private_messages import (
    LOGITS_FOR,
    SESSION_ID_BYTES,
    Join,
    Joined,
    Pass,
    PassDone,
    PassReady,
    spans_payload,
)
from otpipe.protocol.wire import Header, Traffic
from otpipe.protocol.wire_channel import WireChannel
from otpipe.secure.decoder import ShareCache
from otpipe.secure.party import Party
from otpipe.secure.product_blocks import DistanceBudget

SILENCE_S = 300.0
"""How long a rank may compute between two messages. One that is gone shows at once, or
within seconds, since its connection ends."""

TURN_S = 3600.0
"""How long this client waits while passes of others run."""

PRODUCTS_AHEAD = f"attention products{AHEAD}"
"""The operation under which their preparation is counted."""


class PrivateSession:
    """Everything that lives as long as the connections to all ranks do. For one thread.

    Attributes:
        alive: False after an error, or after the server has ended it.
        operations: seconds, bytes and rounds so far, by operation of the program.
    """

    def __init__(
        self,
        options: LinkOptions,
        fingerprint: str,
        program: PrivateProgram,
        placement: Placement,
    ) -> None:
        """Connect to all ranks, and set up oblivious transfer with each.

        Raises:
            ConnectionLost, ServerRefused, ProtocolError: as they say.
        """
        self._options = options
        self._fingerprint = fingerprint
        self._program = program
        self._placement = placement
        self._passes = self._waits = 0
        self.operations: defaultdict[str, dict[str, float]] = defaultdict(
            lambda: dict.fromkeys(("seconds", "bytes_sent", "bytes_received", "rounds"), 0)
        )
        self._meter = OperationMeter(self.operations, self.current_traffic, lambda: self.rounds)
        self._lines: dict[int, RankLine] = {}
        self._ended = False
        self._budget = DistanceBudget(program.product_blocks)
        self._products: TextProducts | None = None
        try:
            with self._meter.count("setup"):
                session = self._join(GATEWAY_RANK, b"")
                self._join_others(session)
        except BaseException as error:
            self._give_up(error)
            raise

    @property
    def alive(self) -> bool:
        """Whether a pass may begin."""
        return not self._ended and not any(
            line.connection.peer_has_left() for line in self._lines.values()
        )

    def has_room_for(self, num_positions: int) -> bool:
        """Whether a new text of so many positions may be prepared in this session."""
        products = self._products
        done = 0 if products is None or products.is_used else products.num_prepared
        blocks = self._program.product_blocks
        return self._budget.allows(blocks.text_distance(done, num_positions))

    def make_ready(
        self, length: int, needed: int, expected: int, progress: Progress | None = None
    ) -> None:
        """Prepare attention products for the next pass where they are missing, on all ranks.

        Args:
            length: of the text so far; 0 for a new one, which takes what was prepared for a text
                that did not begin, or begins with nothing.
            needed: positions that the text will have after the pass.
            expected: positions that it will have in the end; if it has more, or that is not known,
                what is prepared doubles.
            progress: told of bytes on the wire.

        Raises:
            ParameterError: a text of this length would tell too much in one session.
        """
        try:
            products = self._products
            if products is None or (not length and products.is_used):
                products = self._products = self._new_products()
            blocks = self._program.product_blocks
            while products.num_prepared < needed:
                done = products.num_prepared
                reach = expected if expected >= needed else max(needed, 2 * done)
                count = blocks.next_block(done, reach)
                self._budget.spend(done, done + count)
                with self._meter.count(PRODUCTS_AHEAD):
                    self._waits += products.prepare(count, progress)
        except BaseException as error:
            self._give_up(error)
            raise

    def forward(
        self, token_ids: Sequence[int], cache: ShareCache, wanted: LogitsFor, lease: SlotLease
    ) -> Tensor | None:
        """One pass, with the slots of ``lease``, that :meth:`make_ready` has prepared.

        Ends the session on any error.

        Returns:
            float32 (rows, vocab) logits, or None for "none".
        """
        try:
            request = Pass(
                self._passes,
                cache.length,
                len(token_ids),
                LOGITS_FOR.index(wanted),
                len(lease.spans),
            )
            self._passes += 1
            with self._meter.count("turn"):
                self._begin(request, spans_payload(spans_of(lease)))
            with self._meter.count("COTs"):
                for line in self._lines.values():
                    line.stock.fill(len(token_ids))
            with self._meter.count("logits"):
                logits = self._run(token_ids, cache, wanted, PassPads(lease))
                send_message(self._lines[GATEWAY_RANK].connection, PassDone(request.number))
            for line in self._lines.values():
                line.stock.note(len(token_ids))
            return logits
        except BaseException as error:
            self._give_up(error)
            raise

    def current_traffic(self) -> Traffic:
        """Bytes and frames so far, of all ranks."""
        total = Traffic()
        for line in self._lines.values():
            each = line.link.current_traffic()
            total.bytes_sent += each.bytes_sent
            total.bytes_received += each.bytes_received
            total.frames_sent += each.frames_sent
            total.frames_received += each.frames_received
        return total

    @property
    def rounds(self) -> int:
        """How often the client waited for an answer so far."""
        return self._waits + sum(line.channel.rounds for line in self._lines.values())

    def close(self) -> None:
        """Leave all ranks, and forget what was prepared. Safe to call twice."""
        self._ended = True
        self._products = None
        for line in self._lines.values():
            line.link.close()

    # -- joining ---------------------------------------------------------------------------------

    def _join(self, rank: int, session: bytes) -> bytes:
        """Connect to one rank; returns the session's number."""
        link = ServerLink(self._options, self._fingerprint)
        try:
            connection = link.attach(rank)
            told = b""

            def due(header: Header) -> int:
                nonlocal told
                told = Joined.parse(header).session
                if len(told) != SESSION_ID_BYTES or (session and told != session):
                    raise ProtocolError("the server joined this client to another session")
                return 0

            link.send(Join(session))
            link.receive(MessageType.JOINED, due)
            channel = WireChannel(connection, "server", SILENCE_S)
            receiver = OtReceiver(channel)
            party = Party("client", receiver, channel)
        except BaseException:
            link.close()
            raise
        self._lines[rank] = RankLine(link, connection, channel, party, Stock(receiver))
        receiver.setup()
        return told

    def _join_others(self, session: bytes) -> None:
        """All other ranks at once: a setup is waiting for curves, most of it at the server."""
        failures: list[BaseException] = []

        def join(rank: int) -> None:
            try:
                self._join(rank, session)
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=join, args=(rank,), name=f"join {rank}", daemon=True)
            for rank in range(1, self._placement.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # join() alone would not let Ctrl-C through on all systems
                thread.join(0.2)
        if failures:
            raise failures[0]

    def _new_products(self) -> TextProducts:
        sizes = self._program.product_blocks.sizes
        spec, owners = self._program.spec, self._placement.owner_of_map
        layers: dict[int, list[int]] = {rank: [] for rank in self._lines}
        for layer in range(spec.num_layers):
            layers[owners[spec.map_index("qkv", layer)]].append(layer)
        return TextProducts(self._lines, sizes, layers)

    # -- a pass ----------------------------------------------------------------------------------

    def _begin(self, request: Pass, payload: bytes) -> None:
        """Wait for the turn, then tell all ranks."""
        gateway = self._lines[GATEWAY_RANK].link

        def due(header: Header) -> int:
            if PassReady.parse(header).number != request.number:
                raise ProtocolError(f"the server made ready for another pass than {request.number}")
            return 0

        gateway.send(request, payload)
        gateway.receive(MessageType.PASS_READY, due, timeout_s=TURN_S)
        self._waits += 1
        for rank in range(1, self._placement.world_size):
            self._lines[rank].link.send(request, payload)

    def _run(
        self, token_ids: Sequence[int], cache: ShareCache, wanted: LogitsFor, pads: PassPads
    ) -> Tensor | None:
        description = self._program.description
        assert self._products is not None, "make_ready comes before a pass"
        runners = {
            rank: Runner(
                line.party,
                ClientMaps(line.party, description, pads),
                self._products.of(rank),
                self._meter.measure,
            )
            for rank, line in self._lines.items()
        }

        def runner_of(stage: Stage) -> Runner:
            first_map = stage.map_indices(description.spec)[0]
            return runners[self._placement.owner_of_map[first_map]]

        return self._program.forward(runner_of, cache, token_ids, wanted)

    def _give_up(self, error: BaseException) -> None:
        """End the session; a server that did something wrong is told what."""
        for line in self._lines.values():
            line.tell(error)
        self.close()
