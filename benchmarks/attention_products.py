"""The two matrix products of attention from prepared masks: one layer, both parties, no network.

    python benchmarks/attention_products.py --shape 0.5b --positions 64 --positions 64

Both parties are threads of one process on the same cores: the seconds of a preparation are those of
both together. A prompt of all positions but one is then run, and
one decode step is timed; its results are checked against integers.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import harness
import torch
from shapes import SHAPES

from otpipe.crypto.private_matmul_noise import log2_distance
from otpipe.ot import LocalChannel, local_channels
from otpipe.secure import Party, Share
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.ring_matmul import ring_matmul
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts
from otpipe.secure.shares import random_ring, reduced

SCORE_BITS, CONTEXT_BITS = 40, 51
CPU = torch.device("cpu")


class _NoTransfers:
    """These products take no oblivious transfer."""

    def exchange(self, requests: Any) -> list[Any]:
        raise AssertionError("an oblivious transfer was asked for")


def both(server: Callable[[], Any], client: Callable[[], Any]) -> tuple[float, Any, Any]:
    """Seconds of both calls, in two threads, and their results."""
    results: list[Any] = [None]
    thread = threading.Thread(target=lambda: results.__setitem__(0, server()))
    started_s = time.perf_counter()
    thread.start()
    own = client()
    thread.join()
    return time.perf_counter() - started_s, results[0], own


def split(secret: Share, device: str) -> tuple[Share, Share]:
    """Shares (server, client)."""
    client = random_ring(secret.shape, secret.bits, CPU)
    return (
        Share.of((secret.data - client).to(device), secret.bits),
        Share(client, secret.bits),
    )


def quartiles(seconds: Sequence[float], scale: float) -> list[float]:
    """First quartile, median and third quartile, times ``scale``."""
    if len(seconds) == 1:
        return [scale * seconds[0]] * 3
    return [scale * cut for cut in statistics.quantiles(seconds, n=4, method="inclusive")]


class Layer:
    """Both parties of one layer."""

    def __init__(self, sizes: AttentionSizes, device: str) -> None:
        self.sizes, self._device = sizes, device
        ends = local_channels(3600.0)
        self.ends: dict[str, LocalChannel] = {"server": ends[0], "client": ends[1]}
        self.parties = (
            Party("server", _NoTransfers(), ends[0], device),
            Party("client", _NoTransfers(), ends[1]),
        )
        self.products = (
            PreparedProducts("server", ends[0], sizes, [0], device),
            PreparedProducts("client", ends[1], sizes, [0]),
        )

    def sent(self) -> int:
        """Payload bytes of both directions so far."""
        return sum(sum(end.sent_bytes.values()) for end in self.ends.values())

    def prepare(self, count: int) -> float:
        """Seconds."""
        server, client = self.products
        return both(lambda: server.prepare(count), lambda: client.prepare(count))[0]

    def product(self, method: str, x: tuple[Share, Share], y: tuple[Share, Share]) -> Any:
        """Seconds and the opened product."""

        def one(side: int) -> Share:
            step = getattr(self.products[side], method)
            party = self.parties[side]
            return party.run(step(party, 0, x[side], y[side], x[side].bits))

        seconds, server, client = both(lambda: one(0), lambda: one(1))
        return seconds, reduced(server.data.cpu() + client.data, client.bits)

    def rows(self, first: int, stop: int, keys: Share, values: Share) -> list[float]:
        """Both products of some positions, checked: seconds of each."""
        heads = self.sizes.heads
        K, D = heads.num_kv_heads, heads.head_dim
        position = torch.arange(first, stop).repeat_interleave(self.sizes.group)
        seen = torch.arange(stop) <= position[:, None]
        q = Share(random_ring((K, len(seen), D), SCORE_BITS, CPU), SCORE_BITS)
        w = Share(random_ring((K, *seen.shape), CONTEXT_BITS, CPU) * seen, CONTEXT_BITS)
        shares = split(w, self._device)
        hidden = [Share(share.data * seen.to(share.data.device), w.bits) for share in shares]
        w = Share.of(hidden[0].data.cpu() + hidden[1].data, w.bits)
        k, v = keys[:, :stop], values[:, :stop]
        took = []
        for method, x, pair, y, other, bits in (
            ("scores", q, split(q, self._device), k, k.data.transpose(1, 2), SCORE_BITS),
            ("context", w, (hidden[0], hidden[1]), v, v.data, CONTEXT_BITS),
        ):
            seconds, got = self.product(method, pair, split(y, self._device))
            want = ring_matmul(x.data, other, bits)
            if not torch.equal(got, want * seen if method == "scores" else want):
                raise SystemExit(f"wrong {method} of positions {first} to {stop - 1}")
            took.append(seconds)
        return took


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--positions", type=int, multiple=True, default=(64,), help="Of each block.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="The server's.")
@click.option("--kv-heads", type=int, help="Measure so many of the key/value heads.")
@click.option("--repeats", type=int, default=5, help="Preparations, each from nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    positions: tuple[int, ...],
    device: str,
    kv_heads: int | None,
    repeats: int,
    out: Path | None,
) -> None:
    """Prepare blocks of positions of one layer, then decode the last one."""
    published = SHAPES[shape]
    num_heads, num_kv = int(published["heads"]), int(published["kv"])
    group, size = num_heads // num_kv, int(published["hidden"]) // num_heads
    measured = min(kv_heads or num_kv, num_kv)
    sizes = AttentionSizes(HeadShapes(group * measured, measured, size), SCORE_BITS, CONTEXT_BITS)

    small = Layer(AttentionSizes(HeadShapes(2, 1, 8), SCORE_BITS, CONTEXT_BITS), device)
    small.prepare(8)  # compiles and warms up
    total = sum(positions)
    runs: list[list[float]] = []
    for _ in range(repeats):
        layer = Layer(sizes, device)
        runs.append([layer.prepare(count) for count in positions])
    first, expected, distance = 0, 0, []
    for count in positions:
        expected += 32 + sum(sizes.preparation_bytes(first, first + count))
        layers = int(published["layers"]) * num_kv
        distance.append(log2_distance((p, layers) for p in sizes.plans(first, first + count)))
        first += count
    ahead = layer.sent()
    if ahead != expected:
        raise SystemExit(f"{ahead} bytes were sent, {expected} computed")

    keys = Share(random_ring((measured, total, size), SCORE_BITS, CPU), SCORE_BITS)
    values = Share(random_ring((measured, total, size), CONTEXT_BITS, CPU), CONTEXT_BITS)
    decoded = min(8, total - 1)
    prompt_s = layer.rows(0, total - decoded, keys, values)
    steps = [layer.rows(at, at + 1, keys, values) for at in range(total - decoded, total)]
    online = layer.sent() - ahead
    computed = sizes.online_bytes(0, total - decoded)
    computed += sum(sizes.online_bytes(at, 1) for at in range(total - decoded, total))
    if online != 2 * computed:
        raise SystemExit(f"{online} bytes were sent, {2 * computed} computed")

    scale = num_kv / measured
    result = {
        "machine": {**harness.machine(), "link": "none: both parties in one process"},
        "shape": shape,
        "device": device,
        "kv_heads_measured": measured,
        "kv_heads": num_kv,
        "blocks": list(positions),
        "repeats": repeats,
        "prepare_s_per_layer": [quartiles(block, scale) for block in zip(*runs, strict=True)],
        "prepare_bytes_per_layer": int(scale * (ahead - 32 * len(positions))),
        "log2_distance_of_a_block_all_layers": distance,
        "prompt_s": prompt_s,
        "decode_s": statistics.median(sum(step) for step in steps),
        "decode_bytes_per_layer": 2 * int(scale * sizes.online_bytes(total - 1, 1)),
    }
    click.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
