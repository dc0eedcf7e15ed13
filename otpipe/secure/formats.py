"""Fixed-point formats of the values in a decoder layer: ring, scale, range, and the reason of each.

One frozen table. ``limit`` is what a value's magnitude must stay below. A value beyond it wraps and
is wrong, silently, since nobody sees it; so limits stand far above what large models show (residual
channels near 1e4, gate inputs near 200, scores near 300). A model with larger or much smaller
values takes another scale for that tensor (``dataclasses.replace``): ring widths may stay.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from otpipe.errors import ParameterError
from otpipe.secure.shares import MAX_RING_BITS


@dataclass(frozen=True)
class Format:
    """How one kind of value is held.

    Attributes:
        bits: of the ring.
        frac: unit 2^-frac.
        limit: magnitudes are below this.
        headroom: whether the ring has the bit more that ``rescale`` to a larger ring and products
            in a larger ring need.
        reason: why so many bits.

    Raises:
        ParameterError: the ring is too small for the limit, or larger than rings can be.
    """

    bits: int
    frac: int
    limit: float
    headroom: bool
    reason: str

    def __post_init__(self) -> None:
        """Check that the limit fits."""
        if not 3 <= self.bits <= MAX_RING_BITS:
            raise ParameterError(f"A ring has 3 to {MAX_RING_BITS} bits, not {self.bits}.")
        room = 2.0 ** (self.bits - (2 if self.headroom else 1) - self.frac)
        if self.limit > room:
            raise ParameterError(
                f"A ring of {self.bits} bits at scale 2^-{self.frac} holds magnitudes below "
                f"{room:g}, not {self.limit:g}; take fewer fraction bits or a larger ring."
            )


@dataclass(frozen=True)
class DecoderFormats:
    """Formats of one decoder layer, in the order in which values pass through it.

    ``linear`` maps take shares in ``linear_bits`` and give shares in ``linear_bits`` at the scales
    ``residual``, ``qkv`` and ``gate_up``: those are what the masked linear maps must deliver.
    """

    linear_bits: int = 44
    max_positions: int = 8192

    residual: Format = Format(44, 26, 2.0**16, True, "outputs of embed, o, down; sums stay in it")
    norm_input: Format = Format(29, 12, 2.0**15, True, "massive channels reach 1e4")
    square_input: Format = Format(
        25, 8, 2.0**15, True, "rounding adds 2^-18.6 to a mean square; see SMALL_RESIDUAL"
    )
    square_sum: Format = Format(
        49, 16, 2.0**32, False, "four channels at 2^15; rms 900 of 5120 channels"
    )
    inverse_rms: Format = Format(
        46, 24, 2.0**10, False, "in the product's ring; 13 bits up to rms 2^11; below 1/sqrt(eps)"
    )
    norm_product: Format = Format(46, 36, 2.0**8, True, "at most sqrt(hidden), 256 up to 65536")
    norm_output: Format = Format(44, 12, 2.0**8, True, "input of qkv, gate_up and lm_head")

    qkv: Format = Format(44, 27, 2.0**15, True, "key biases reach several hundred")
    rope_input: Format = Format(60, 17, 2.0**11, True, "room for the cosines without a round")
    rope_frac: int = 15
    query: Format = Format(40, 15, 2.0**9, False, "scaled by 1/sqrt(head_dim); in the score's ring")
    key: Format = Format(40, 13, 2.0**11, False, "in the score's ring")
    score: Format = Format(40, 28, 1000.0, False, "scores reach 300")
    score_low: Format = Format(23, 12, 1000.0, False, "input of exp; differences to 2000 fit")
    score_coarse: Format = Format(14, 2, 1000.0, False, "for the maximum; differences fit")
    weight: Format = Format(18, 16, 2.0, False, "exp of at most 1/2; not negative, hence headroom")
    value: Format = Format(51, 11, 2.0**8, False, "in the context's ring")
    context_bits: int = 51
    context: Format = Format(34, 10, 2.0**22, True, "sums of max_positions weighted values")
    weight_sum: Format = Format(51, 16, 2.0**14, True, "between 0.77 and 1.65 max_positions")
    inverse_sum: Format = Format(47, 27, 2.0, False, "in the product's ring; 2^-14 at 13 bits")
    attention_product: Format = Format(47, 37, 2.0**8, True, "weighted mean of values")
    attention_output: Format = Format(44, 12, 2.0**8, True, "input of o")

    gate_up: Format = Format(44, 31, 2.0**11, True, "outputs of gate and up")
    gate: Format = Format(22, 11, 508.0, True, "gate inputs reach 200")
    up: Format = Format(22, 11, 512.0, True, "as gate")
    swiglu_product: Format = Format(40, 22, 2.0**16, True, "inputs of down reach 1e4")
    swiglu_output: Format = Format(44, 12, 2.0**16, True, "input of down")

    def __post_init__(self) -> None:
        """Raise ParameterError where formats that follow each other do not fit."""
        fits = {
            "norm_product": self.norm_input.frac + self.inverse_rms.frac,
            "square_sum": 2 * self.square_input.frac,
            "score": self.query.frac + self.key.frac,
            "attention_product": self.context.frac + self.inverse_sum.frac,
            "swiglu_product": self.gate.frac + self.up.frac,
        }
        for name, frac in fits.items():
            found = getattr(self, name).frac
            if found != frac:
                raise ParameterError(f"{name} has scale 2^-{found}; its factors give 2^-{frac}.")
        rings = {
            "query": self.score.bits,
            "key": self.score.bits,
            "value": self.context_bits,
            "weight_sum": self.context_bits,
            "inverse_rms": self.norm_product.bits,
            "inverse_sum": self.attention_product.bits,
            "residual": self.linear_bits,
            "qkv": self.linear_bits,
            "gate_up": self.linear_bits,
        }
        for name, bits in rings.items():
            found = getattr(self, name).bits
            if found != bits:
                raise ParameterError(f"{name} lives in {found} bits; what uses it wants {bits}.")
        shortened = {
            "norm_input": self.residual,
            "square_input": self.residual,
            "query": self.rotated_query,
            "key": self.rotated_key,
            "score_low": self.score,
            "score_coarse": self.score,
            "context": self.context_raw,
            "gate": self.gate_up,
            "up": self.gate_up,
        }
        for name, source in shortened.items():
            target = getattr(self, name)
            if source.bits - (source.frac - target.frac) < target.bits:
                raise ParameterError(
                    f"{name} wants {target.bits} bits at scale 2^-{target.frac}, which a ring of "
                    f"{source.bits} bits at scale 2^-{source.frac} does not leave."
                )
        largest = 1.65 * self.max_positions * self.value.limit
        if largest > self.context.limit or largest * 2.0 ** (
            self.weight.frac + self.value.frac
        ) > 2.0 ** (self.context_bits - 1):
            raise ParameterError(
                f"{self.max_positions} positions of values up to {self.value.limit:g} overflow "
                f"the context; take fewer fraction bits for value."
            )

    @property
    def rotated_query(self) -> Format:
        """A query after rotation and scaling, before it is shortened; ``query_rope_frac`` >= 15."""
        return dataclasses.replace(self.rope_input, frac=self.rope_input.frac + self.rope_frac + 3)

    @property
    def rotated_key(self) -> Format:
        """A key after rotation, before it is shortened."""
        return dataclasses.replace(self.rope_input, frac=self.rope_input.frac + self.rope_frac)

    @property
    def context_raw(self) -> Format:
        """The sum of weighted values, before it is shortened."""
        frac = self.weight.frac + self.value.frac
        return dataclasses.replace(self.context, bits=self.context_bits, frac=frac)

    def formats(self) -> dict[str, Format]:
        """Every format by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Format)
        }


SMALL_RESIDUAL = dataclasses.replace(
    DecoderFormats(),
    norm_input=Format(29, 16, 2.0**11, True, "rows of rms 0.01, as embeddings have"),
    square_input=Format(25, 12, 2.0**11, True, "the same"),
    square_sum=Format(49, 24, 2.0**24, False, "four channels at 2^11; rms 57 of 5120"),
    inverse_rms=Format(46, 20, 2.0**10, False, "the same relative precision"),
)
"""For layers whose residual stays below 2^11: the first ones, whose rows may be small as well."""
