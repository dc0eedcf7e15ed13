"""The text of one session on one rank: its share of the cache, and its attention products.

The products of a text are prepared before its passes and between them, block by block. A new text
begins with the preparation of position 0: what was left of the old one is dropped then.
"""

from __future__ import annotations

from otpipe.errors import ProtocolError
from otpipe.ot.channel import Channel
from otpipe.protocol.private_messages import Pass, Prepare
from otpipe.secure.decoder import ShareCache
from otpipe.secure.product_blocks import DistanceBudget
from otpipe.secure.rlwe_products import PreparedProducts
from otpipe.server.private_rank import PrivateRank


class SessionText:
    """What a rank holds of a session's text. For one thread.

    Attributes:
        cache: own share of keys and values.
        products: of the text that was begun, or is to begin.
    """

    def __init__(self, rank: PrivateRank, session: bytes, channel: Channel) -> None:
        self._rank, self._session, self._channel = rank, session, channel
        self._budget = DistanceBudget(rank.program.product_blocks)
        self._begin()

    def _begin(self) -> None:
        rank, sizes = self._rank, self._rank.program.product_blocks.sizes
        self.cache: ShareCache = rank.program.new_cache()
        self.products = PreparedProducts("server", self._channel, sizes, rank.layers, rank.device)
        rank.product_memory.free(self._session)

    def begin_preparation(self, request: Prepare) -> int:
        """Check that a preparation may come now, and reserve what it takes.

        Returns:
            Bytes that the client is to send.

        Raises:
            ProtocolError: it does not go on where the one before has ended, or is longer than the
                model's texts, or takes more memory than there is.
            ParameterError: this session's preparations would tell too much.
        """
        longest, stop = self._rank.program.max_positions, request.first + request.count
        if request.first not in (0, self.products.num_prepared):
            raise ProtocolError(
                f"attention products from position {request.first} on were asked for; due are "
                f"those from {self.products.num_prepared} on (0 begins a new text)"
            )
        if request.count < 1 or stop > longest:
            raise ProtocolError(
                f"attention products of {request.count} positions from {request.first} on were "
                f"asked for; a text has 1 to {longest} positions"
            )
        if request.first == 0:
            self._begin()
        self._budget.spend(request.first, stop)
        memory, num_layers = self._rank.product_memory, len(self._rank.layers)
        sizes = self._rank.program.product_blocks.sizes
        more = num_layers * sizes.block_bytes(request.first, stop)
        if not memory.resize(self._session, self.products.held_bytes + more):
            raise ProtocolError(
                f"attention products of {request.count} positions from {request.first} on take "
                f"{more / 1e6:.0f} MB on rank {self._rank.rank}, which holds "
                f"{memory.held_bytes / 1e6:.0f} of at most {memory.limit_bytes / 1e6:.0f} MB for "
                "its clients; prepare fewer positions at a time, or when other texts have ended"
            )
        return num_layers * sizes.preparation_bytes(request.first, stop)[0]

    def begin_pass(self, request: Pass) -> None:
        """Check that a pass follows what came before.

        Raises:
            ProtocolError: it is of another position, or its attention products are not prepared.
            UsageError: its rows do not fit behind those in the cache.
        """
        if request.position != self.cache.length:
            raise ProtocolError(
                f"a pass begins at position {request.position} and this session's text has "
                f"{self.cache.length}; begin a new text"
            )
        self._rank.program.check_rows(request.rows, request.position)
        stop = request.position + request.rows
        if stop > self.products.num_prepared:
            raise ProtocolError(
                f"a pass goes up to {stop} positions, and attention products are prepared for "
                f"{self.products.num_prepared}; prepare more first"
            )

    def end_pass(self) -> None:
        """Give back the memory of products that were used."""
        self._rank.product_memory.resize(self._session, self.products.held_bytes)

    def close(self) -> None:
        """Give back all memory."""
        self._rank.product_memory.free(self._session)
