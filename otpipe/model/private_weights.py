"""The server's secret part of a private model: maps with the norm gains folded into their columns.

RMSNorm(x) * g followed by W is RMSNorm(x) followed by W diag(g), so gains need no operation of
their own and stay with the server. A tied embedding is two maps here: the table in digits, and the
head with the final norm's gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from otpipe.errors import CheckpointError
from otpipe.model.checkpoint import Checkpoint, map_parts
from otpipe.model.private_description import (
    MIN_EXPONENT,
    RING_BITS,
    finest_exponent,
    scales,
    segments_of,
)
from otpipe.model.private_quantize import PrivateMap, quantize_private, split_embedding
from otpipe.model.spec import FINAL_NORM, LinearMap, input_norm_name, post_attention_norm_name

_READS = 2  # once for the largest entries, once to quantise


@dataclass(frozen=True, eq=False, repr=False)
class PrivateWeights:
    """One linear map of a private model. All secret but the exponents.

    Attributes:
        weight: int8 (m, n), any strides; the embedding's is (2 hidden, vocab).
        multipliers: int64 (m,) on the same device, 1 to 127.
        bias: int64 (m,) on the same device, at the scale of the output's format; or None.
        exponents: e of each segment, S = 2^-e; public.
    """

    weight: Tensor
    multipliers: Tensor
    bias: Tensor | None
    exponents: tuple[int, ...]


def load_private_maps(
    checkpoint: Checkpoint,
    indices: Iterable[int],
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[int, PrivateWeights]:
    """Quantise the maps with these indices for private mode; they stay on ``device``.

    Every matrix is read twice, a bounded chunk at a time, so no second copy is held. ``progress``
    is called with the number of checkpoint bytes read since its last call, ``private_num_bytes``
    in all. Raises CheckpointError for a NaN, an infinity, or weights or biases beyond every scale.
    """
    gains = checkpoint.load_norms()
    loaded = {}
    for index in sorted(set(indices)):
        linear_map = checkpoint.spec.maps[index]
        name = _norm_before(linear_map)
        gain = None if name is None else gains[name].to(device)
        loaded[index] = _load(checkpoint, linear_map, gain, torch.device(device), progress)
    return loaded


def private_num_bytes(checkpoint: Checkpoint, indices: Iterable[int]) -> int:
    """How many bytes :func:`load_private_maps` will report to ``progress`` for these maps."""
    # One by one: a tied embedding is read for both of its maps.
    return sum(
        _READS * checkpoint.tensors[part.weight].num_bytes
        for index in set(indices)
        for part in map_parts(checkpoint.spec, checkpoint.spec.maps[index])
    )


def _load(
    checkpoint: Checkpoint,
    linear_map: LinearMap,
    gain_n: Tensor | None,
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> PrivateWeights:
    spec = checkpoint.spec
    parts = map_parts(spec, linear_map)

    def rows() -> Iterator[Tensor]:
        for chunk in checkpoint.row_chunks(parts, device, progress):
            yield chunk if gain_n is None else chunk.float() * gain_n

    finest = finest_exponent(linear_map.kind)
    quantised: PrivateMap
    if linear_map.kind == "embed":
        quantised = split_embedding(rows, spec.vocab_size, spec.hidden_size, finest)
    else:
        segments = segments_of(spec, linear_map)
        quantised = quantize_private(rows, linear_map.in_features, segments, finest)
    if min(quantised.exponents) < MIN_EXPONENT:
        raise CheckpointError(
            f"map {linear_map.name} has weights near {2.0 ** (13 - min(quantised.exponents)):.0e},"
            " too large for the fixed-point formats; the checkpoint is damaged, download it again"
        )
    bias = checkpoint.load_bias(parts)
    return PrivateWeights(
        weight=quantised.weight,
        multipliers=quantised.multipliers,
        bias=None if bias is None else _fixed_bias(linear_map, bias).to(device),
        exponents=quantised.exponents,
    )


def _fixed_bias(linear_map: LinearMap, bias_m: Tensor) -> Tensor:
    """int64, at the scale of the output's format; one beyond it would wrap without notice."""
    out_frac = scales(linear_map.kind)[1]
    limit = 2.0 ** (RING_BITS - 2 - out_frac)  # a bit of headroom, as all values in this ring
    largest = float(bias_m.abs().max())
    if largest >= limit:
        raise CheckpointError(
            f"map {linear_map.name} has a bias of magnitude {largest:g}, but the fixed-point "
            f"formats hold magnitudes below {limit:g}; serve this model with public weights"
        )
    return (bias_m.double() * 2.0**out_frac).round().to(torch.int64)


def _norm_before(linear_map: LinearMap) -> str | None:
    """Name of the norm whose output the map takes."""
    if linear_map.kind == "lm_head":
        return FINAL_NORM
    if linear_map.layer is None:
        return None
    return {
        "qkv": input_norm_name(linear_map.layer),
        "gate_up": post_attention_norm_name(linear_map.layer),
    }.get(linear_map.kind)
