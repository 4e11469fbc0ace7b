"""Llama: the module, its configuration and the table that maps checkpoint names to parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.models.layers import Attend, Attention, Embedding, Linear, SwiGLU, project, rotary_angles


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
class LinearRope:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float

    def rescale(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face `config.json` that decide a Llama's arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | LinearRope | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed `config.json`.

        Raises:
            ValueError: fields are missing, or ask for something this module does not compute.
        """
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        if missing := [name for name in required if fields.get(name) is None]:
            raise ValueError(f"config.json lacks the fields {', '.join(missing)}")
        sizes = {name: fields.get(name) for name in (*required, "num_key_value_heads", "head_dim")}
        if wrong := {name: size for name, size in sizes.items() if not _is_size(size)}:
            raise ValueError(f"config.json: these must be positive whole numbers, got {wrong}")
        if (activation := fields.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
        num_heads = fields["num_attention_heads"]
        num_kv_heads = fields.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = fields.get("head_dim") or fields["hidden_size"] / num_heads
        if head_dim % 2:
            raise ValueError(
                f"config.json: head_dim must be an even whole number for rotary positions, got {head_dim}"
            )
        if not _is_positive(rms_norm_eps := fields.get("rms_norm_eps") or 1e-6):
            raise ValueError(f"config.json: rms_norm_eps must be a positive number, got {rms_norm_eps!r}")
        theta, scaling = read_rope(fields)
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(head_dim),
            max_positions=fields["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=rms_norm_eps,
            attention_bias=fields.get("attention_bias", False),
            mlp_bias=fields.get("mlp_bias", False),
            tied_head=fields.get("tie_word_embeddings", False),
        )

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        return (None,) * self.num_layers

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        return None

    def inverse_frequencies(self) -> Float[Array, " half_dim"]:
        """Rotation per position of each pair of channels, in radians."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        if self.rope_scaling is not None:
            frequencies = self.rope_scaling.rescale(frequencies)
        return jnp.asarray(frequencies, jnp.float32)


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value > 0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def read_rope(fields: Mapping[str, Any]) -> tuple[float, Llama3Rope | LinearRope | None]:
    """RoPE base and rescaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Raises:
        ValueError: a rope type other than default, linear or llama3, or one that lacks its fields.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(value := fields.get(name) or {}, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {value!r}")
        rope |= value
    theta = rope.get("rope_theta") or fields.get("rope_theta") or 10000.0
    if not _is_positive(theta):
        raise ValueError(f"config.json: rope_theta must be a positive number, got {theta!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    scalings = {"linear": LinearRope, "llama3": Llama3Rope}
    if not isinstance(kind, str) or kind not in scalings:
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported, only default, {', '.join(scalings)}"
        )
    names = [field.name for field in dataclasses.fields(scalings[kind])]
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind!r} lacks {', '.join(missing)}")
    if wrong := {name: rope[name] for name in names if not _is_positive(rope[name])}:
        raise ValueError(f"config.json: rope type {kind!r} needs positive numbers, got {wrong}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError("config.json: rope type 'llama3' needs a high_freq_factor above its low_freq_factor")
    return float(theta), scalings[kind](**{name: rope[name] for name in names})


class LlamaLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.input_norm = rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = rms_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T hidden"], angles: tuple[Array, Array], layer_kv: Any, attend: Attend
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        attended, layer_kv = self.attention(self.input_norm(x), angles, layer_kv, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), layer_kv


class Llama(nnx.Module):
    """Decoder-only transformer (Touvron et al. 2023)."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = rms_norm(config, dtype=dtype, rngs=rngs)
        if not config.tied_head:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layers_kv: Sequence[Any],
        attend: Attend,
    ) -> tuple[Float[Array, "B T hidden"], tuple[Any, ...]]:
        """Final hidden states of `tokens`, and every layer's KV as `attend` left it."""
        x = self.embed(tokens)
        angles = rotary_angles(positions, self.config.inverse_frequencies())
        new_layers_kv = []
        for layer, layer_kv in zip(self.layers, layers_kv, strict=True):
            x, layer_kv = layer(x, angles, layer_kv, attend)
            new_layers_kv.append(layer_kv)
        return self.norm(x), tuple(new_layers_kv)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Next-token logits, float32."""
        kernel = self.embed.embedding if self.config.tied_head else self.head.kernel
        return project(hidden, kernel[...])


def rms_norm(config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


# Checkpoint name -> parameter path.
_LAYER = r"model\.layers\.(\d+)\."
WEIGHTS = (
    (r"model\.embed_tokens\.weight", r"embed.embedding"),
    (_LAYER + r"input_layernorm\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"post_attention_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.weight", r"layers.\1.attention.\2.kernel"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.bias", r"layers.\1.attention.\2.bias"),
    (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj)\.weight", r"layers.\1.mlp.\2.kernel"),
    (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj)\.bias", r"layers.\1.mlp.\2.bias"),
    (r"model\.norm\.weight", r"norm.scale"),
    (r"lm_head\.weight", r"head.kernel"),
)
