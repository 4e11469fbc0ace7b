"""Layers shared by the model families: linear layers, embeddings, grouped-query attention, gated feed-forward."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.models.rope import Angles, rotate

# (q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, D], layer's KV) -> (attention output [B, T, Hq, D], new layer's KV).
# The caller of a model decides what attention sees and what is stored; a model never touches the KV state itself.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]

MANY_ROWS = 512  # from so many on, it matters what a GPU does besides multiplying them

normal_init = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """`x · kernelᵀ + bias` in one dtype, summed in float32.

    The kernel is `[outputs, inputs]`, as in checkpoints. With this order and float32 sums, XLA's CPU backend multiplies
    bfloat16 directly; otherwise it keeps float32 copies of all weights beside the decode loop. A GPU writes sums that
    are asked for, and rounds them in another kernel; products of many rows, which it sums in float32 in any case, are
    written rounded.

    Args:
        partial_sums: whether the devices of a mesh split the inputs. What they write is summed then, and rounded after.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, partial_sums: bool = False, dtype: Any, rngs: nnx.Rngs
    ):
        self.partial_sums = partial_sums
        self.kernel = nnx.Param(normal_init(rngs.params(), (outputs, inputs), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, dtype))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        kernel = self.kernel[...]
        if hasattr(self, "bias"):
            y = project(x, kernel)
            return (y + self.bias[...].astype(y.dtype)).astype(x.dtype)
        if x.dtype == jnp.float32 or self.partial_sums or _number_of_rows(x) < MANY_ROWS:
            return _project_and_round(x, kernel)
        return jax.lax.platform_dependent(x, kernel, cuda=_project_at_once, default=_project_and_round)


def project(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "*batch outputs"]:
    """x · kernelᵀ in float32. Inputs are one matrix: for a batched product, XLA would keep a transposed kernel."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and x.dtype != jnp.float32:
        y = jax.lax.platform_dependent(rows, kernel, cpu=_product_of_one_row, default=_product)
    else:
        y = _product(rows, kernel)
    return y.reshape(*x.shape[:-1], -1)


def _project_and_round(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "*batch outputs"]:
    return project(x, kernel).astype(x.dtype)


def _project_at_once(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "*batch outputs"]:
    y = _product(x.reshape(-1, x.shape[-1]), kernel, x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def _product(
    rows: Float[Array, "rows inputs"], kernel: Float[Array, "outputs inputs"], dtype: Any = jnp.float32
) -> Float[Array, "rows outputs"]:
    return jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _product_of_one_row(
    row: Float[Array, "1 inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "1 outputs"]:
    """Pads to two rows, which the CPU backend multiplies in 16 bits; for one it would convert the kernel to float32.

    A product of float32 is left to one row, which the backend multiplies without reordering the kernel before.
    """
    return _product(jnp.pad(row, ((0, 1), (0, 0))), kernel)[:1]


class Embedding(nnx.Module):
    """A table with a row for every token."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal_init(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T hidden"]:
        return self.embedding[...][tokens]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; `attend` does the attention proper.

    Args:
        bias: whether the projections to queries, keys and values have biases.
        output_bias: whether the output projection has one.
        qk_norm: makes the norms of each head's queries and keys before rotation; None for no such norms.
        query_scale: what queries are multiplied by as they are rotated, as `attend` divides scores by √head_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        output_bias: bool,
        qk_norm: Callable[..., nnx.Module] | None = None,
        query_scale: float = 1.0,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_dim
        self.query_scale = query_scale
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(
            num_heads * head_dim, hidden_size, bias=output_bias, partial_sums=True, dtype=dtype, rngs=rngs
        )
        if qk_norm is not None:
            self.q_norm = qk_norm(head_dim, dtype=dtype, rngs=rngs)
            self.k_norm = qk_norm(head_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        angles: Angles | None,
        layer_kv: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "B T hidden"], Any]:
        """Without `angles` nothing is rotated, and positions are up to `attend`."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).reshape(heads) for proj, x in zip(projections, _apart(x, 3), strict=True))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles, self.query_scale), rotate(k, angles)
        out, layer_kv = attend(q, k, v, layer_kv)
        return self.o_proj(out.reshape(batch, length, -1)), layer_kv


def _apart(x: Float[Array, "*batch inputs"], times: int) -> Sequence[Float[Array, "*batch inputs"]]:
    """`x` for so many products. On a GPU XLA makes one of them, and one array of their kernels in every step: with many
    rows, that array takes longer to make than it saves.
    """
    same = (x,) * times
    if _number_of_rows(x) < MANY_ROWS:
        return same
    return jax.lax.platform_dependent(*same, cuda=_as_others, default=_as_they_are)


def _number_of_rows(x: Float[Array, "*batch inputs"]) -> int:
    return math.prod(x.shape[:-1])


def _as_others(*arrays: Array) -> tuple[Array, ...]:
    return jax.lax.optimization_barrier(arrays)


def _as_they_are(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def rms_norm(size: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


class GatedFeedForward(nnx.Module):
    """`down(activation(gate(x)) · up(x))` (Shazeer 2020): SwiGLU with SiLU, GeGLU with GELU."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Array], Array] = jax.nn.silu,
        *,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(
            intermediate_size, hidden_size, bias=bias, partial_sums=True, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B T hidden"]:
        gated, plain = _apart(x, 2)
        return self.down_proj(self.activation(self.gate_proj(gated)) * self.up_proj(plain))
