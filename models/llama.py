"""The Llama decoder, which Mistral, Qwen2 and Qwen3 share: its configuration, module and weight table."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float

from kivi_jax.models.decoder import Decoder
from kivi_jax.models.fields import (
    FULL,
    read_flag,
    read_head_dim,
    read_positive,
    read_sizes,
    read_sliding_windows,
    refuse_other_activation,
    refuse_other_arithmetic,
)
from kivi_jax.models.layers import Attend, Attention, GatedFeedForward, rms_norm
from kivi_jax.models.rope import Angles, Rope, RopeScaling, read_rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face `config.json` that decide the arithmetic.

    Attributes:
        max_positions: the longest text in tokens, prompt and completion together.
        attention_bias: whether the projections to queries, keys and values have biases.
        output_bias: whether attention's projection back to the hidden size has one.
        qk_norm: whether each head's queries and keys are normalised before rotation.
        sliding_windows: for each layer, how many of the newest tokens a token attends, itself included; None for all,
            which is every layer's default.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    sliding_windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed `config.json`.

        Raises:
            ValueError: fields are missing, or ask for something this module does not compute.
        """
        shared = read_decoder(fields)
        window = fields.get("sliding_window")
        if (
            window
            and window < shared["max_positions"]
            and read_flag(fields, "use_sliding_window", default=True)
        ):
            raise ValueError(
                f"config.json: sliding_window {window!r} is not supported in a llama, only in a mistral"
            )
        read_sliding_windows(fields, None, [FULL] * shared["num_layers"])
        attention_bias = read_flag(fields, "attention_bias")
        return cls(
            **shared,
            attention_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=read_flag(fields, "mlp_bias"),
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each layer's rotary positions."""
        return (Rope(self.rope_theta, self.rope_scaling),) * self.num_layers

    @property
    def alibi_slopes(self) -> None:
        """None: positions are rotary."""


def read_decoder(
    fields: Mapping[str, Any], activation: str = "silu", activation_field: str = "hidden_act"
) -> dict[str, Any]:
    """The arguments of `LlamaConfig` that all families with its sizes read in the same way.

    `activation` is the one that the family has, in this field.

    Raises:
        ValueError: as `LlamaConfig.from_json`.
    """
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    read_sizes(fields, required, ("num_key_value_heads", "head_dim", "sliding_window"))
    refuse_other_arithmetic(fields)
    refuse_other_activation(fields, activation_field, activation)
    num_heads = fields["num_attention_heads"]
    num_kv_heads = fields.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = read_head_dim(fields)
    theta, scaling, max_positions = read_rope(fields, head_dim)
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_positions": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": read_positive(fields, "rms_norm_eps", 1e-6),
        "tied_head": read_flag(fields, "tie_word_embeddings"),
    }


class LlamaLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.input_norm = norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm=functools.partial(rms_norm, epsilon=config.rms_norm_eps) if config.qk_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = norm(config, dtype=dtype, rngs=rngs)
        self.mlp = GatedFeedForward(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T hidden"], angles: Angles, layer_kv: Any, attend: Attend
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        attended, layer_kv = self.attention(self.input_norm(x), angles, layer_kv, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), layer_kv


class Llama(Decoder):
    """Decoder-only transformer with RMSNorm, rotary positions and SwiGLU (Touvron et al. 2023)."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, LlamaLayer, norm, dtype=dtype, rngs=rngs)


def norm(config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return rms_norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)


# Checkpoint name -> parameter path.
_LAYER = r"model\.layers\.(\d+)\."
WEIGHTS = (
    (r"model\.embed_tokens\.weight", r"embed.embedding"),
    (_LAYER + r"input_layernorm\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"post_attention_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.weight", r"layers.\1.attention.\2.kernel"),
    (_LAYER + r"self_attn\.([qkvo]_proj)\.bias", r"layers.\1.attention.\2.bias"),
    (_LAYER + r"self_attn\.([qk]_norm)\.weight", r"layers.\1.attention.\2.scale"),
    (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj)\.weight", r"layers.\1.mlp.\2.kernel"),
    (_LAYER + r"mlp\.(gate_proj|up_proj|down_proj)\.bias", r"layers.\1.mlp.\2.bias"),
    (r"model\.norm\.weight", r"norm.scale"),
    (r"lm_head\.weight", r"head.kernel"),
)
