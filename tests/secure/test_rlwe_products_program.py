"""The whole private decoder on prepared attention products: cases of the common list, two ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from checkpoints import relative_error
from model_parties import PrivateModel, float_reference, load
from two_parties import in_two_threads

from otpipe.model.private_description import FORMATS, PrivateDescription
from otpipe.model.private_weights import PrivateWeights
from otpipe.model.program import forward
from otpipe.secure import Party, Share, Step
from otpipe.secure.decoder import HeadShapes
from otpipe.secure.rlwe_products import AttentionSizes, PreparedProducts


class OfBothParties:
    """``AttentionProducts`` that gives each party its own object."""

    def __init__(self, server: PreparedProducts, client: PreparedProducts) -> None:
        self._of = {True: server, False: client}

    def scores(self, ops: Party, *args: Any) -> Step[Share]:
        return self._of[ops.is_server].scores(ops, *args)

    def context(self, ops: Party, *args: Any) -> Step[Share]:
        return self._of[ops.is_server].context(ops, *args)


class PreparedModel(PrivateModel):
    """``PrivateModel`` whose attention products are prepared, block by block, by each rank."""

    def __init__(
        self,
        description: PrivateDescription,
        weights: Mapping[int, PrivateWeights],
        blocks: tuple[int, ...],
    ) -> None:
        super().__init__(description, weights, sum(blocks), world_size=2)
        spec = description.spec
        heads = HeadShapes(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        sizes = AttentionSizes(heads, FORMATS.score.bits, FORMATS.context_bits)
        for rank, each in enumerate(self.connections):
            layers = [layer for layer in range(spec.num_layers) if layer % 2 == rank]
            server = PreparedProducts("server", each.server_end, sizes, layers)
            client = PreparedProducts("client", each.client_end, sizes, layers)
            for count in blocks:
                in_two_threads(
                    lambda server=server, count=count: server.prepare(count),
                    lambda client=client, count=count: client.prepare(count),
                    each.server_end,
                )
            self._products[rank] = OfBothParties(server, client)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("qwen2_gqa_3_heads_1_kv", "qwen2_sharded_fp16")],
    ids=lambda case: case.name,
)
def test_logits_are_those_of_the_integer_weights(
    case: Case, case_directory: Callable[[Case], Path]
) -> None:
    """Prompt, chunks and single tokens; the second block begins inside the prompt or a chunk."""
    description, weights = load(case_directory(case))
    model = PreparedModel(description, weights, (6, 7))
    ends = list(accumulate(case.chunks, initial=0))
    passes = [model.forward(case.token_ids[lo:hi]) for lo, hi in pairwise(ends)]
    got = torch.cat([logits for logits in passes if logits is not None])
    reference = float_reference(description, weights)
    want = forward(reference, case.token_ids, reference.new_cache(), "all")
    assert want is not None and got.shape == want.shape
    assert relative_error(got, want) < 4e-3
