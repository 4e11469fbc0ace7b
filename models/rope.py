"""Rotary position embedding (Su et al. 2021), and the ways in which checkpoints stretch it to longer texts."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.models.fields import is_positive, is_size, read_flag, read_positive, refuse_other_arithmetic

Angles = tuple[Float[Array, "B T 1 half_dim"], Float[Array, "B T 1 half_dim"]]


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`."""

    factor: float

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency rescaling of Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        wavelengths = 2 * math.pi / frequencies
        # 0 where a wavelength is stretched in full, 1 where it is kept.
        kept = (self.original_max_position_embeddings / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """YaRN (Peng et al. 2023): stretches channels differently, and scales queries and keys by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        # Frequencies are kept up to channel `kept`, stretched from channel `stretched` on, and blended in between.
        kept = self._channel_of(self.beta_fast, frequencies)
        stretched = self._channel_of(self.beta_slow, frequencies)
        if self.truncate:
            kept, stretched = math.floor(kept), math.ceil(stretched)
        kept, stretched = max(kept, 0), min(stretched, 2 * len(frequencies) - 1)
        if kept == stretched:
            stretched += 0.001
        ramp = np.clip((np.arange(len(frequencies)) - kept) / (stretched - kept), 0.0, 1.0)
        return frequencies * (1 - ramp + ramp / self.factor)

    def _channel_of(self, rotations: float, frequencies: np.ndarray) -> float:
        """The unrounded channel that turns this often over the original length; channel 0 turns 1 radian a token."""
        wanted = 2 * math.pi * rotations / self.original_max_position_embeddings
        return -math.log(wanted) / math.log(frequencies[0] / frequencies[1])


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK scaling: beyond the original length, the base grows with the length of the text.

    As in transformers, a key is rotated by its row's length in the forward pass that computes it, so a text's keys
    depend on how it was split into passes.
    """

    factor: float
    original_max_position_embeddings: int

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        """Within the original length nothing changes."""
        return frequencies

    def stretch(
        self, frequencies: Float[Array, " half_dim"], lengths: Int[Array, "*shape"]
    ) -> Float[Array, "*shape half_dim"]:
        """theta' = theta · growth^(D / (D − 2)), and channel i turns by theta'^(−2i / D)."""
        original = self.original_max_position_embeddings
        growth = self.factor * jnp.maximum(lengths, original) / original - (self.factor - 1)
        exponents = np.arange(frequencies.shape[0]) / (frequencies.shape[0] - 1)
        return frequencies * growth[..., None] ** -jnp.asarray(exponents, jnp.float32)


@dataclasses.dataclass(frozen=True)
class FactorRope:
    """Every frequency is divided by a factor of its own: LongRoPE (Ding et al. 2024), where the factors for short texts
    are those for long ones. GGUF files have Llama 3.1's scaling in this form.
    """

    factors: tuple[float, ...]

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / np.asarray(self.factors)


RopeScaling = LinearRope | Llama3Rope | YarnRope | DynamicRope | FactorRope


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer: the base of the frequencies, and how these are stretched."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def angles(
        self,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"],  # noqa: F821
        head_dim: int,
    ) -> Angles:
        """Cosines and sines of the rotation angles, with an axis for the heads, in texts of `lengths` tokens."""
        frequencies = inverse_frequencies(head_dim, self.theta, self.scaling)
        return rotary_angles(positions, frequencies, self.scaling, lengths)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, " half_dim"]:
    """Rotation per position of each pair of channels, in radians."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = scaling.rescale(frequencies)
    return jnp.asarray(frequencies, jnp.float32)


def rotary_angles(
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " half_dim"],
    scaling: RopeScaling | None,
    lengths: Int[Array, "B #T"],  # noqa: F821
) -> Angles:
    """Cosines and sines of the rotation angles, with an axis for the heads, in texts of `lengths` tokens."""
    stretched = frequencies
    if isinstance(scaling, DynamicRope):
        stretched = scaling.stretch(frequencies, lengths)[:, :, None]
    angles = positions[..., None, None].astype(jnp.float32) * stretched
    amplitude = scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(x: Float[Array, "B T H D"], angles: Angles, scale: float = 1.0) -> Float[Array, "B T H D"]:
    """Rotates pairs of channels in the half-split order of Hugging Face checkpoints, and scales them."""
    cos, sin = (scale * part for part in angles) if scale != 1 else angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def read_rope(fields: Mapping[str, Any], head_dim: int) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling and the longest text, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    The longest text is `max_position_embeddings`, or more where `dynamic` and `yarn` extend it.

    Raises:
        ValueError: the rope type is unknown, lacks its fields or does not fit `head_dim`.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {fields[name]!r}")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"config.json: rope parameters of their own for {', '.join(nested)} are not supported"
        )
    refuse_other_arithmetic(rope)
    theta = read_positive(rope, "rope_theta", read_positive(fields, "rope_theta", 10000.0))
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta must be above 1, got {theta}")
    max_positions: int = fields["max_position_embeddings"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("dynamic", "yarn") and head_dim < 4:
        raise ValueError(f"config.json: rope type {kind!r} needs a head_dim of at least 4, got {head_dim}")
    match kind:
        case "default":
            return theta, None, max_positions
        case "linear":
            return theta, LinearRope(*_read_numbers(rope, kind, "factor")), max_positions
        case "llama3":
            factor, low, high = _read_numbers(rope, kind, "factor", "low_freq_factor", "high_freq_factor")
            if high <= low:
                raise ValueError(
                    "config.json: rope type 'llama3' needs a high_freq_factor above its low_freq_factor"
                )
            return theta, Llama3Rope(factor, low, high, _original_length(fields, rope)), max_positions
        case "dynamic":
            (factor,) = _read_numbers(rope, kind, "factor")
            return theta, DynamicRope(factor, max_positions), _longest(max_positions, factor * max_positions)
        case "yarn":
            yarn = _read_yarn(rope, _original_length(fields, rope), max_positions)
            extended = yarn.factor * yarn.original_max_position_embeddings
            return theta, yarn, _longest(max_positions, extended)
        case "longrope":
            return theta, _read_factors(rope, head_dim // 2), max_positions
    raise ValueError(
        f"config.json: rope type {kind!r} is not supported, only default, linear, dynamic, yarn, llama3, longrope"
    )


def _longest(max_positions: int, extended: float) -> int:
    return max(max_positions, int(min(extended, 2**31 - 1)))  # positions are int32


def _read_yarn(rope: Mapping[str, Any], original: int, max_positions: int) -> YarnRope:
    if rope.get("factor") is None and original < max_positions:
        rope = {**rope, "factor": max_positions / original}
    (factor,) = _read_numbers(rope, "yarn", "factor")
    if rope.get("attention_factor") is not None:
        (attention_factor,) = _read_numbers(rope, "yarn", "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = _read_numbers(rope, "yarn", "mscale", "mscale_all_dim")
        attention_factor = _amplitude(factor, mscale) / _amplitude(factor, mscale_all_dim)
    else:
        attention_factor = _amplitude(factor, 1.0)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=read_positive(rope, "beta_fast", 32.0),
        beta_slow=read_positive(rope, "beta_slow", 1.0),
        truncate=read_flag(rope, "truncate", default=True),
    )


def _read_factors(rope: Mapping[str, Any], count: int) -> FactorRope:
    """LongRoPE, as far as it does not depend on the length of a text and scales nothing but frequencies."""
    factors, long_factors = rope.get("short_factor"), rope.get("long_factor")
    if not isinstance(factors, Sequence) or len(factors) != count or not all(map(is_positive, factors)):
        raise ValueError(
            f"config.json: rope type 'longrope' needs short_factor to be {count} positive numbers, got "
            f"{reprlib.repr(factors)}"
        )
    if factors != long_factors or rope.get("attention_factor") != 1:
        raise ValueError(
            "config.json: rope type 'longrope' is only supported with a long_factor equal to short_factor, and an "
            "attention_factor of 1"
        )
    return FactorRope(tuple(map(float, factors)))


def _amplitude(factor: float, weight: float) -> float:
    """YaRN's attention factor (equation 22 of the paper), with DeepSeek's weight for its logarithm."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _original_length(fields: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The length before scaling. As in transformers, the field beside the rope parameters wins over the one in them."""
    name = "original_max_position_embeddings"
    length = fields.get(name) or rope.get(name) or fields["max_position_embeddings"]
    if not is_size(length):
        raise ValueError(f"config.json: {name} must be a positive whole number below 2^31, got {length!r}")
    return int(length)


def _read_numbers(rope: Mapping[str, Any], kind: str, *names: str) -> list[float]:
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind!r} lacks {', '.join(missing)}")
    if wrong := {name: rope[name] for name in names if not is_positive(rope[name])}:
        raise ValueError(f"config.json: rope type {kind!r} needs positive numbers, got {wrong}")
    if "factor" in names and rope["factor"] < 1:
        raise ValueError(
            f"config.json: rope type {kind!r} needs a factor of at least 1, got {rope['factor']}"
        )
    return [float(rope[name]) for name in names]
