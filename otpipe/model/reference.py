"""The decoder on plaintext floats: what every other executor is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from otpipe.model.checkpoint import Checkpoint, map_parts
from otpipe.model.clear_ops import ClearExecutor
from otpipe.model.quantize import QuantizedMap, dequantize
from otpipe.model.spec import LinearMap, ModelSpec


@dataclass(frozen=True, eq=False)
class FloatMap:
    """One linear map in float32; the embedding's weight is the transposed (hidden, vocab) view."""

    weight: Tensor  # (m, n) float32
    bias: Tensor | None  # (m,) float32


class PlaintextExecutor(ClearExecutor):
    """Runs the decoder with float32 weights in this process. It protects nothing."""

    def __init__(
        self,
        spec: ModelSpec,
        norms: Mapping[str, Tensor],
        maps: Mapping[int, FloatMap],
        device: str | torch.device = "cpu",
    ) -> None:
        """``maps`` holds every map of ``spec.maps`` by index, on ``device``."""
        super().__init__(spec, norms, device)
        self._maps = maps
        self._token_rows = maps[spec.map_index("embed")].weight.t()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint | str | Path,
        *,
        quantised: bool,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Load a whole checkpoint: as int8 and back to float32, or as it is stored.

        Takes four bytes a parameter. Raises CheckpointError.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        spec = checkpoint.spec
        maps: dict[int, FloatMap] = {}
        for linear_map in spec.maps:
            index = linear_map.index
            if linear_map.kind == "lm_head" and spec.tied_embeddings:
                token_rows = maps[spec.map_index("embed")].weight.t()
                maps[index] = FloatMap(token_rows, None)
            elif quantised:
                loaded = checkpoint.load_maps([index], device)[index]
                maps[index] = float_map(loaded, linear_map)
            else:
                parts = map_parts(spec, linear_map)
                rows, bias = checkpoint.load_rows(parts, device), checkpoint.load_bias(parts)
                weight = rows.t() if linear_map.kind == "embed" else rows
                maps[index] = FloatMap(weight, None if bias is None else bias.to(device))
        return cls(spec, checkpoint.load_norms(), maps, device)

    @classmethod
    def from_quantised_maps(
        cls, spec: ModelSpec, norms: Mapping[str, Tensor], maps: Mapping[int, QuantizedMap]
    ) -> Self:
        """Use maps that are loaded already; runs on their device."""
        floats = {m.index: float_map(maps[m.index], m) for m in spec.maps}
        return cls(spec, norms, floats, floats[0].weight.device)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """float32 (T, hidden)."""
        return functional.embedding(torch.tensor(token_ids, device=self.device), self._token_rows)

    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """float32 (T, in_features) -> (T, out_features), bias included."""
        loaded = self._maps[linear_map.index]
        return functional.linear(x, loaded.weight, loaded.bias)


def float_map(quantised: QuantizedMap, linear_map: LinearMap) -> FloatMap:
    """The float32 map that an int8 map stands for, on the same device."""
    weight = dequantize(quantised, per_column=linear_map.kind == "embed")
    bias = quantised.bias
    return FloatMap(weight, None if bias is None else bias.to(weight.device))
