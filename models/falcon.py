"""Falcon: its configuration, module and weight table, for 7B, 40B, 180B, Falcon2-11B and falcon-rw."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from kivi_jax.models.decoder import Decoder
from kivi_jax.models.fields import (
    read_flag,
    read_positive,
    read_sizes,
    refuse_other_activation,
    refuse_other_arithmetic,
)
from kivi_jax.models.layers import Attend, Attention, Linear
from kivi_jax.models.rope import Angles, Rope, RopeScaling, read_rope

# Names in the config.json of checkpoints that are older than transformers' Falcon (`RefinedWeb`, `RefinedWebModel`).
OLDER_NAMES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}


@dataclasses.dataclass(frozen=True)
class FalconConfig:
    """The fields of a Hugging Face `config.json` that decide the arithmetic.

    Attributes:
        max_positions: the longest text in tokens, prompt and completion together.
        alibi: whether positions are biases of attention scores (ALiBi, Press et al. 2022) instead of rotary.
        bias: whether all linear layers have biases.
        parallel: whether attention and feed-forward both read the layer's input, instead of one after the other.
        num_norms: LayerNorms in a layer; with a single one, attention and feed-forward share it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    alibi: bool = False
    layer_norm_epsilon: float = 1e-5
    bias: bool = False
    parallel: bool = True
    num_norms: int = 1
    tied_head: bool = True

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "FalconConfig":
        """Reads a parsed `config.json`.

        Raises:
            ValueError: fields are missing, or ask for something this module does not compute.
        """
        grouped = read_flag(fields, "new_decoder_architecture", default="n_head_kv" in fields)
        fields = {"max_position_embeddings": 2048} | {
            OLDER_NAMES.get(name, name): fields[name] for name in fields
        }
        required = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        read_sizes(fields, required, ("num_kv_heads", "ffn_hidden_size"))
        refuse_other_arithmetic(fields)
        refuse_other_activation(fields, "activation", "gelu")
        num_heads = fields["num_attention_heads"]
        if fields["hidden_size"] % (2 * num_heads):
            raise ValueError(
                f"config.json: hidden_size {fields['hidden_size']} over num_attention_heads {num_heads} must be "
                "an even whole number"
            )
        num_kv_heads = num_heads
        if grouped:
            num_kv_heads = fields.get("num_kv_heads") or num_heads
        elif read_flag(fields, "multi_query", default=True):
            num_kv_heads = 1
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}"
            )
        parallel = grouped or read_flag(fields, "parallel_attn", default=True)
        num_norms = (fields.get("num_ln_in_parallel_attn") or 1 + grouped) if parallel else 2
        if num_norms not in ((1, 2) if grouped or not parallel else (1,)):
            raise ValueError(
                f"config.json: num_ln_in_parallel_attn {num_norms!r} is not supported, only 1, "
                "or 2 with new_decoder_architecture"
            )
        theta, scaling, max_positions = read_rope(fields, fields["hidden_size"] // num_heads)
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields.get("ffn_hidden_size") or 4 * fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            alibi=read_flag(fields, "alibi"),
            layer_norm_epsilon=read_positive(fields, "layer_norm_epsilon", 1e-5),
            bias=read_flag(fields, "bias"),
            parallel=parallel,
            num_norms=num_norms,
            tied_head=read_flag(fields, "tie_word_embeddings", default=True),
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def sliding_windows(self) -> tuple[None, ...]:
        """Every layer attends all tokens."""
        return (None,) * self.num_layers

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Each layer's rotary positions; none with ALiBi."""
        return (None if self.alibi else Rope(self.rope_theta, self.rope_scaling),) * self.num_layers

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        """Each query head's slope: a geometric series, then half steps of it if the heads are not a power of 2."""
        if not self.alibi:
            return None
        power = 2 ** math.floor(math.log2(self.num_heads))
        slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
        slopes += [2 ** (-4 * head / power) for head in range(1, 2 * power, 2)]
        return tuple(slopes[: self.num_heads])


class FeedForward(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, config: FalconConfig, *, dtype: Any, rngs: nnx.Rngs):
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.up_proj = Linear(hidden, intermediate, bias=config.bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(
            intermediate, hidden, bias=config.bias, partial_sums=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B T hidden"]:
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=False))


class FalconLayer(nnx.Module):
    """Attention and feed-forward, in parallel or one after the other."""

    def __init__(self, config: FalconConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.parallel = config.parallel
        self.input_norm = layer_norm(config, dtype=dtype, rngs=rngs)
        if config.num_norms == 2:
            self.mlp_norm = layer_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            bias=config.bias,
            output_bias=config.bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T hidden"], angles: Angles | None, layer_kv: Any, attend: Attend
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        normed = self.input_norm(x)
        attended, layer_kv = self.attention(normed, angles, layer_kv, attend)
        if not self.parallel:
            x = x + attended
            return x + self.mlp(self.mlp_norm(x)), layer_kv
        if hasattr(self, "mlp_norm"):
            normed = self.mlp_norm(x)
        return x + (self.mlp(normed) + attended), layer_kv


class Falcon(Decoder):
    """Decoder-only transformer (Almazrouei et al. 2023)."""

    def __init__(self, config: FalconConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, FalconLayer, layer_norm, dtype=dtype, rngs=rngs)


def layer_norm(config: FalconConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


def split_qkv(config: FalconConfig, fused: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits `query_key_value`, which holds for each KV head its query heads, its key and its value."""
    rest = fused.shape[1:]
    heads = fused.reshape(config.num_kv_heads, -1, config.head_dim, *rest)
    q, k, v = heads[:, :-2], heads[:, -2], heads[:, -1]
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


# Checkpoint name -> parameter path, or the paths of its parts and the function that splits it.
_LAYER = r"transformer\.h\.(\d+)\."
_QKV = tuple(rf"layers.\1.attention.{part}_proj." for part in "qkv")
WEIGHTS = (
    (r"transformer\.word_embeddings\.weight", r"embed.embedding"),
    (_LAYER + r"(?:input_layernorm|ln_attn)\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"(?:input_layernorm|ln_attn)\.bias", r"layers.\1.input_norm.bias"),
    (_LAYER + r"(?:post_attention_layernorm|ln_mlp)\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"(?:post_attention_layernorm|ln_mlp)\.bias", r"layers.\1.mlp_norm.bias"),
    (_LAYER + r"self_attention\.query_key_value\.weight", tuple(path + "kernel" for path in _QKV), split_qkv),
    (_LAYER + r"self_attention\.query_key_value\.bias", tuple(path + "bias" for path in _QKV), split_qkv),
    (_LAYER + r"self_attention\.dense\.weight", r"layers.\1.attention.o_proj.kernel"),
    (_LAYER + r"self_attention\.dense\.bias", r"layers.\1.attention.o_proj.bias"),
    (_LAYER + r"mlp\.dense_h_to_4h\.weight", r"layers.\1.mlp.up_proj.kernel"),
    (_LAYER + r"mlp\.dense_h_to_4h\.bias", r"layers.\1.mlp.up_proj.bias"),
    (_LAYER + r"mlp\.dense_4h_to_h\.weight", r"layers.\1.mlp.down_proj.kernel"),
    (_LAYER + r"mlp\.dense_4h_to_h\.bias", r"layers.\1.mlp.down_proj.bias"),
    (r"transformer\.ln_f\.weight", r"norm.scale"),
    (r"transformer\.ln_f\.bias", r"norm.bias"),
    (r"lm_head\.weight", r"head.kernel"),
)
