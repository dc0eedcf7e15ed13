"""Oblivious transfer: setup, and what each party does per second, alone and together.

    python benchmarks/ot.py [--device cuda] [--threads 1] [--out ot.json]

Each party's own computation is timed with the other's messages recorded, so that the two do not
share a core and no network is measured; "both" runs the two in two threads of one process.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from harness import machine, quartiles, timed

from otpipe.ot import OtParams, OtReceiver, OtSender, local_channels
from otpipe.ot.channel import Bytes
from otpipe.ot.costs import bits_per_transfer, setup_traffic
from otpipe.ot.extension import BLOCK_COTS
from otpipe.ot.params import OT_PARAMS
from otpipe.ot.plan import Shape

COTS = 1 << 20

#: name, correlated, transfers, index bits, words, bits
CALLS = [
    ("correlated, 44 bits", True, 1 << 19, 1, 1, 44),
    ("correlated row, 128 words of 44 bits", True, 1 << 14, 1, 128, 44),
    ("chosen, 1 bit", False, 1 << 19, 1, 1, 1),
    ("one of 16, 2 bits", False, 1 << 17, 4, 1, 2),
    ("one of 256, 37 bits", False, 1 << 14, 8, 1, 37),
    ("one of 256, 2 words of 44 bits", False, 1 << 14, 8, 2, 44),
]


class Replay:
    """One party's end: messages of the other come from a recording, its own go nowhere."""

    def __init__(self) -> None:
        self.incoming: list[tuple[str, Bytes]] = []
        self.sent: list[tuple[str, Bytes]] = []

    def send(self, label: str, payload: Bytes) -> None:
        """Keep the message for the other party's replay."""
        self.sent.append((label, payload))

    def receive(self, label: str, num_bytes: int) -> Bytes:
        """The recorded message."""
        got, payload = self.incoming.pop(0)
        assert (got, payload.size) == (label, num_bytes)
        return payload


def together(server: Callable[[], object], client: Callable[[], object]) -> None:
    """Both parties' calls in two threads."""
    thread = threading.Thread(target=server)
    thread.start()
    client()
    thread.join()


class Parties:
    """A session whose parties can be timed one at a time."""

    def __init__(self, params: OtParams, device: str) -> None:
        self.server_end, self.client_end = Replay(), Replay()
        server, client = local_channels()
        self.sender, self.receiver = OtSender(server, device, params), OtReceiver(client, params)
        self.device = device
        self.setup_s = timed(lambda: together(self.sender.setup, self.receiver.setup), device)
        self.sender._channel, self.receiver._channel = self.server_end, self.client_end

    def extend(self, count: int) -> tuple[float, float]:
        """Seconds of the receiver and of the sender."""
        receiver_s = timed(lambda: self.receiver.extend(count))
        self.server_end.incoming, self.client_end.sent = self.client_end.sent, []
        return receiver_s, timed(lambda: self.sender.extend(count), self.device)

    def call(self, shape: Shape) -> tuple[float, float]:
        """Seconds of the receiver and of the sender in one exchange, COTs in the pool."""
        self.extend(shape.cots)
        choices = random_bytes(shape.count) & np.uint8(shape.num_messages - 1)
        tail = (shape.words,) if shape.correlated else (shape.num_messages, shape.words)
        size = shape.count * int(np.prod(tail))
        values = torch.from_numpy(np.frombuffer(random_bytes(8 * size), np.int64).copy())
        values = values.view(shape.count, *tail).to(self.device)
        send = self.sender.send_correlated if shape.correlated else self.sender.send_one_of_many

        # The receiver sends, then waits: its call runs in a thread while its answers are made.
        ready, answers = threading.Event(), threading.Event()
        end = self.client_end
        original = end.receive
        waited_s = []

        def receive(label: str, num_bytes: int) -> Bytes:
            if not answers.is_set():
                waited_s.append(timed(lambda: (ready.set(), answers.wait())))
            return original(label, num_bytes)

        end.receive = receive  # type: ignore[method-assign]
        if shape.correlated:
            chooses = lambda: self.receiver.receive_correlated(choices, shape.bits, shape.words)  # noqa: E731
        else:
            chooses = lambda: self.receiver.receive_one_of_many(  # noqa: E731
                choices, shape.index_bits, shape.bits, shape.words
            )
        took: list[float] = []
        thread = threading.Thread(target=lambda: took.append(timed(chooses)))
        thread.start()
        ready.wait()
        self.server_end.incoming, end.sent = end.sent, []
        sender_s = timed(lambda: send(values, shape.bits), self.device)
        end.incoming, self.server_end.sent = self.server_end.sent, []
        answers.set()
        thread.join()
        end.receive = original  # type: ignore[method-assign]
        return took[0] - sum(waited_s), sender_s


