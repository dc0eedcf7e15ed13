"""Many rows at once: a prompt's rows in chunks, each through the whole model on a line of its own.

Masking, sending, the server's product, opening and attention of one row do not depend on later
rows, and on earlier rows only through their keys and values. So the rows of a pass are cut into
chunks, and every chunk runs the decoder program by itself, in one thread and over one connection;
before the attention of a layer it waits until the chunks before it have written that layer's keys
and values. While one chunk waits for the server, others expand pads, mask, open or attend: all the
stages of a request overlap without a barrier between maps.

How many chunks and connections there are follows from the number of rows, the model's sizes and
the number of this machine's cores alone, never from what the rows hold.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from otpipe.client.chunk_executor import Chunk, ChunkExecutor, most_rows
from otpipe.client.chunk_order import ChunkOrder, fail, keys_written, new_order
from otpipe.client.chunk_tables import StepTables
from otpipe.client.link import LinkOptions, ServerLink
from otpipe.client.masked_executor import MaskedExecutor
from otpipe.client.store import PadStore
from otpipe.errors import OtpipeError
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache, RopeTables
from otpipe.model.program import LogitsFor, check_tokens, forward
from otpipe.model.spec import ModelSpec

log = logging.getLogger("otpipe.client")

MAX_STREAMS = 12
"""Connections of one pass. The server's threads want cores as well."""

MAX_CHUNK_ROWS = 64
"""As many as a server with a GPU has recorded products of (``pipeline.graphs``)."""

MIN_CHUNK_ROWS = 4
MIN_CHUNK_BYTES = 1 << 18
"""Request and answer of one map together, on average over a layer, that are worth a thread."""


class _PassFailed(Exception):  # noqa: N818 - never seen outside
    """Another chunk has failed; its error is the one to tell."""


@dataclass(frozen=True)
class RowPlan:
    """How the rows of one pass are cut; see :func:`plan_rows`."""

    chunks: tuple[slice, ...]
    num_streams: int


