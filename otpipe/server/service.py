"""What one server offers to every client: its model's public facts and its lanes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import numpy as np

from otpipe import __version__
from otpipe.model.bundle import ModelBundle
from otpipe.model.spec import ModelSpec
from otpipe.pipeline.bulk import BULK_BYTES, pinned_buffer
from otpipe.pipeline.placement import Placement
from otpipe.protocol.messages import Welcome
from otpipe.protocol.wire import FrameConnection
from otpipe.server.lanes import Lane
from otpipe.server.row_server import RowServer


class Audit:
    """Histogram of the payload bytes that clients sent, to show what a server sees.

    Uniform noise has an entropy of 8 bits a byte.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = np.zeros(256, dtype=np.int64)
        self._sample = b""

    def add(self, payload: np.ndarray) -> None:
        """Count the bytes of ``payload``, uint8 (bytes,)."""
        counts = np.bincount(payload, minlength=256)
        with self._lock:
            self._counts += counts
            self._sample = payload[:12].tobytes()

    def line(self) -> str:
        """One sentence: how many bytes, how uniform, and the latest few."""
        with self._lock:
            total = int(self._counts.sum())
            if not total:
                return "the server received no payload"
            share = self._counts[self._counts > 0] / total
            sample = self._sample.hex(" ")
        entropy = float(-(share * np.log2(share)).sum())
        return (
            f"the server saw {total / 1e6:.1f} MB of payload with {entropy:.4f} bits of entropy a "
            f"byte (uniform noise: 8), the last of it beginning {sample}"
        )


class Service:
    """Immutable facts and the lanes; shared by all sessions.

    Args:
        bundle: the public model description.
        placement: owner of every map.
        lanes: one per rank, in rank order.
        audit: collects what clients send, or None.
        pinned: whether payloads go on to a CUDA device.
        new_row_server: serves single rows of a connection, where the device is made for that.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        placement: Placement,
        lanes: list[Lane],
        audit: Audit | None = None,
        pinned: bool = False,
        new_row_server: Callable[[FrameConnection], RowServer] | None = None,
    ) -> None:
        self.spec: ModelSpec = bundle.spec
        self.bundle = bundle.to_bytes()
        self.welcome = Welcome(
            server=f"otpipe {__version__}",
            fingerprint=bundle.fingerprint,
            weights="public",
            num_ranks=placement.world_size,
            bundle_bytes=len(self.bundle),
            bundle_sha256=hashlib.sha256(self.bundle).digest(),
        )
        self._placement = placement
        self._lanes = lanes
        self._max_row_l2 = [bundle.maps[m.index].max_row_l2 for m in bundle.spec.maps]
        self._audit = audit
        self._pinned = pinned
        self._new_row_server = new_row_server

    def row_server(self, connection: FrameConnection) -> RowServer | None:
        """What serves the connection's single rows; None: the session itself."""
        if self._new_row_server is None or self._audit is not None or connection.descriptor < 0:
            return None
        return self._new_row_server(connection)

    def new_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 (num_bytes,) for the payload of a masked request."""
        if self._pinned and num_bytes >= BULK_BYTES:
            return pinned_buffer(num_bytes).numpy()
        return np.empty(num_bytes, np.uint8)

    def lane_of(self, map_index: int) -> Lane:
        """The lane of the rank that owns a map."""
        return self._lanes[self._placement.owner_of_map[map_index]]

    def max_row_l2(self, map_index: int) -> float:
        """Largest Euclidean norm of a row of the map's int8 weight."""
        return self._max_row_l2[map_index]

    def audit(self, payload: np.ndarray) -> None:
        """Count what a client sent, where that was asked for."""
        if self._audit is not None:
            self._audit.add(payload)
