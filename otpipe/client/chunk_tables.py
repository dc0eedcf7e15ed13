"""What compiled code knows of the model: tables that are made once and serve every chunk.

Shapes: T rows of a chunk, M maps, L layers.
"""

from __future__ import annotations

import numpy as np

from otpipe.client.chunk_steps import LONGEST_HEAD, ModelTables, recorded_layers
from otpipe.model.bundle import ModelBundle
from otpipe.model.clear_ops import KVCache
from otpipe.protocol.fixed_point import output_headroom
from otpipe.protocol.messages import Linear, Result, message_head

_MOST_ROWS_KEPT = 16


class StepTables:
    """Tables of one model.

    Attributes:
        model: of all its layers.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        spec = bundle.spec
        self._bundle = bundle  # whose arrays are pointed into
        self._heads: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        K, D = spec.num_kv_heads, spec.head_dim
        self.model = ModelTables(
            recorded_layers(spec),
            np.array([(m.in_features, m.out_features) for m in spec.maps], np.int64),
            np.array(
                [(p.max_row_l2, output_headroom(p.max_row_l1)) for p in bundle.maps], np.float64
            ),
            np.array(
                [
                    (
                        p.scale.data_ptr(),
                        0 if p.bias is None else p.bias.data_ptr(),
                        0 if p.bias is None else p.bias.numel(),
                    )
                    for p in bundle.maps
                ],
                np.int64,
            ),
            np.stack([bundle.norms[name].numpy() for name in spec.norm_names]),
            spec.rms_norm_eps,
            (K, spec.num_heads // K, D),
        )

    def heads(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Heads of request and answer of so many rows of every map, and their lengths.

        uint8 (M, 2, LONGEST_HEAD) and int64 (M, 2). Not for several threads at once.
        """
        held = self._heads.get(num_rows)
        if held is not None:
            return held
        maps = self._bundle.spec.maps
        heads = np.zeros((len(maps), 2, LONGEST_HEAD), np.uint8)
        lengths = np.zeros((len(maps), 2), np.int64)
        for m in maps:
            row_bytes = num_rows * m.ring_bytes
            request = message_head(Linear(m.index, num_rows), row_bytes * m.in_features)
            answer = message_head(Result(m.index, num_rows), row_bytes * m.out_features)
            for column, head in enumerate((request, answer)):
                heads[m.index, column, : len(head)] = np.frombuffer(head, np.uint8)
                lengths[m.index, column] = len(head)
        if len(self._heads) == _MOST_ROWS_KEPT:
            self._heads.clear()
        self._heads[num_rows] = heads, lengths
        return heads, lengths

    def caches(self, cache: KVCache, num_positions: int) -> np.ndarray:
        """int64 (L, 3): addresses of keys and values of every layer, and positions they hold.

        Valid until the cache grows beyond ``num_positions``.
        """
        layers = (
            cache.storage(layer, num_positions) for layer in range(self._bundle.spec.num_layers)
        )
        return np.array(
            [
                (keys_KPD.ctypes.data, values_KPD.ctypes.data, keys_KPD.shape[1])
                for keys_KPD, values_KPD in layers
            ],
            np.int64,
        )