def random_bytes(count: int) -> Bytes:
    """Uniform bytes."""
    return np.frombuffer(os.urandom(count), np.uint8)


def rate(count: int, seconds: list[float]) -> dict[str, float]:
    """Quartiles of a rate."""
    return quartiles([count / value for value in seconds])


def measure_extension(k: int, device: str, repeats: int) -> dict[str, object]:
    """COTs a second of each party, and of both at once."""
    params = OT_PARAMS[f"softspoken{k}"]
    parties = Parties(params, device)
    parties.extend(2 * BLOCK_COTS)
    times = [parties.extend(COTS) for _ in range(repeats)]
    server, client = local_channels()
    sender, receiver = OtSender(server, device, params), OtReceiver(client, params)
    together(sender.setup, receiver.setup)
    both_s = [
        timed(lambda: together(lambda: sender.extend(COTS), lambda: receiver.extend(COTS)), device)
        for _ in range(repeats)
    ]
    traffic = setup_traffic(params)
    return {
        "setup_s": parties.setup_s,
        "setup_bytes": traffic.to_sender + traffic.to_receiver,
        "bits_per_cot": params.extension_bits,
        "receiver_cots_per_s": rate(COTS, [receiver_s for receiver_s, _ in times]),
        "sender_cots_per_s": rate(COTS, [sender_s for _, sender_s in times]),
        "both_cots_per_s": rate(COTS, both_s),
    }


def measure_calls(device: str, repeats: int) -> dict[str, object]:
    """Transfers a second of each party with the default parameters."""
    params = OT_PARAMS["softspoken4"]
    parties = Parties(params, device)
    results: dict[str, object] = {}
    for name, correlated, count, index_bits, words, bits in CALLS:
        shape = Shape(correlated, count, index_bits, words, bits)
        parties.call(shape)
        times = [parties.call(shape) for _ in range(repeats)]
        up, down = bits_per_transfer(params, shape)
        results[name] = {
            "transfers": count,
            "bits_to_sender": up,
            "bits_to_receiver": down,
            "receiver_per_s": rate(count, [receiver_s for receiver_s, _ in times]),
            "sender_per_s": rate(count, [sender_s for _, sender_s in times]),
        }
    return results


def shown(quartile: object) -> str:
    """Median and quartiles in millions."""
    assert isinstance(quartile, dict)
    low, middle, high = (quartile[key] / 1e6 for key in ("q1", "median", "q3"))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Cores of each party.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--k", "exponents", default="1,2,4,8", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
def main(device: str, threads: int, repeats: int, exponents: str, out: Path | None) -> None:
    """Measure and print; see the module's text."""
    torch.set_num_threads(threads)
    result: dict[str, object] = {
        "machine": machine() | {"link": "none: each party's own computation"},
        "device": device,
        "threads": threads,
        "repeats": repeats,
    }
    print("| extension | bits a COT | setup, s | receiver, M/s | sender, M/s | both at once, M/s |")
    print("|---|---|---|---|---|---|")
    extension = {}
    for k in map(int, exponents.split(",")):
        row = extension[f"k = {k}"] = measure_extension(k, device, repeats)
        print(
            f"| k = {k} | {row['bits_per_cot']} | {row['setup_s']:.2f} | "
            f"{shown(row['receiver_cots_per_s'])} | {shown(row['sender_cots_per_s'])} | "
            f"{shown(row['both_cots_per_s'])} |"
        )
    print(
        "\n| transfer | bits up | bits down | receiver, M/s | sender, M/s |\n|---|---|---|---|---|"
    )
    calls = measure_calls(device, repeats)
    for name, row in calls.items():
        assert isinstance(row, dict)
        print(
            f"| {name} | {row['bits_to_sender']:g} | {row['bits_to_receiver']:g} | "
            f"{shown(row['receiver_per_s'])} | {shown(row['sender_per_s'])} |"
        )
    result |= {"extension": extension, "calls": calls}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
