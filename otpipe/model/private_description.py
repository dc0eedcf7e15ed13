"""What both parties know of a model whose weights are private: sizes, scales, formats, angles.

Published are the model's sizes, one power of two S for each segment of each linear map, and the
frequencies of the rotary embedding. Not published: gains, biases, norms of rows, or any digest of
the weights. The fixed-point formats are constants of this module.

Where results land. A map gives integers at scale in_frac + e, where 2^-in_frac is the scale of its
input and S = 2^-e that of the segment. ``finest`` keeps in_frac + e <= out_frac, so both parties
bring their shares to the output's format by a local multiplication with 2^(out_frac - in_frac - e):
exact, without a message, whatever the weights are. No format depends on the weights but for that
of the first norm's input, which follows from the embedding's e.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from otpipe.errors import ProtocolError
from otpipe.model.clear_ops import inverse_frequencies
from otpipe.model.spec import LinearMap, MapKind, ModelSpec
from otpipe.secure.formats import SMALL_RESIDUAL, DecoderFormats, Format

RING_BITS = 44
"""Of pads, masks, prepared results and all shares that go in or out of a linear map."""

FORMATS = replace(
    DecoderFormats(),
    linear_bits=RING_BITS,
    norm_output=Format(RING_BITS, 14, 2.0**8, True, "small channels beside outliers keep 2^-14"),
    residual=Format(RING_BITS, 27, 2.0**15, True, "steps of o and down as fine as 2^-15"),
    qkv=Format(RING_BITS, 30, 2.0**12, True, "steps as fine as 2^-18; key biases of hundreds"),
)
"""Scales of outputs as fine as the range allows, since they bound how fine S may be."""

EMBEDDED_FORMATS = replace(
    FORMATS,
    **{
        name: getattr(SMALL_RESIDUAL, name)
        for name in ("norm_input", "square_input", "square_sum", "inverse_rms")
    },
)
"""For the norms of the first layer: rows of rms 0.01 keep a relative precision of 2^-9."""

LOGITS = Format(RING_BITS, 30, 2.0**12, True, "steps as fine as 2^-18")
REVEALED_LOGITS = Format(24, 11, 2.0**12, False, "what the client gets: three bytes a logit")

_ONE_HOT_FRAC = 0
_EMBEDDING_HEADROOM = 10
"""The first layer's norms take |x| < 2^11: 2^10 for the embedding, as much for the attention."""
_DIGITS_LOG2 = 15  # the embedding's integers are below 2^15
MIN_EXPONENT = -8
"""S = 2^8 would be that of weights near 4 million."""
_FREQUENCY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class PrivateMapShape:
    """What is public of one private linear map.

    Attributes:
        index: in ``ModelSpec.maps``.
        in_features, out_features: n and m of the int8 matrix; the embedding's m is 2 hidden, its
            high and then its low digits.
        segments: rows of each segment, in order.
        in_frac: scale of the input.
        out_frac: scale of the output, after the shifts.
        exponents: e of each segment.
        shifts: a party multiplies its share of segment k by 2^shifts[k].
    """

    index: int
    in_features: int
    out_features: int
    segments: tuple[int, ...]
    in_frac: int
    out_frac: int
    exponents: tuple[int, ...]

    @property
    def shifts(self) -> tuple[int, ...]:
        """out_frac - in_frac - e of each segment, not negative."""
        return tuple(self.out_frac - self.in_frac - exponent for exponent in self.exponents)


