"""The model: its description, its int8 weights, and the decoder program."""

from otpipe.model.bundle import ModelBundle, PublicMap, read_public_files
from otpipe.model.checkpoint import Checkpoint
from otpipe.model.clear_ops import ClearExecutor, KVCache
from otpipe.model.program import Cache, Executor, forward
from otpipe.model.quantize import QuantizedMap
from otpipe.model.reference import PlaintextExecutor
from otpipe.model.spec import LinearMap, ModelSpec, RopeSpec

__all__ = [
    "Cache",
    "Checkpoint",
    "ClearExecutor",
    "Executor",
    "KVCache",
    "LinearMap",
    "ModelBundle",
    "ModelSpec",
    "PlaintextExecutor",
    "PublicMap",
    "QuantizedMap",
    "RopeSpec",
    "forward",
    "read_public_files",
]
