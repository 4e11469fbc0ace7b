"""An online softmax over the query heads of one program of the GPU kernel, and the arithmetic of its scores."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Plan

VALUE_CHANNELS = 32  # of a piece; they belong to one group
LOWEST = -1e30  # of a maximum; finite, so that a difference of two is a number


class Item(NamedTuple):
    """Where a program is: its row of the batch, its KV head among the new token's and in the state, its query heads."""

    row: Array
    length: Array
    new_head: Array
    head: Array
    query_heads: Int32[Array, " rows"]
    slopes: Float[Array, " rows"] | None


class Sums(NamedTuple):
    """An online softmax in base 2, and what its probabilities weight."""

    maximum: Float[Array, " rows"]
    denominator: Float[Array, " rows"]
    weighted: tuple[Float[Array, "C rows"], ...]  # by piece of the channels

    def shrunk_to(self, maximum: Float[Array, " rows"]) -> "Sums":
        shrink = jnp.exp2(self.maximum - maximum)
        return Sums(maximum, self.denominator * shrink, tuple(x * shrink[None, :] for x in self.weighted))


def score_unit(plan: Plan) -> float:
    return plan.head_dim**-0.5 * math.log2(math.e)


def bias(slopes: Float[Array, " rows"], tokens: Int[Array, "*T"]) -> Float[Array, "*T rows"]:
    """`alibi_bias` before it is scaled, as scores are; the slopes are rounded already."""
    positions = wide(tokens.astype(jnp.bfloat16))
    if positions.ndim:
        positions = positions[:, None]
    return wide((slopes * positions).astype(jnp.bfloat16))


def pieces(plan: Plan) -> list[Int32[Array, " C"]]:
    """The channels, a few at a time: as many values are unpacked as registers allow."""
    return [start + jnp.arange(VALUE_CHANNELS) for start in range(0, plan.head_dim, VALUE_CHANNELS)]


def dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def wide(x: Array) -> Float[Array, "*n"]:
    return x.astype(jnp.float32)