@dataclass(frozen=True)
class PrivateDescription:
    """The public part of a private model. Frozen; equal descriptions run the same program.

    Attributes:
        spec: sizes.
        exponents: e of each segment of each map, in the order of ``spec.maps``.
        inverse_frequencies: angle per position of every rotated pair, float32 values. The parties
            must use the same bits: a share times another integer than the peer's is no share.
    """

    spec: ModelSpec
    exponents: tuple[tuple[int, ...], ...]
    inverse_frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for exponents or frequencies that do not belong to the model."""
        if len(self.exponents) != len(self.spec.maps):
            raise ValueError(
                f"scales of {len(self.exponents)} maps for a model of {len(self.spec.maps)}"
            )
        for linear_map, exponents in zip(self.spec.maps, self.exponents, strict=True):
            finest = finest_exponent(linear_map.kind)
            if len(exponents) != len(segments_of(self.spec, linear_map)) or not all(
                type(e) is int and MIN_EXPONENT <= e <= finest for e in exponents
            ):
                raise ValueError(f"scale exponents {exponents!s:.60} of map {linear_map.name}")
        found = self.inverse_frequencies
        want = inverse_frequencies(self.spec.rope, self.spec.head_dim).tolist()
        if len(found) != len(want) or not all(
            isinstance(mine, float)
            and mine == float(np.float32(mine))
            and math.isclose(mine, theirs, rel_tol=_FREQUENCY_TOLERANCE)
            for mine, theirs in zip(found, want, strict=True)
        ):
            raise ValueError("frequencies that are not those of its rotary embedding")

    @classmethod
    def of(cls, spec: ModelSpec, exponents: Mapping[int, tuple[int, ...]]) -> PrivateDescription:
        """From the exponents of all maps by index (``PrivateWeights.exponents``)."""
        return cls(
            spec,
            tuple(exponents[linear_map.index] for linear_map in spec.maps),
            tuple(inverse_frequencies(spec.rope, spec.head_dim).tolist()),
        )

    @cached_property
    def maps(self) -> tuple[PrivateMapShape, ...]:
        """All linear maps in the order of ``spec.maps``."""
        shapes = []
        for linear_map, exponents in zip(self.spec.maps, self.exponents, strict=True):
            in_frac, out_frac = scales(linear_map.kind)
            segments = segments_of(self.spec, linear_map)
            shapes.append(
                PrivateMapShape(
                    linear_map.index,
                    linear_map.in_features,
                    sum(segments),
                    segments,
                    in_frac,
                    out_frac,
                    exponents,
                )
            )
        return tuple(shapes)

    def norm_formats(self, layer: int | None) -> DecoderFormats:
        """Formats of the norms of a layer, or of the final norm (None).

        The first layer's inputs are the embedding, and it plus the layer's attention: small as a
        rule. ``EMBEDDED_FORMATS`` holds magnitudes below 2^11; a larger embedding takes the others.
        """
        small = self.exponents[0][0] >= _DIGITS_LOG2 - _EMBEDDING_HEADROOM
        return EMBEDDED_FORMATS if layer == 0 and small else FORMATS

    def to_message(self) -> dict[str, Any]:
        """Plain values for a message; the inverse of :meth:`from_message`."""
        return {
            "spec": self.spec.to_dict(),
            "exponents": [list(each) for each in self.exponents],
            "inverse_frequencies": list(self.inverse_frequencies),
        }

    @classmethod
    def from_message(cls, message: object) -> PrivateDescription:
        """Read what :meth:`to_message` wrote, trusting nothing; raises ProtocolError."""
        names = {"spec", "exponents", "inverse_frequencies"}
        if not isinstance(message, dict) or set(message) != names:
            raise _bad("missing or unknown entries")
        spec = ModelSpec.from_dict(message["spec"])
        exponents, frequencies = message["exponents"], message["inverse_frequencies"]
        if not isinstance(exponents, list) or not all(isinstance(e, list) for e in exponents):
            raise _bad("no list of scale exponents")
        if not isinstance(frequencies, list):
            raise _bad("no list of frequencies")
        try:
            return cls(spec, tuple(tuple(each) for each in exponents), tuple(frequencies))
        except ValueError as error:
            raise _bad(str(error)) from None


def segments_of(spec: ModelSpec, linear_map: LinearMap) -> tuple[int, ...]:
    """Rows of each segment of a private map: those with a scale of their own."""
    if linear_map.kind == "embed":
        return (2 * spec.hidden_size,)
    if linear_map.kind == "qkv":
        return (spec.q_size, spec.kv_size, spec.kv_size)
    if linear_map.kind == "gate_up":
        return (spec.intermediate_size, spec.intermediate_size)
    return (linear_map.out_features,)


def scales(kind: MapKind) -> tuple[int, int]:
    """(in_frac, out_frac) of the maps of a kind."""
    formats = FORMATS
    return {
        "embed": (_ONE_HOT_FRAC, formats.residual.frac),
        "qkv": (formats.norm_output.frac, formats.qkv.frac),
        "o": (formats.attention_output.frac, formats.residual.frac),
        "gate_up": (formats.norm_output.frac, formats.gate_up.frac),
        "down": (formats.swiglu_output.frac, formats.residual.frac),
        "lm_head": (formats.norm_output.frac, LOGITS.frac),
    }[kind]


def finest_exponent(kind: MapKind) -> int:
    """Largest e of a segment: finer results than the output's format cannot be brought to it."""
    in_frac, out_frac = scales(kind)
    return out_frac - in_frac


def _bad(found: str) -> ProtocolError:
    return ProtocolError(
        f"The private model description of the server has {found}; use a server of this version."
    )
