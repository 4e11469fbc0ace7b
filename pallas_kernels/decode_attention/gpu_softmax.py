"""An online softmax over the query heads of one program of the GPU kernel, and the arithmetic of its scores."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Plan

VALUE_CHANNELS = 32  # channels of values in a piece, all of one group
LOWEST = -1e30  # a maximum before any score; finite, so that the difference of two is not NaN


class Item(NamedTuple):
    """What a program attends: a row of the batch, its tokens, how many of them are packed, a KV head in the new token
    and in the state, and query heads.
    """

    row: Array
    length: Array
    packed: Array
    new_head: Array
    head: Array
    query_heads: Int32[Array, " rows"]
    slopes: Float[Array, " rows"] | None


class Sums(NamedTuple):
    """An online softmax in base 2, and the values weighted by it, unnormalised."""

    maximum: Float[Array, " rows"]
    denominator: Float[Array, " rows"]
    weighted: tuple[Float[Array, "C rows"], ...]  # one for each piece of the channels

    @classmethod
    def zero(cls, plan: Plan) -> "Sums":
        weighted = tuple(jnp.zeros((channels.size, plan.rows)) for channels in pieces(plan))
        return cls(jnp.full(plan.rows, LOWEST), jnp.zeros(plan.rows), weighted)

    def shrunk_to(self, maximum: Float[Array, " rows"]) -> "Sums":
        shrink = jnp.exp2(self.maximum - maximum)
        return Sums(maximum, self.denominator * shrink, tuple(x * shrink[None, :] for x in self.weighted))


def score_unit(head_dim: int) -> float:
    """By which scores are multiplied, so that 2^x is what e^x was."""
    return head_dim**-0.5 * math.log2(math.e)


def bias(slopes: Float[Array, "*#n"], tokens: Int[Array, "*#n"]) -> Float[Array, "*n"]:
    """`alibi_bias` before the scaling that scores get, too; the slopes are rounded already."""
    positions = to_float32(tokens.astype(jnp.bfloat16))
    return to_float32((slopes * positions).astype(jnp.bfloat16))


def pieces(plan: Plan) -> list[Int32[Array, " C"]]:
    """The channels in pieces: registers allow only so many unpacked values at a time."""
    return [start + jnp.arange(VALUE_CHANNELS) for start in range(0, plan.head_dim, VALUE_CHANNELS)]


def dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def to_float32(x: Array) -> Float[Array, "*n"]:
    return x.astype(jnp.float32)
