"""What each of the two parties of ``private_layers.py`` runs, and what it sees.

Both decode a few tokens of one text through some whole decoder layers. The positions before are
filled with shares of noise: in the cache, and in what the prepared products have opened. The
server runs every token on plaintext as well. Inputs, keys and values are noise that both parties
make from one seed, so that the server can do that; they are shared with fresh masks.

Symbols: K key/value heads, G query heads of each, D head size.
"""

from __future__ import annotations

import functools
import gc
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from layer_costs import PRODUCTS, attention_sizes, end_counts, layer_counts
from layer_material import (
    Exchange,
    Masks,
    Pads,
    Source,
    answer,
    ask,
    ask_dealer,
    deal,
    description_of,
    new_secret,
    noise_weights,
)
from layer_meter import CountedProducts, Figures, Meter
from numpy.typing import NDArray
from secure_channel import Peer
from torch import Tensor

from otpipe.model.private_description import FORMATS, PrivateDescription
from otpipe.model.private_maps import ClientMaps, LinearMaps, PlainMaps, ServerMaps
from otpipe.model.private_program import PrivateProgram, Runner, Stage
from otpipe.model.private_weights import PrivateWeights
from otpipe.secure import PlainOperations, Share
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.rlwe_products import PreparedProducts
from otpipe.secure.shares import random_ring

_CPU = torch.device("cpu")
_SMALL = 64
Results = dict[str, NDArray[Any]]
"""Of one token, by part: integers, and the logits."""


@dataclass(frozen=True)
class Job:
    """What both parties are to run.

    Attributes:
        shape: of ``shapes.SHAPES``.
        layers: measured, from the second one of the model on (the first has other formats).
        positions: of the text when the last token is done.
        tokens: run one after the other; the first warms up.
        num_slots: of the batch that the slots come from.
        source: of the slots of the layers; those of the ends are dealt.
        ends: whether embedding and head are run.
        threads: of each party online; ahead of time each has all cores.
    """

    shape: str
    layers: int
    positions: int
    tokens: int
    num_slots: int
    source: Source
    ends: bool
    threads: int

    @property
    def measured(self) -> range:
        """Numbers of the layers."""
        return range(1, 1 + self.layers)


