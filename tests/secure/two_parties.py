"""Runs one program of secure operations as both parties, on the ideal or the real OT stack."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ideal_ot import InsecureIdealOt
from torch import Tensor

from otpipe.ot import LocalChannel, OtReceiver, OtSender, local_channels
from otpipe.secure import Cost, Party, PlainOperations, SecureOperations, Share, Step
from otpipe.secure.shares import random_ring, reduced, signed

Program = Callable[..., Step[Any]]
CPU = torch.device("cpu")


@dataclass
class TwoParties:
    """A server and a client that are connected.

    Attributes:
        ideal: the trusted party, where OT is ideal.
    """

    server: Party
    client: Party
    server_end: LocalChannel
    client_end: LocalChannel
    sessions: tuple[Any, Any]
    ideal: InsecureIdealOt | None

    def run(self, program: Program, server_args: Any, client_args: Any) -> tuple[Any, Any]:
        """Results of both parties; the first error of either raises."""
        return in_two_threads(
            lambda: self.server.run(program(self.server, *server_args)),
            lambda: self.client.run(program(self.client, *client_args)),
            self.server_end,
        )

    def compute(self, program: Program, *secrets: Share) -> Any:
        """Share ``secrets``, run the program on the shares, and open what it returns.

        Secrets and result are plaintext ``Share``s, as ``PlainOperations`` has them.
        """
        pairs = [split(secret) for secret in secrets]
        server, client = self.run(program, [a for a, _ in pairs], [b for _, b in pairs])
        return joined(server, client)

    def traffic(self) -> dict[str, int]:
        """Payload bytes and rounds so far, OT extension apart."""
        up, down = self.client_end.sent_bytes, self.server_end.sent_bytes
        return {
            "rounds": self.client_end.rounds,
            "extension_bytes": up["ot.corrections"],
            "to_server": up["ot.choices"] + up["secure.values"],
            "to_client": down["ot.answers"] + down["secure.values"],
        }


def in_two_threads(
    server: Callable[[], Any], client: Callable[[], Any], end: LocalChannel
) -> tuple[Any, Any]:
    """Results of both calls; the first error of either closes the line and raises."""
    results: list[Any] = [None, None]
    errors: list[BaseException] = []

    def one(side: int, call: Callable[[], Any]) -> None:
        try:
            results[side] = call()
        except BaseException as error:
            errors.append(error)
            end.close()

    thread = threading.Thread(target=one, args=(0, server))
    thread.start()
    one(1, client)
    thread.join()
    if errors:
        raise errors[0]
    return results[0], results[1]


def connect(kind: str, device: str = "cpu") -> TwoParties:
    """A new pair: kind "ideal" (insecure, fast) or "real"."""
    server_end, client_end = local_channels(60.0)
    if kind == "ideal":
        ideal: InsecureIdealOt | None = InsecureIdealOt()
        assert ideal is not None
        sessions: tuple[Any, Any] = ideal.ends(server_end, client_end)
    else:
        ideal = None
        sessions = OtSender(server_end, device), OtReceiver(client_end)
        in_two_threads(sessions[0].setup, sessions[1].setup, server_end)
    return TwoParties(
        Party("server", sessions[0], server_end, device),
        Party("client", sessions[1], client_end),
        server_end,
        client_end,
        sessions,
        ideal,
    )


def split(secret: Share) -> tuple[Share, Share]:
    """Uniform shares (server, client) of a plaintext."""
    client = random_ring(secret.shape, secret.bits, CPU)
    return (
        Share.of(secret.data - client, secret.bits, secret.frac),
        Share(client, secret.bits, secret.frac),
    )


def joined(server: Any, client: Any) -> Any:
    """What two shares stand for; lists and tuples member by member."""
    if isinstance(server, list | tuple):
        return [joined(a, b) for a, b in zip(server, client, strict=True)]
    assert isinstance(server, Share) and isinstance(client, Share)
    assert (server.bits, server.frac, server.shape) == (client.bits, client.frac, client.shape)
    return Share.of(server.data.cpu() + client.data, server.bits, server.frac)


def secret(values: Tensor, bits: int, frac: int = 0) -> Share:
    """A plaintext from signed integers."""
    return Share.of(values.to(torch.int64), bits, frac)


def fixed(values: Tensor, bits: int, frac: int) -> Share:
    """A plaintext from real numbers."""
    return Share.of((values.double() * 2.0**frac).round().to(torch.int64), bits, frac)


def integers(x: Share) -> Tensor:
    """The signed integers of a plaintext."""
    return signed(x.data, x.bits)


def real(x: Share) -> Tensor:
    """The real numbers of a plaintext, float64."""
    return integers(x).double() * 2.0**-x.frac


_salt = 0


def new_values(salt: int) -> None:
    """Let :func:`uniform` give other values from now on than with another ``salt``."""
    global _salt
    _salt = salt


def uniform(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Test values in [low, high): for the same arguments and salt the same."""
    generator = torch.Generator().manual_seed(hash((shape, low, high, _salt)) & 0x7FFFFFFF)
    return torch.randint(low, high, shape, generator=generator)


__all__ = [
    "CPU",
    "Cost",
    "PlainOperations",
    "Program",
    "SecureOperations",
    "TwoParties",
    "connect",
    "fixed",
    "integers",
    "joined",
    "new_values",
    "real",
    "reduced",
    "secret",
    "split",
    "uniform",
]
