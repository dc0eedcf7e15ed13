"""What a supported decoder looks like: sizes, rotary embedding, and its linear maps in order.

A :class:`ModelSpec` is read from the ``config.json`` of a checkpoint (trusted, but perhaps of an
unsupported model) or from a message of the server (untrusted). Both ways end in the same range
checks, so every later allocation may rely on the sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from otpipe.errors import CheckpointError, ProtocolError

MapKind = Literal["embed", "qkv", "o", "gate_up", "down", "lm_head"]
RopeKind = Literal["default", "linear", "llama3"]
Family = Literal["qwen2", "llama"]

LAYER_MAP_KINDS: tuple[MapKind, ...] = ("qkv", "o", "gate_up", "down")
FAMILIES: tuple[str, ...] = get_args(Family)
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}

# The embedding is looked up by a one-hot vector and its rows are int8, so 8 bits hold the result.
EMBED_RING_BITS = 8
RING_BITS = 32

# Far above every published model, low enough that sizes from a peer cannot exhaust memory.
MAX_LAYERS = 1024
_INT_RANGES = {
    "num_layers": (1, MAX_LAYERS),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "vocab_size": (1, 1 << 20),
    "max_positions": (1, 1 << 25),
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding. The last three fields are used by ``llama3`` only."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope type {self.kind!r}, supported are {', '.join(ROPE_KINDS)}")
        _check_float("rope theta", self.theta, 1.0, 1e15)
        _check_float("rope factor", self.factor, 1.0, 1e6)
        _check_float("rope low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
        _check_float("rope high_freq_factor", self.high_freq_factor, 1e-6, 1e6)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor {self.high_freq_factor}, which must exceed"
                f" low_freq_factor {self.low_freq_factor}"
            )
        _check_int("rope original_max_positions", self.original_max_positions, 1, 1 << 25)


@dataclass(frozen=True)
class LinearMap:
    """One linear map of the model, y = W x + bias with W of shape (out_features, in_features)."""

    index: int  # position in ModelSpec.maps
    name: str  # "embed", "layers.3.qkv", ..., "lm_head"
    kind: MapKind
    layer: int | None  # None for embed and lm_head
    in_features: int
    out_features: int
    ring_bits: int  # the map is served modulo 2^ring_bits
    has_bias: bool

    @property
    def ring_bytes(self) -> int:
        """Bytes of one ring element on the wire."""
        return self.ring_bits // 8


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder-only transformer (RMSNorm, rotary GQA, SwiGLU)."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: RopeSpec = field(default_factory=lambda: RopeSpec(theta=10000.0))

    def __post_init__(self) -> None:
        """Raise ValueError for a size outside its range or sizes that do not fit each other."""
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r}, supported are {', '.join(FAMILIES)}")
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        # Not 0, nor 0 as a float32: a row of zeros would be divided by it.
        _check_float("rms_norm_eps", self.rms_norm_eps, 1e-12, 1.0)
        for name in ("tied_embeddings", "qkv_bias", "o_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r}, which must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads over {self.num_kv_heads} key/value heads,"
                " which must divide them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}, which must be even for rotary embedding")

    # --- shapes -------------------------------------------------------------------------------

    @property
    def q_size(self) -> int:
        """Number of query features of one token, also the input size of ``o``."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Number of key (or value) features of one token."""
        return self.num_kv_heads * self.head_dim

    @cached_property
    def maps(self) -> tuple[LinearMap, ...]:
        """All linear maps in the order of the program: embed, four a layer, lm_head."""
        shapes: dict[MapKind, tuple[int, int, bool]] = {
            "qkv": (self.hidden_size, self.q_size + 2 * self.kv_size, self.qkv_bias),
            "o": (self.q_size, self.hidden_size, self.o_bias),
            "gate_up": (self.hidden_size, 2 * self.intermediate_size, self.mlp_bias),
            "down": (self.intermediate_size, self.hidden_size, self.mlp_bias),
        }
        maps = [
            LinearMap(
                0, "embed", "embed", None, self.vocab_size, self.hidden_size, EMBED_RING_BITS, False
            )
        ]
        for layer in range(self.num_layers):
            for kind in LAYER_MAP_KINDS:
                n, m, bias = shapes[kind]
                name = f"layers.{layer}.{kind}"
                maps.append(LinearMap(len(maps), name, kind, layer, n, m, RING_BITS, bias))
        head = (self.hidden_size, self.vocab_size, RING_BITS, False)
        maps.append(LinearMap(len(maps), "lm_head", "lm_head", None, *head))
        return tuple(maps)

    def map_index(self, kind: MapKind, layer: int | None = None) -> int:
        """Index of a map in :attr:`maps`; ``layer`` exactly for the kinds that belong to one."""
        if kind in LAYER_MAP_KINDS:
            if layer is None or not 0 <= layer < self.num_layers:
                raise ValueError(f"layer {layer} of {self.num_layers} for a {kind} map")
            return 1 + len(LAYER_MAP_KINDS) * layer + LAYER_MAP_KINDS.index(kind)
        if layer is not None:
            raise ValueError(f"a {kind} map belongs to no layer, got layer {layer}")
        return 0 if kind == "embed" else 1 + len(LAYER_MAP_KINDS) * self.num_layers

    def map(self, kind: MapKind, layer: int | None = None) -> LinearMap:
        """The map of that kind (and layer)."""
        return self.maps[self.map_index(kind, layer)]

    @cached_property
    def norm_names(self) -> tuple[str, ...]:
        """Names of all norms in the order of the program; each has a (hidden_size,) gain."""
        names = []
        for layer in range(self.num_layers):
            names += [input_norm_name(layer), post_attention_norm_name(layer)]
        return (*names, FINAL_NORM)

    # --- reading and writing ------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the content of a ``config.json``.

        Raises CheckpointError, naming what was found and what is supported, for everything that
        would make the model compute something else than the program of this package.
        """
        family = _supported_family(config)
        _refuse_variants(config, family)
        reader = _ConfigReader(config)
        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        head_dim = reader.optional_integer("head_dim")
        if head_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                raise CheckpointError(
                    f"config.json has hidden_size {hidden_size} for {num_heads} attention heads and"
                    " no head_dim; the heads must divide hidden_size"
                )
            head_dim = hidden_size // num_heads
        num_kv_heads = reader.optional_integer("num_key_value_heads")
        max_positions = reader.integer("max_position_embeddings")
        attention_bias = reader.boolean("attention_bias") if family == "llama" else False
        try:
            return cls(
                family=family,
                num_layers=reader.integer("num_hidden_layers"),
                hidden_size=hidden_size,
                intermediate_size=reader.integer("intermediate_size"),
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_dim=head_dim,
                vocab_size=reader.integer("vocab_size"),
                max_positions=max_positions,
                rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
                tied_embeddings=reader.boolean("tie_word_embeddings"),
                qkv_bias=attention_bias if family == "llama" else True,
                o_bias=attention_bias,
                mlp_bias=reader.boolean("mlp_bias") if family == "llama" else False,
                rope=_rope_from_config(config, max_positions),
            )
        except ValueError as error:
            raise CheckpointError(f"config.json has {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a message; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, message: object) -> ModelSpec:
        """Read what :meth:`to_dict` wrote, trusting nothing; raises ProtocolError."""
        try:
            fields = _exact_fields(message, cls, "the model description")
            rope = _exact_fields(fields.pop("rope"), RopeSpec, "its rotary embedding")
            return cls(**fields, rope=RopeSpec(**rope))
        except ValueError as error:
            raise ProtocolError(
                f"The model description of the server has {error}; use a server of this version."
            ) from None


FINAL_NORM = "final_norm"


def input_norm_name(layer: int) -> str:
    """Name of the norm before the attention of ``layer``."""
    return f"layers.{layer}.input_norm"


def post_attention_norm_name(layer: int) -> str:
    """Name of the norm before the feed-forward part of ``layer``."""
    return f"layers.{layer}.post_attention_norm"


# --- checks -----------------------------------------------------------------------------------


def _check_int(name: str, value: object, low: int, high: int) -> None:
    # bool is an int to Python, but not a size.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} {value!r:.60}, which must be an integer from {low} to {high}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, float) or not low <= value <= high:
        raise ValueError(f"{name} {value!r:.60}, which must be a number from {low:g} to {high:g}")


def _exact_fields(message: object, cls: type[Any], what: str) -> dict[str, Any]:
    """A copy of ``message`` if it is a dict with exactly the fields of ``cls``."""
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(message, dict) or set(message) != names:
        found = sorted(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"other fields in {what} than {sorted(names)}: {found!s:.200}")
    return dict(message)


class _ConfigReader:
    """Typed access to config.json; a wrong type is a CheckpointError that names the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def optional_integer(self, key: str) -> int | None:
        value = self._config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"config.json has {key} {value!r:.60}, which must be an integer")
        return value

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            raise CheckpointError(f"config.json lacks {key!r}; use the checkpoint's own config")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key)
        return _as_float(key, default if value is None else value)

    def boolean(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"config.json has {key} {value!r:.60}, which must be a boolean")
        return bool(value)


