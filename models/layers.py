"""Layers shared by the model families: rotary embeddings, grouped-query attention, SwiGLU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

# (q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, D], layer's KV) -> (attention output [B, T, Hq, D], new layer's KV).
# The caller of a model decides what attention sees and what is stored; a model never touches the KV state itself.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

normal_init = nnx.initializers.normal(0.02)


def rotary_angles(
    positions: Int[Array, "B T"], inverse_frequencies: Float[Array, " half_dim"]
) -> tuple[Float[Array, "B T 1 half_dim"], Float[Array, "B T 1 half_dim"]]:
    """Cosines and sines of the rotation angles, with an axis for the heads."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"],
    angles: tuple[Float[Array, "B T 1 half_dim"], Float[Array, "B T 1 half_dim"]],
) -> Float[Array, "B T H D"]:
    """Rotary position embedding (Su et al. 2021) in the half-split order of Hugging Face checkpoints."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def linear(rngs: nnx.Rngs, inputs: int, outputs: int, *, bias: bool, dtype: Any) -> nnx.Linear:
    """A linear layer whose parameters and arithmetic share one dtype."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=normal_init,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; `attend` does the attention proper."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_dim
        self.q_proj = linear(rngs, hidden_size, num_heads * head_dim, bias=bias, dtype=dtype)
        self.k_proj = linear(rngs, hidden_size, num_kv_heads * head_dim, bias=bias, dtype=dtype)
        self.v_proj = linear(rngs, hidden_size, num_kv_heads * head_dim, bias=bias, dtype=dtype)
        self.o_proj = linear(rngs, num_heads * head_dim, hidden_size, bias=bias, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        angles: tuple[Float[Array, "B T 1 half_dim"], Float[Array, "B T 1 half_dim"]],
        layer_kv: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), angles)
        k = rotate(self.k_proj(x).reshape(heads), angles)
        v = self.v_proj(x).reshape(heads)
        out, layer_kv = attend(q, k, v, layer_kv)
        return self.o_proj(out.reshape(batch, length, -1)), layer_kv


class SwiGLU(nnx.Module):
    """Gated feed-forward layer, `down(silu(gate(x)) · up(x))` (Shazeer 2020)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs
    ):
        self.gate_proj = linear(rngs, hidden_size, intermediate_size, bias=bias, dtype=dtype)
        self.up_proj = linear(rngs, hidden_size, intermediate_size, bias=bias, dtype=dtype)
        self.down_proj = linear(rngs, intermediate_size, hidden_size, bias=bias, dtype=dtype)

    def __call__(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B T hidden"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