def plan_rows(spec: ModelSpec, num_rows: int, cores: int) -> RowPlan:
    """Chunks of nearly equal size, and how many of them are under way at once."""
    layer = [spec.map(kind, 0) for kind in ("qkv", "o", "gate_up", "down")]
    row_bytes = sum((m.in_features + m.out_features) * m.ring_bytes for m in layer) // len(layer)
    least = max(MIN_CHUNK_ROWS, -(-MIN_CHUNK_BYTES // row_bytes))
    num_streams = max(1, min(MAX_STREAMS, cores, num_rows // least))
    most = min(MAX_CHUNK_ROWS, *(most_rows(m) for m in spec.maps if m.kind != "lm_head"))
    per_stream = -(-num_rows // (num_streams * most))
    num_chunks = num_streams * per_stream if num_streams > 1 else 1
    bounds = [num_rows * i // num_chunks for i in range(num_chunks + 1)]
    chunks = tuple(slice(a, b) for a, b in pairwise(bounds))
    return RowPlan(chunks, num_streams)


class _Pass:
    """What the chunks of one pass share."""

    def __init__(self, num_chunks: int) -> None:
        self.logits: list[Tensor | None] = [None] * num_chunks
        self.error: BaseException | None = None
        self.order = new_order(num_chunks)
        self._lock = threading.Lock()

    def check(self) -> None:
        if self.error is not None:
            raise _PassFailed

    def fail(self, error: BaseException) -> bool:
        """Stop all chunks; True for the first error, which is the one that counts."""
        with self._lock:
            first = self.error is None
            if first:
                self.error = error
        fail(self.order)
        return first


@dataclass(frozen=True)
class _Turn:
    """One chunk's place in its pass."""

    shared: _Pass
    number: int

    @property
    def order(self) -> ChunkOrder:
        return self.shared.order

    def keys_written(self, layer: int) -> None:
        if not keys_written(self.order, self.number, layer):
            self.shared.check()

    def check(self) -> None:
        self.shared.check()


class RowStreams:
    """Passes of many rows, over the client's own connection and further ones.

    Chunk i goes over connection i mod the number of connections. The further connections are opened
    for a pass, while its first chunk is under way, and closed at its end, and so are its threads. A
    server that has no room for them leaves the pass with fewer.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        store: PadStore,
        link: ServerLink,
        options: LinkOptions,
        single: MaskedExecutor,
    ) -> None:
        """``single``: takes the passes that are too short to be cut, and counts slots."""
        self._bundle = bundle
        self._store = store
        self._link = link
        self._options = options
        self._single = single
        self._rope = RopeTables(bundle.spec.rope, bundle.spec.head_dim)
        self._tables = StepTables(bundle)

    def forward(
        self, token_ids: Sequence[int], cache: KVCache, logits_for: LogitsFor
    ) -> Tensor | None:
        """One pass of the program; see :func:`otpipe.model.program.forward`.

        Raises:
            SlotDamaged, ConnectionLost, OtpipeError: the first that any chunk met. No thread and no
                further connection is left, and ``cache`` is where it was.
        """
        spec = self._bundle.spec
        plan = plan_rows(spec, len(token_ids), torch.get_num_threads())
        if plan.num_streams == 1:
            return forward(self._single, token_ids, cache, logits_for)
        check_tokens(spec, token_ids, cache.length)
        end = cache.length + len(token_ids)
        self._rope.rows(0, end)
        caches = self._tables.caches(cache, end)
        for rows in plan.chunks:
            self._tables.heads(rows.stop - rows.start)
        shared = _Pass(len(plan.chunks))
        with self._store.draw(len(token_ids)) as lease:
            self._single.slots_used += len(token_ids)
            last = len(plan.chunks) - 1
            chunks = [
                Chunk(
                    lease,
                    rows,
                    cache,
                    "none" if logits_for == "last" and number < last else logits_for,
                    _Turn(shared, number),
                    caches,
                )
                for number, rows in enumerate(plan.chunks)
            ]
            self._run(shared, plan.num_streams, chunks, token_ids)
        if shared.error is not None:
            raise shared.error
        cache.advance(len(token_ids))
        logits = [part for part in shared.logits if part is not None]
        return torch.cat(logits) if logits else None

    def _run(
        self, shared: _Pass, num_streams: int, chunks: list[Chunk], token_ids: Sequence[int]
    ) -> None:
        """All chunks, in threads that have ended when this returns or raises."""
        num_threads = torch.get_num_threads()
        links, all_open = [self._link], threading.Event()

        def give_up(error: BaseException) -> None:
            if shared.fail(error):
                self._link.interrupt()
                for link in links[1:]:
                    link.close()

        def stream(first: int) -> None:
            executor = ChunkExecutor(self._bundle, self._rope, self._tables, links[first])
            try:
                number = first
                while number < len(chunks):
                    chunk = chunks[number]
                    shared.logits[number] = executor.run(chunk, token_ids[chunk.rows])
                    all_open.wait()
                    number += len(links)
            except BaseException as error:
                give_up(error)

        try:
            # The chunks are what runs in parallel: inside one, a second thread would only wait.
            with ThreadPoolExecutor(num_streams, "rows", torch.set_num_threads, (1,)) as pool:
                try:
                    streams = [pool.submit(stream, 0)]
                    wait([pool.submit(self._open, links) for _ in range(num_streams - 1)])
                    all_open.set()
                    streams += [pool.submit(stream, first) for first in range(1, len(links))]
                    wait(streams)
                except BaseException as error:  # the user's Ctrl-C
                    give_up(error)
                    all_open.set()
                    raise
        finally:
            torch.set_num_threads(num_threads)  # the streams have set the default of new threads
            for link in links[1:]:
                link.close()
                self._link.absorb(link)
            self._link.resume()

    def _open(self, links: list[ServerLink]) -> None:
        """Add one more connection to the same weights, where the server has room for it."""
        try:
            fingerprint = self._link.welcome.fingerprint
            links.append(ServerLink(self._options, fingerprint, seek_for_s=0.0))
        except OtpipeError as error:
            log.info("a pass goes on with fewer connections: %s", error)