def _as_float(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"config.json has {key} {value!r:.60}, which must be a number")
    return float(value)


def _supported_family(config: Mapping[str, Any]) -> Family:
    supported = " and ".join(f"{k!r} ({v})" for k, v in ARCHITECTURES.items())
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"config.json has model_type {family!r:.60}; supported are {supported}"
        )
    architectures = config.get("architectures")
    if architectures not in (None, [], [ARCHITECTURES[family]]):
        raise CheckpointError(
            f"config.json has architectures {architectures!r:.80}; supported are {supported}"
        )
    return family


def _refuse_variants(config: Mapping[str, Any], family: Family) -> None:
    """Refuse settings of a known family that change what is computed."""
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        if isinstance(method, Mapping):
            method = method.get("quant_method", "unnamed")
        raise CheckpointError(
            f"config.json has a quantization_config ({method!s:.40}); supported are checkpoints in"
            " bfloat16, float16 or float32, which otpipe quantises itself"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json has hidden_act {activation!r:.40}; supported is 'silu'")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise CheckpointError(
                f"config.json has {key} {config[key]!r:.40}; supported are dense models only"
            )
    for key in ("use_qk_norm", "qk_norm", "qk_layernorm"):
        if config.get(key):
            raise CheckpointError(
                f"config.json has {key} set; supported are models without query/key norms"
            )
    _refuse_sliding_window(config, family)


