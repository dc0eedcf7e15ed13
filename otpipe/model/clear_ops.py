"""The non-linear operations of the decoder in float32, for a party that may see the activations.

Shape suffixes: T rows (token positions), P positions in the cache, K key/value heads,
G query heads per key/value head, D head size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otpipe.model.spec import LinearMap, ModelSpec, RopeSpec

# Bounds the mask, and spares the work on keys that no row of the block may see.
_BLOCK_ROWS = 256
_FIRST_CAPACITY = 256


class KVCache:
    """Rotated keys and values of all layers, float32, in preallocated tensors that grow by half."""

    def __init__(
        self,
        spec: ModelSpec,
        device: str | torch.device = "cpu",
        capacity: int = _FIRST_CAPACITY,
    ) -> None:
        """``capacity`` is the number of positions to have room for at first."""
        capacity = max(1, min(capacity, spec.max_positions))
        self._max_positions = spec.max_positions
        self._length = 0
        shape = (2, spec.num_kv_heads, capacity, spec.head_dim)
        self._layers_2KPD = [torch.empty(shape, device=device) for _ in range(spec.num_layers)]

    @property
    def length(self) -> int:
        """Number of positions that are complete in every layer."""
        return self._length

    def advance(self, num_rows: int) -> None:
        """Declare the next ``num_rows`` positions, written in every layer, complete."""
        self._length += num_rows

    def append(self, layer: int, keys_TKD: Tensor, values_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the positions after :attr:`length` of one layer.

        Returns views of all keys and values so far, (K, P, D) each, the new ones included.
        """
        start, end = self._length, self._length + len(keys_TKD)
        layer_2KPD = self._with_room(layer, end)
        keys_KPD, values_KPD = layer_2KPD[0, :, :end], layer_2KPD[1, :, :end]
        keys_KPD[:, start:].copy_(keys_TKD.transpose(0, 1))
        values_KPD[:, start:].copy_(values_TKD.transpose(0, 1))
        return keys_KPD, values_KPD

    def storage(self, layer: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values of one layer, (K, P, D) each, P at least ``num_positions``.

        For a cache on the CPU. The arrays are the cache's own: row :attr:`length` may be written.
        """
        keys_KPD, values_KPD = self._with_room(layer, num_positions).numpy()
        return keys_KPD, values_KPD

    def _with_room(self, layer: int, num_positions: int) -> Tensor:
        layer_2KPD = self._layers_2KPD[layer]
        if num_positions > layer_2KPD.shape[2]:
            layer_2KPD = self._layers_2KPD[layer] = self._grown(layer_2KPD, num_positions)
        return layer_2KPD

    def _grown(self, old_2KPD: Tensor, needed: int) -> Tensor:
        two, heads, capacity, head_dim = old_2KPD.shape
        capacity = max(needed, min(capacity + capacity // 2, self._max_positions))
        new_2KPD = old_2KPD.new_empty((two, heads, capacity, head_dim))
        new_2KPD[:, :, : self._length] = old_2KPD[:, :, : self._length]
        return new_2KPD


class RopeTables:
    """cos and signed sin of every position so far, so that decoding computes neither."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: str | torch.device = "cpu") -> None:
        self._inverse_frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._cos_PD = self._sin_PD = torch.empty((0, head_dim), device=device)

    def rows(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each (T, 1, D) for positions start..end-1; broadcasts over heads."""
        if end > len(self._cos_PD):
            self._extend(max(end, 2 * len(self._cos_PD), _FIRST_CAPACITY))
        return self._cos_PD[start:end, None], self._sin_PD[start:end, None]

    def row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, signed sin), each (D,), of one position, for tables on the CPU."""
        cos_TD, sin_TD = self.rows(position, position + 1)
        return cos_TD.numpy()[0, 0], sin_TD.numpy()[0, 0]

    def _extend(self, num_positions: int) -> None:
        positions = torch.arange(
            num_positions, dtype=torch.float32, device=self._inverse_frequencies.device
        )
        angles = torch.outer(positions, self._inverse_frequencies)
        self._cos_PD = angles.cos().repeat(1, 2)
        sin = angles.sin()
        # rotate_half(x) = [-x2, x1]: with the sign moved into the table it is one roll.
        self._sin_PD = torch.cat((-sin, sin), dim=1)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position of every feature pair, float32 (head_dim / 2,).

    The same float32 operations as transformers: its rounding decides angles at large positions.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "default":
        return frequencies
    # Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
    context = rope.original_max_positions
    wavelengths = 2 * math.pi / frequencies
    is_long = wavelengths > context / rope.low_freq_factor
    is_short = wavelengths < context / rope.high_freq_factor
    smooth = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(is_long, frequencies / rope.factor, frequencies)
    return torch.where(is_long | is_short, scaled, between)


def causal_attention(q_TKGD: Tensor, keys_KPD: Tensor, values_KPD: Tensor) -> Tensor:
    """Softmax attention of the last T of P positions, each seeing itself and those before.

    Float32 throughout. Returns (T, K * G * D), heads in the order of the query. Keys and values
    are shared by the heads of a group, not repeated in memory.
    """
    num_rows, K, G, D = q_TKGD.shape
    if num_rows == 1:
        # The newest position sees everything: the heads of a group are rows of one query.
        out = functional.scaled_dot_product_attention(q_TKGD, keys_KPD[None], values_KPD[None])
        return out.reshape(1, K * G * D)
    num_before = keys_KPD.shape[1] - num_rows
    out = q_TKGD.new_empty((num_rows, K * G * D))
    for first in range(0, num_rows, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, num_rows)
        seen = num_before + last
        visible = torch.ones((last - first, seen), dtype=torch.bool, device=out.device)
        block = functional.scaled_dot_product_attention(
            q_TKGD[first:last].flatten(1, 2).transpose(0, 1)[None],  # (1, heads, rows, D)
            keys_KPD[None, :, :seen],
            values_KPD[None, :, :seen],
            attn_mask=visible.tril_(num_before + first),
            enable_gqa=True,
        )
        out[first:last].view(last - first, K * G, D).copy_(block[0].transpose(0, 1))
    return out


class ClearExecutor(ABC):
    """Executor whose values are float32 tensors (T, features) that this process may see.

    Subclasses add the two operations that need weights: ``embed`` and ``linear``.
    """

    def __init__(
        self, spec: ModelSpec, norms: Mapping[str, Tensor], device: str | torch.device = "cpu"
    ) -> None:
        """``norms`` holds a float32 (hidden_size,) gain for every name of ``spec.norm_names``."""
        self.spec = spec
        self.device = torch.device(device)
        self._norms = {name: norms[name].to(self.device) for name in spec.norm_names}
        self._rope = RopeTables(spec.rope, spec.head_dim, self.device)

    def new_cache(self) -> KVCache:
        """An empty cache on the executor's device."""
        return KVCache(self.spec, self.device)

    @abstractmethod
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """float32 (T, hidden)."""

    @abstractmethod
    def linear(self, linear_map: LinearMap, x: Tensor) -> Tensor:
        """float32 (T, in_features) -> (T, out_features), bias included."""

    def rms_norm(self, x: Tensor, norm_name: str) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        return functional.rms_norm(x, (x.shape[1],), self._norms[norm_name], self.spec.rms_norm_eps)

    def attention(self, layer: int, qkv: Tensor, cache: KVCache) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        spec = self.spec
        T, D, K = qkv.shape[0], spec.head_dim, spec.num_kv_heads
        heads = qkv.view(T, spec.num_heads + 2 * K, D)
        num_rotated = spec.num_heads + K  # queries and keys
        cos, sin = self._rope.rows(cache.length, cache.length + T)
        qk = heads[:, :num_rotated]
        rotated = torch.addcmul(qk * cos, torch.roll(qk, D // 2, dims=2), sin)
        keys_KPD, values_KPD = cache.append(
            layer, rotated[:, spec.num_heads :], heads[:, num_rotated:]
        )
        q_TKGD = rotated[:, : spec.num_heads].view(T, K, spec.num_heads // K, D)
        return causal_attention(q_TKGD, keys_KPD, values_KPD)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        gate, up = gate_up.chunk(2, dim=1)
        return functional.silu(gate).mul_(up)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        return a + b

    def last_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """See :class:`otpipe.model.program.Executor`."""
        return x[-num_rows:]