@dataclass
class Party:
    """One of the two parties of a job. The order of its methods is that of both."""

    peer: Peer
    job: Job
    description: PrivateDescription = field(init=False)

    def __post_init__(self) -> None:
        self.description = description_of(self.job.shape)
        self.program = PrivateProgram(self.description)
        self.meter = Meter(self.peer)
        self.cache = self.program.new_cache()
        self._generator = torch.Generator().manual_seed(7)  # of inputs that are no secret
        self._weights: dict[int, Any] = {}
        self._slots: dict[int, Any] = {}
        sizes = attention_sizes(self.description)
        self.products = PreparedProducts(
            "server" if self.peer.is_server else "client",
            self.peer.channel,
            sizes,
            list(self.job.measured),
            self.peer.device,
        )

    # --- ahead of time --------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile what preparations run, by small ones."""
        channel, first = self.peer.channel, self.description.maps[1]
        shape = replace(first, in_features=_SMALL, out_features=_SMALL, segments=(_SMALL,))
        exchange = Exchange.of(shape, self.job.num_slots, 1)
        sizes = attention_sizes(self.description)
        small = replace(sizes, heads=HeadShapes(2, 1, 8))
        layers, device = [0], self.peer.device
        if self.peer.is_server:
            noise = torch.ones((_SMALL, _SMALL), dtype=torch.int8, device=device)
            ones = torch.ones(_SMALL, dtype=torch.int64, device=device)
            answer(exchange, channel, PrivateWeights(noise, ones, None, ()))
            PreparedProducts("server", channel, small, layers, device).prepare(8)
        else:
            ask(exchange, channel, new_secret())
            PreparedProducts("client", channel, small, layers).prepare(8)

    def make_slots(self) -> dict[str, Figures]:
        """Weights, then the slots of every map; figures of the layers' maps, by kind."""
        spec = self.description.spec
        stages = [Stage("layer", layer) for layer in self.job.measured]
        ends = [Stage("embed"), Stage("head")] if self.job.ends else []
        secret = None if self.peer.is_server else new_secret()
        for stage in [*stages, *ends]:
            source: Source = "dealt" if stage.layer is None else self.job.source
            for index in stage.map_indices(spec):
                if self.peer.is_server:
                    weights = noise_weights(self.description, index, self.peer.device)
                    self._weights[index] = weights
                self._slots[index] = self._apart(
                    spec.maps[index].kind, functools.partial(self._make, index, source, secret)
                )
        found = {kind: self.meter.totals.pop(kind) for kind in ("qkv", "o", "gate_up", "down")}
        self.meter.totals.clear()
        return found if self.job.source == "rlwe" else {}

    def _make(self, index: int, source: Source, secret: Any) -> Any:
        shape, channel = self.description.maps[index], self.peer.channel
        if source == "dealt":
            if self.peer.is_server:
                return deal(shape, self.job.tokens, channel, self._weights[index])
            return ask_dealer(shape, self.job.tokens, channel)
        exchange = Exchange.of(shape, self.job.num_slots, self.job.tokens)
        if self.peer.is_server:
            return answer(exchange, channel, self._weights[index])
        return ask(exchange, channel, secret)

    def prepare_products(self) -> Figures:
        """All positions of the text in one block."""
        self._apart(PRODUCTS, lambda: self.products.prepare(self.job.positions))
        return self.meter.totals.pop(PRODUCTS)

    def fill(self) -> None:
        """The positions before the first token: keys, values, and rows that are not looked at."""
        before = self.job.positions - self.job.tokens
        heads, spec = attention_sizes(self.description).heads, self.description.spec
        K, D, G = heads.num_kv_heads, heads.head_dim, heads.num_heads // heads.num_kv_heads
        key, value, query = FORMATS.key, FORMATS.value, FORMATS.query
        plain = self.program.new_cache()
        for layer in self.job.measured:
            keys, values = (
                self.noise((K, before, D), each.frac, each.bits) for each in (key, value)
            )
            plain.append(layer, keys, values)
            own = [self.share(secret) for secret in (keys, values)]
            self.cache.append(layer, *own)
            queries = Share(self._zeros(K, before * G, D), query.bits, query.frac)
            weights = Share(self._zeros(K, before * G, before), FORMATS.context_bits)
            party = self.peer.party
            party.run(self.products.scores(party, layer, queries, own[0], query.bits))
            party.run(self.products.context(party, layer, weights, own[1], weights.bits))
        self.cache.advance(before)
        plain.advance(before)
        self._plain_cache = plain
        assert spec.num_heads == K * G

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.peer.device)

    def _apart(self, name: str, action: Callable[[], Any]) -> Any:
        """Run and count it, with all cores, while nothing else runs at either party."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.peer.synchronize()
        with self.meter.count(name):
            result = action()
            self._meet()
        torch.set_num_threads(self.job.threads)
        return result

    def _meet(self) -> None:
        """Wait for the own device and for the other party; the latter counts as waiting."""
        self.peer.wait_for_device()
        started_s = time.perf_counter()
        self.peer.channel.meet()
        self.peer.channel.waited_s += time.perf_counter() - started_s

    # --- inputs ---------------------------------------------------------------------------------

    def noise(self, shape: tuple[int, ...], frac: int, bits: int) -> Share:
        """Normal numbers that both parties know, as a whole."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        integers = (values * 2.0**frac).round().to(torch.int64)
        return Share.of(integers.to(self.peer.device), bits, frac)

    def share(self, secret: Share) -> Share:
        """Own share of something that both know."""
        mask = random_ring(secret.shape, secret.bits, _CPU).to(self.peer.device)
        party = self.peer.party
        given = party.run(party.give_to_server(secret.data - mask, secret.bits))
        return Share(mask if given is None else given, secret.bits, secret.frac)

    # --- tokens ---------------------------------------------------------------------------------

    def run_tokens(self) -> dict[str, Any]:
        """All tokens; figures of each but the first, and what they brought."""
        runner = self._runner()
        residual = FORMATS.residual
        hidden = self.description.spec.hidden_size
        cots = self._cots()
        tokens, ahead = [], []
        outputs: list[Results] = []
        plain: list[Results] = []
        for number in range(self.job.tokens):
            x = self.noise((1, hidden), residual.frac, residual.bits)
            own = self.share(x)
            self._apart("COTs", lambda: self.peer.make_cots(cots))
            ahead.append(self.meter.totals.pop("COTs"))
            made = self.peer.channel.sent_bytes["ot.corrections"]
            self.peer.synchronize()
            results = self._token(runner, own, number)
            assert self.peer.channel.sent_bytes["ot.corrections"] == made, "COTs made online"
            tokens.append(dict(self.meter.totals))
            self.meter.totals.clear()
            outputs.append(self._opened(results))
            if self.peer.is_server:
                plain.append(self._plain_token(x, number))
        return {
            "tokens": tokens[1:],
            "cots": ahead[1:],
            "results": plain if self.peer.is_server else outputs,
        }

    def _runner(self) -> Runner:
        party, meter = self.peer.party, self.meter
        maps: LinearMaps
        if self.peer.is_server:
            maps = ServerMaps(party, self.description, self._weights, Masks(self._slots))
        else:
            maps = ClientMaps(party, self.description, Pads(self._slots))
        return Runner(party, maps, CountedProducts(self.products, meter), meter.measure)

    def _token(self, runner: Runner, x: Share, number: int) -> dict[str, Any]:
        """One token through the measured parts; "layers" is the whole of all layers."""
        party, program = self.peer.party, self.program
        results: dict[str, Any] = {}
        silent = Runner(party, runner.maps)
        if self.job.ends:
            with self.meter.count("embed"):
                given = None if self.peer.is_server else [number]
                results["embed"] = party.run(program.embed(silent, 1, given))
                self._meet()
        started_s = time.perf_counter()
        with self.meter.count("rest"):
            for layer in self.job.measured:
                x = party.run(program.layer(runner, layer, x, self.cache))
            self._meet()
        self.meter.totals["layers"] = {"seconds": time.perf_counter() - started_s}
        self.cache.advance(1)
        results["layers"] = x
        if self.job.ends:
            with self.meter.count("head"):
                results["logits"] = party.run(program.head(silent, x, "last"))
                self._meet()
        return results

    def _opened(self, results: dict[str, Any]) -> Results:
        """Shares told to the client, for the comparison; nothing at the server."""
        party = self.peer.party
        opened = {
            name: party.run(party.reveal_to_client(value)) if isinstance(value, Share) else value
            for name, value in results.items()
        }
        return {name: value.numpy() for name, value in opened.items() if value is not None}

    def _cots(self) -> int:
        positions = self.job.positions
        counts = [layer_counts(self.description, layer, positions) for layer in self.job.measured]
        if self.job.ends:
            counts.append(end_counts(self.description))
        return sum(each.cots for parts in counts for each in parts.values())

    def _plain_token(self, x: Share, number: int) -> Results:
        """The same by the program on plaintext."""
        ops = PlainOperations(self.peer.device)
        runner = Runner(ops, PlainMaps(self.description, self._weights))
        results = {}
        if self.job.ends:
            results["embed"] = ops.run(self.program.embed(runner, 1, [number]))
        for layer in self.job.measured:
            x = ops.run(self.program.layer(runner, layer, x, self._plain_cache))
        self._plain_cache.advance(1)
        results["layers"] = x
        opened = {name: ops.run(ops.reveal_to_client(value)) for name, value in results.items()}
        if self.job.ends:
            opened["logits"] = ops.run(self.program.head(runner, x, "last"))
        return {name: value.cpu().numpy() for name, value in opened.items() if value is not None}


def work(peer: Peer, job: Job) -> dict[str, Any]:
    """Everything, as one of the two parties."""
    party = Party(peer, job)
    party.warm_up()
    slots = party.make_slots()
    gc.collect()
    products = party.prepare_products()
    party.fill()
    found = party.run_tokens()
    found["slots"], found["products"] = slots, products
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["peak_device_bytes"] = torch.cuda.max_memory_allocated() if peer.device == "cuda" else 0
    return found
