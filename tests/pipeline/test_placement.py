"""The placement table: total, explicit, and right where layers do not divide by ranks."""

from __future__ import annotations

import dataclasses

import pytest

from otpipe.errors import UsageError
from otpipe.model.spec import ModelSpec, RopeSpec
from otpipe.pipeline.placement import Placement


def spec_of(num_layers: int) -> ModelSpec:
    return ModelSpec(
        family="qwen2",
        num_layers=num_layers,
        hidden_size=8,
        intermediate_size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=16,
        max_positions=32,
        rms_norm_eps=1e-6,
        tied_embeddings=False,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        rope=RopeSpec(theta=1e4),
    )


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 7, 48])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_map_has_one_owner_and_layers_go_round(num_layers: int, world_size: int) -> None:
    spec = spec_of(num_layers)
    if world_size > num_layers:
        with pytest.raises(UsageError, match=f"{world_size} ranks .* {num_layers} layers"):
            Placement.for_model(spec, world_size)
        return
    placement = Placement.for_model(spec, world_size)
    owned = [placement.maps_of(rank) for rank in range(world_size)]
    assert sum(map(len, owned)) == len(spec.maps) == len(frozenset().union(*owned))
    for linear_map in spec.maps:
        if linear_map.layer is not None:
            assert placement.owner_of_map[linear_map.index] == linear_map.layer % world_size
    assert placement.owner_of_map[spec.map_index("embed")] == 0
    last = (num_layers - 1) % world_size
    assert placement.owner_of_map[spec.map_index("lm_head")] == last
    assert (placement.embedding_rank, placement.final_norm_rank) == (0, last)


def test_the_head_lands_on_every_rank() -> None:
    heads = {Placement.for_model(spec_of(n), 3).lm_head_rank for n in (3, 4, 5)}
    assert heads == {0, 1, 2}


def test_a_14b_on_two_ranks_ends_on_rank_one() -> None:
    assert Placement.for_model(spec_of(48), 2).lm_head_rank == 1


def test_the_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Placement.for_model(spec_of(2), 2).lm_head_rank = 0  # type: ignore[misc]
