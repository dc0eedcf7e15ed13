"""Which rank owns which linear map: one frozen table, computed once, never inferred later.

Layer i lives on rank i mod W. The embedding lives on rank 0. The final norm and the lm_head live
with the last layer, on rank (L - 1) mod W; the table says so explicitly, because a head that sits
elsewhere than its input is what an implicit rule gets wrong when L is not a multiple of W.
"""

from __future__ import annotations

from dataclasses import dataclass

from otpipe.errors import UsageError
from otpipe.model.spec import LinearMap, ModelSpec

GATEWAY_RANK = 0


@dataclass(frozen=True)
class Placement:
    """Owner of every map. Build with :meth:`for_model`.

    Attributes:
        world_size: number of ranks W.
        owner_of_map: rank by map index.
        owner_of_layer: rank by layer.
        embedding_rank, final_norm_rank, lm_head_rank: owners outside the layers.
    """

    world_size: int
    owner_of_map: tuple[int, ...]
    owner_of_layer: tuple[int, ...]
    embedding_rank: int
    final_norm_rank: int
    lm_head_rank: int

    def __post_init__(self) -> None:
        owners = {*self.owner_of_map, *self.owner_of_layer}
        assert owners <= set(range(self.world_size)), f"owners {owners} outside the world"

    @classmethod
    def for_model(cls, spec: ModelSpec, world_size: int) -> Placement:
        """Place ``spec`` on ``world_size`` ranks.

        Raises:
            UsageError: fewer than one rank, or more ranks than layers.
        """
        if not 1 <= world_size <= spec.num_layers:
            raise UsageError(
                f"{world_size} ranks were started for a model of {spec.num_layers} layers; "
                f"start between 1 and {spec.num_layers} (torchrun --nproc_per_node)"
            )
        owner_of_layer = tuple(layer % world_size for layer in range(spec.num_layers))
        head_rank = owner_of_layer[-1]
        return cls(
            world_size=world_size,
            owner_of_map=tuple(
                cls._owner(linear_map, owner_of_layer, head_rank) for linear_map in spec.maps
            ),
            owner_of_layer=owner_of_layer,
            embedding_rank=GATEWAY_RANK,
            final_norm_rank=head_rank,
            lm_head_rank=head_rank,
        )

    @staticmethod
    def _owner(linear_map: LinearMap, owner_of_layer: tuple[int, ...], head_rank: int) -> int:
        if linear_map.layer is not None:
            return owner_of_layer[linear_map.layer]
        return GATEWAY_RANK if linear_map.kind == "embed" else head_rank

    def maps_of(self, rank: int) -> frozenset[int]:
        """Indices of the maps that ``rank`` owns."""
        return frozenset(i for i, owner in enumerate(self.owner_of_map) if owner == rank)
