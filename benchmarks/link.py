"""Decode over a link with delay and limited bandwidth, beside what the link alone would take.

    python benchmarks/link.py --shape 0.5b --links 0:0,10:1000,50:100

A proxy between client and server holds every piece back for half the round-trip time and for the
time its bytes take at the bandwidth. The prediction is rounds * RTT + bytes / bandwidth + compute,
where compute is the time of a token through the same proxy without delay.
"""

from __future__ import annotations

import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import harness
from shapes import SHAPES, write_checkpoint

from otpipe import Client

PIECE_BYTES = 1 << 16
PROMPT = [1, 2, 3, 4]


@contextmanager
def delayed(target: tuple[str, int], rtt_s: float, bytes_per_s: float) -> Iterator[str]:
    """A proxy to ``target``; yields its address. A bandwidth of 0 is unlimited."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def deliver() -> None:
            while True:
                due_s, piece = held.get()
                time.sleep(max(0.0, due_s - time.monotonic()))
                if not piece:
                    with suppress(OSError):
                        sink.shutdown(socket.SHUT_WR)
                    return
                with suppress(OSError):
                    sink.sendall(piece)

        threading.Thread(target=deliver, daemon=True).start()
        free_s = 0.0  # when the line has sent all that came before
        piece = b" "
        while piece:
            try:
                piece = source.recv(PIECE_BYTES)
            except OSError:
                piece = b""
            sent_s = len(piece) / bytes_per_s if bytes_per_s else 0.0
            free_s = max(time.monotonic(), free_s) + sent_s
            held.put((free_s + rtt_s / 2, piece))

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(target)
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def measure(address: str, store: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds, rounds and bytes of one decoded token."""
    with Client(address, store) as client:
        rates = []
        list(client.generate_ids(PROMPT, 2))
        for _ in range(repeats):
            list(client.generate_ids(PROMPT, tokens))
            assert client.last is not None
            rates.append(1 / client.last.stats.tokens_per_s)
        # Bytes and rounds of single tokens: what longer generations have more of.
        one, two = (_stats(client, count) for count in (2, 4))
    return {
        "token_s": harness.quartiles(rates),
        "rounds": (two.round_trips - one.round_trips) / 2,
        "bytes_up": (two.bytes_sent - one.bytes_sent) / 2,
        "bytes_down": (two.bytes_received - one.bytes_received) / 2,
    }


def _stats(client: Client, tokens: int) -> Any:
    list(client.generate_ids(PROMPT, tokens))
    assert client.last is not None
    return client.last.stats


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="0.5b")
@click.option("--layers", type=int, help="Shorten the model to so many layers.")
@click.option("--ranks", type=int, default=2)
@click.option("--links", default="0:0,10:1000,50:100", help="RTT in ms:Mbit/s[,...]; 0 is none.")
@click.option("--tokens", type=int, default=6, help="Tokens of one run.")
@click.option("--repeats", type=int, default=3)
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints go.")
@click.option("--store", type=click.Path(path_type=Path), help="Where pads go.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the result.")
def main(
    shape: str,
    layers: int | None,
    ranks: int,
    links: str,
    tokens: int,
    repeats: int,
    checkpoints: Path | None,
    store: Path | None,
    out: Path | None,
) -> None:
    pairs = [tuple(float(x) for x in link.split(":")) for link in links.split(",")]
    if pairs[0] != (0.0, 0.0):
        pairs.insert(0, (0.0, 0.0))  # the compute of the prediction
    with tempfile.TemporaryDirectory() as scratch:
        root = checkpoints or Path(scratch)
        name = shape if layers is None else f"{shape}-{layers}-layers"
        model = write_checkpoint(shape, root / name, "cpu", layers)
        pads = store or Path(scratch) / "store"
        rows = []
        with harness.server(model, ranks, "cpu") as (address, _):
            host, port = address.split(":")
            slots_a_link = (repeats + 3) * (len(PROMPT) + tokens)
            with Client(address, pads) as client:
                missing = len(pairs) * slots_a_link - client.free_slots
                if missing > 0:
                    client.prepare(missing)
            for rtt_ms, mbit_per_s in pairs:
                bytes_per_s = mbit_per_s * 1e6 / 8
                with delayed((host, int(port)), rtt_ms / 1e3, bytes_per_s) as proxied:
                    row = measure(proxied, pads, tokens, repeats)
                row |= {"rtt_ms": rtt_ms, "mbit_per_s": mbit_per_s}
                compute_s = (rows or [row])[0]["token_s"]["median"]
                line_s = (row["bytes_up"] + row["bytes_down"]) / bytes_per_s if bytes_per_s else 0.0
                row["predicted_s"] = row["rounds"] * rtt_ms / 1e3 + line_s + compute_s
                rows.append(row)
    print(table(rows))
    result = {"machine": harness.machine(), "shape": name, "ranks": ranks, "links": rows}
    harness.save(result, out)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| link | rounds | MB up | MB down | predicted s a token | measured [quartiles] | off |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        token = row["token_s"]
        off = token["median"] / row["predicted_s"] - 1
        bandwidth = f"{row['mbit_per_s']:.0f} Mbit/s" if row["mbit_per_s"] else "no limit"
        lines.append(
            f"| {row['rtt_ms']:.0f} ms, {bandwidth} | {row['rounds']:.0f} "
            f"| {row['bytes_up'] / 1e6:.2f} | {row['bytes_down'] / 1e6:.2f} "
            f"| {row['predicted_s']:.3f} "
            f"| {token['median']:.3f} [{token['q1']:.3f}, {token['q3']:.3f}] | {off:+.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
