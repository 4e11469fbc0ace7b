"""Gemma 3: its configuration, module and weight table, for the text models and the text part of those that see."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.models.decoder import Decoder
from kivi_jax.models.fields import (
    FULL,
    SLIDING,
    read_flag,
    read_positive,
    read_sizes,
    read_sliding_windows,
    refuse_other_arithmetic,
)
from kivi_jax.models.layers import Attend, Attention, Embedding, GatedFeedForward
from kivi_jax.models.llama import LlamaConfig, read_decoder
from kivi_jax.models.rope import Angles, Rope, read_rope

# transformers' defaults, for fields that are absent from config.json, as many are in that of 4B, 12B and 27B.
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
SLIDING_PATTERN = 6  # every sixth layer attends all tokens
FULL_THETA = 1000000.0
SLIDING_ROPE = Rope(10000.0)
QUERY_PRE_ATTN_SCALAR = 256.0


@dataclasses.dataclass(frozen=True)
class Gemma3Config(LlamaConfig):
    """A Gemma 3's `config.json`.

    Attributes:
        query_pre_attn_scalar: scores are divided by its square root, instead of that of `head_dim`.
        sliding_rope: rotary positions of the layers with a sliding window. The others have `rope_theta` and
            `rope_scaling`.
    """

    rope_theta: float = FULL_THETA
    qk_norm: bool = True
    tied_head: bool = True
    query_pre_attn_scalar: float = QUERY_PRE_ATTN_SCALAR
    sliding_rope: Rope = SLIDING_ROPE

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Gemma3Config":
        """As `LlamaConfig.from_json`; a `text_config` in it is the language model of one that also sees images."""
        if "text_config" in fields:
            fields = _read_text_config(fields)
        full, sliding = _rope_fields(fields)
        fields = {**DEFAULTS, **fields, **full}
        shared = read_decoder(fields, "gelu_pytorch_tanh", "hidden_activation")
        read_sizes(fields, (), ("sliding_window_pattern",))
        pattern = fields.get("sliding_window_pattern") or SLIDING_PATTERN
        default = [SLIDING if layer % pattern else FULL for layer in range(1, shared["num_layers"] + 1)]
        attention_bias = read_flag(fields, "attention_bias")
        return cls(
            **shared,
            attention_bias=attention_bias,
            output_bias=attention_bias,
            sliding_windows=read_sliding_windows(fields, fields["sliding_window"], default),
            query_pre_attn_scalar=read_positive(fields, "query_pre_attn_scalar", QUERY_PRE_ATTN_SCALAR),
            sliding_rope=Rope(*read_rope({**fields, **sliding}, shared["head_dim"])[:2]),
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each layer's rotary positions."""
        full = Rope(self.rope_theta, self.rope_scaling)
        return tuple(full if window is None else self.sliding_rope for window in self.sliding_windows)


def _read_text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    refuse_other_arithmetic(fields)
    text = fields["text_config"]
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json: text_config must be an object, got {text!r}")
    # As in transformers, it is the whole model that says whether the head is tied.
    return {**text, "tie_word_embeddings": fields.get("tie_word_embeddings", True)}


def _rope_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `read_rope` reads for the layers that attend all tokens, and for those with a sliding window.

    They are in `rope_parameters`, by layer type (transformers 5), or in `rope_theta` with `rope_scaling`, and in
    `rope_local_base_freq`.
    """
    by_type = fields.get("rope_parameters") or {}
    if not isinstance(by_type, Mapping) or any(
        kind not in (FULL, SLIDING) or not isinstance(rope or {}, Mapping) for kind, rope in by_type.items()
    ):
        raise ValueError(
            f"config.json: rope_parameters must have an object for {FULL} and one for {SLIDING}, got {by_type!r}"
        )
    theta = read_positive(fields, "rope_theta", FULL_THETA)
    local = read_positive(fields, "rope_local_base_freq", SLIDING_ROPE.theta)
    return (
        {"rope_parameters": by_type.get(FULL), "rope_theta": theta},
        {"rope_parameters": by_type.get(SLIDING), "rope_theta": local, "rope_scaling": None},
    )


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) by 1 + `scale`, so that small weights keep their digits; all in float32."""

    def __init__(self, size: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class ScaledEmbedding(Embedding):
    """Embeddings times the square root of the hidden size, which is rounded to their dtype."""

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T hidden"]:
        embedded = super().__call__(tokens)
        return embedded * jnp.asarray(embedded.shape[-1] ** 0.5, embedded.dtype)


class Gemma3Layer(nnx.Module):
    """Attention and feed-forward, each with a norm before it, one after it and a residual connection."""

    def __init__(self, config: Gemma3Config, *, dtype: Any, rngs: nnx.Rngs):
        self.input_norm = norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm=functools.partial(RMSNorm, epsilon=config.rms_norm_eps),
            query_scale=(config.head_dim / config.query_pre_attn_scalar) ** 0.5,
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = norm(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm(config, dtype=dtype, rngs=rngs)
        self.mlp = GatedFeedForward(
            config.hidden_size, config.intermediate_size, gelu_tanh, bias=False, dtype=dtype, rngs=rngs
        )
        self.post_mlp_norm = norm(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T hidden"], angles: Angles, layer_kv: Any, attend: Attend
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        attended, layer_kv = self.attention(self.input_norm(x), angles, layer_kv, attend)
        x = x + self.post_attention_norm(attended)
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x))), layer_kv


class Gemma3(Decoder):
    """Decoder-only transformer (Gemma Team 2025)."""

    def __init__(self, config: Gemma3Config, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, Gemma3Layer, norm, ScaledEmbedding, dtype=dtype, rngs=rngs)


def norm(config: Gemma3Config, *, dtype: Any, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)


def gelu_tanh(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    return jax.nn.gelu(x, approximate=True)


# Checkpoint name -> parameter path. The language model of one that sees has a prefix, before or after `model`.
_MODEL = r"(?:language_model\.model|model\.language_model|model)\."
_LAYER = _MODEL + r"layers\.(\d+)\."
WEIGHTS = (
    (_MODEL + r"embed_tokens\.weight", r"embed.embedding"),
    (_LAYER + r"input_layernorm\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"post_attention_layernorm\.weight", r"layers.\1.post_attention_norm.scale"),
    (_LAYER + r"pre_feedforward_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"post_feedforward_layernorm\.weight", r"layers.\1.post_mlp_norm.scale"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.weight", r"layers.\1.attention.\2.kernel"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.bias", r"layers.\1.attention.\2.bias"),
    (_LAYER + r"self_attn\.([qk]_norm)\.weight", r"layers.\1.attention.\2.scale"),
    (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj)\.weight", r"layers.\1.mlp.\2.kernel"),
    (_MODEL + r"norm\.weight", r"norm.scale"),
    (r"(?:language_model\.)?lm_head\.weight", r"head.kernel"),
    (r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..+", ()),
)