def _refuse_sliding_window(config: Mapping[str, Any], family: Family) -> None:
    window = config.get("sliding_window")
    num_layers = config.get("num_hidden_layers")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        used = any(layer_type != "full_attention" for layer_type in layer_types)
    elif family == "qwen2" and config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        used = window is not None and isinstance(num_layers, int) and first < num_layers
    else:
        used = False
    max_positions = config.get("max_position_embeddings")
    if used and isinstance(window, int) and isinstance(max_positions, int):
        only_sliding = set(layer_types or ()) <= {"full_attention", "sliding_attention"}
        used = not only_sliding or window < max_positions  # a wider window hides nothing
    if used:
        raise CheckpointError(
            f"config.json uses a sliding window or another partial attention (sliding_window"
            f" {window!r:.20}, layer_types {sorted(set(layer_types or ()))!s:.80}); supported is"
            " full causal attention in every layer"
        )


def _rope_from_config(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """Both spellings: ``rope_theta`` + ``rope_scaling``, and ``rope_parameters``."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json has rope parameters {scaling!r:.60}, not an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"config.json has rope type {kind!r:.60}; supported are {', '.join(ROPE_KINDS)}"
        )
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(
            f"config.json has partial_rotary_factor {partial!r:.40}; supported is 1.0"
        )
    theta = scaling.get("rope_theta")
    theta = config.get("rope_theta") if theta is None else theta
    theta = _as_float("rope_theta", 10000.0 if theta is None else theta)
    if kind == "default":
        return RopeSpec(theta)
    required = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    for key in required:
        if key not in scaling:
            raise CheckpointError(f"config.json lacks {key!r} in its {kind} rope parameters")
    factor = _as_float("rope factor", scaling["factor"])
    if kind == "linear":
        return RopeSpec(theta, "linear", factor)
    original = config.get("original_max_position_embeddings")
    if original is None:
        original = scaling.get("original_max_position_embeddings", max_positions)
    return RopeSpec(
        theta,
        "llama3",
        factor,
        _as_float("low_freq_factor", scaling["low_freq_factor"]),
        _as_float("high_freq_factor", scaling["high_freq_factor"]),
        original,
    )
