"""Both parties of prepared attention products, in two threads."""

from __future__ import annotations

from two_parties import TwoParties, in_two_threads, joined

from otpipe.secure import Share
from otpipe.secure.operations import SecureOperations
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts


def prepared(
    parties: TwoParties, sizes: AttentionSizes, *blocks: int, layers: int = 1
) -> list[PreparedProducts]:
    """Both parties' objects, server first, with these blocks of positions."""
    made = [
        PreparedProducts("server", parties.server_end, sizes, range(layers)),
        PreparedProducts("client", parties.client_end, sizes, range(layers)),
    ]
    for count in blocks:
        prepare(parties, made, count)
    return made


def prepare(parties: TwoParties, made: list[PreparedProducts], count: int) -> None:
    in_two_threads(
        lambda: made[0].prepare(count), lambda: made[1].prepare(count), parties.server_end
    )


def multiply(
    parties: TwoParties,
    made: list[PreparedProducts],
    method: str,
    *factors: tuple[Share, Share],
    layer: int = 0,
) -> Share:
    """The opened result of one product of factors given as (server's share, client's share)."""
    bits = factors[0][0].bits

    def run(side: int, party: SecureOperations) -> Share:
        product = getattr(made[side], method)
        return party.run(product(party, layer, *(pair[side] for pair in factors), bits))

    results = in_two_threads(
        lambda: run(0, parties.server), lambda: run(1, parties.client), parties.server_end
    )
    opened = joined(*results)
    assert isinstance(opened, Share)
    return opened
