"""The queries of one program of the GPU kernel for chunks, and their online softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from kivi_jax.pallas_kernels.chunk_attention.gpu_plan import Plan
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import exp2_of_sum
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import LOWEST, bias, dot, score_unit

NEVER = 2**30  # the position of what no query attends


class Queries(NamedTuple):
    """Query rows of one KV head, in order of their tokens, and where these are.

    Attributes:
        row: of the batch.
        length: tokens that it has stored.
        new: new tokens that it has.
        head: the KV head.
        vectors: the queries.
        tokens: new tokens, from 0 on; the last block repeats the last one.
        first, last: the block's first token, and the last that counts.
    """

    row: Array
    length: Array
    new: Array
    head: Array
    vectors: Float[Array, "rows D"]
    tokens: Int32[Array, " rows"]
    slopes: Float[Array, " rows"] | None
    first: Array
    last: Array


class Sums(NamedTuple):
    """An online softmax in base 2, and the values weighted by it, unnormalised."""

    maximum: Float[Array, " rows"]
    denominator: Float[Array, " rows"]
    weighted: Float[Array, "rows D"]

    @classmethod
    def zero(cls, rows: int, head_dim: int) -> "Sums":
        return cls(jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros((rows, head_dim)))


def attend_tile(
    plan: Plan,
    queries: Queries,
    sums: Sums,
    keys: Float[Array, "T D"],
    values: Float[Array, "T D"],
    tokens: Int32[Array, " T"],
    partial: Array | bool,
    interpret: bool,
) -> Sums:
    """Adds tokens at the positions `tokens`, of which queries attend no later ones than themselves; if not `partial`,
    all of them.
    """
    scores = dot(queries.vectors, keys.T)
    if queries.slopes is not None:
        scores += bias(queries.slopes[:, None], tokens[None])

    def mask(scores: Float[Array, "rows T"]) -> Float[Array, "rows T"]:
        return jnp.where(_attended(plan, queries, tokens), scores, -jnp.inf)

    # `cond` does not lower if its condition is constant.
    scores = mask(scores) if partial is True else jax.lax.cond(partial, mask, lambda scores: scores, scores)
    unit = score_unit(plan.head_dim)
    maximum = jnp.maximum(sums.maximum, scores.max(1) * unit)
    shrink = jnp.exp2(sums.maximum - maximum)
    weights = exp2_of_sum(scores, unit, jnp.broadcast_to(-maximum[:, None], scores.shape), interpret)
    weighted = sums.weighted * shrink[:, None] + dot(weights.astype(values.dtype), values)
    return Sums(maximum, sums.denominator * shrink + weights.sum(1), weighted)


def _attended(plan: Plan, queries: Queries, tokens: Int32[Array, " T"]) -> Bool[Array, "rows T"]:
    positions = (queries.length + queries.tokens)[:, None]
    attended = tokens[None] <= positions
    if plan.sliding_window is not None:
        attended &= tokens[None] > positions - plan.sliding_window
    return attended
