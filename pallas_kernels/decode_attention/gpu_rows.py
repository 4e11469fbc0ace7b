"""Queries as rows of the GPU's matrix products, as many as a warp group takes, and their online softmax."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_boosted import pieces_of_boosted
from kivi_jax.pallas_kernels.decode_attention.gpu_codes import exp2_of_sum
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Layout
from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import LOWEST, bias, dot, score_unit

NEVER = 2**30  # the position of what no query attends


class Queries(NamedTuple):
    """A block of the query rows of a KV head, which are the query heads of the first new token, of the second, ….

    Attributes:
        row: of the batch.
        length: tokens that it has stored.
        new: new tokens that it has.
        new_head, head: the KV head among those that are read, and in the state.
        vectors: the queries, in pieces as keys have them. Rows beyond the last query repeat those of its token.
        tokens, heads: new tokens, from 0 on, and query heads.
        slopes: of position biases, if there are any.
        first, last: the first token, and the last that the row has.
    """

    row: Array
    length: Array
    new: Array | int
    new_head: Array
    head: Array
    vectors: tuple[Float[Array, "rows _"], ...]
    tokens: Int32[Array, " rows"]
    heads: Int32[Array, " rows"]
    slopes: Float[Array, " rows"] | None
    first: Array
    last: Array

    @classmethod
    def read(
        cls,
        layout: Layout,
        ref: dict[str, Any],
        row: Array,
        new: Array | int,
        new_head: Array,
        places: Int32[Array, " rows"],
        start: Array,
    ) -> "Queries":
        """The rows at `places`, from `start` on."""
        tokens = jnp.minimum(jax.lax.div(places, layout.shared), ref["q"].shape[1] - 1)
        heads = new_head * layout.shared + jax.lax.rem(places, layout.shared)
        return cls(
            row=row,
            length=ref["lengths"][row],
            new=new,
            new_head=new_head,
            head=ref["first_kv_head"][0] + new_head,
            vectors=(ref["q"][row, tokens[:, None], heads[:, None], jnp.arange(layout.head_dim)[None]],),
            tokens=tokens,
            heads=heads,
            slopes=ref["slopes"][heads] if "slopes" in ref else None,
            first=jax.lax.div(start, layout.shared),
            last=jnp.minimum(jax.lax.div(start + (places.size - 1), layout.shared), new - 1),
        )

    def of_packed(self, layout: Layout, ref: dict[str, Any]) -> "Queries":
        """The same, as packed keys have their channels: all of them, and once more those that are boosted."""
        if not layout.boosted:
            return self
        of_low = (layout.head_dim + piece for piece in pieces_of_boosted(layout, layout.head_dim))
        vectors = (
            ref["packed_q"][self.row, self.tokens[:, None], self.heads[:, None], channels[None]]
            for channels in (jnp.arange(layout.head_dim), *of_low)
        )
        return self._replace(vectors=tuple(vectors))


class Sums(NamedTuple):
    """An online softmax in base 2, and the values weighted by it, unnormalised."""

    maximum: Float[Array, " rows"]
    denominator: Float[Array, " rows"]
    weighted: Float[Array, "rows D"]

    @classmethod
    def zero(cls, rows: int, head_dim: int) -> "Sums":
        return cls(jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros((rows, head_dim)))

    def result(self) -> Float[Array, "rows D"]:
        return self.weighted / self.denominator[:, None]


def attend_tile(
    layout: Layout,
    queries: Queries,
    sums: Sums,
    keys: tuple[Float[Array, "T _"], ...],
    values: Float[Array, "T D"],
    positions: Int32[Array, " T"],
    partial: Array | bool,
    interpret: bool,
) -> Sums:
    """Adds the tokens at `positions`, whose keys are in pieces as the queries are. Unless the tile is `partial`, every
    query attends all of them.
    """
    products = (dot(q, k.T) for q, k in zip(queries.vectors, keys, strict=True))
    scores = functools.reduce(jnp.add, products)
    if queries.slopes is not None:
        scores += bias(queries.slopes[:, None], positions[None])

    def mask(scores: Float[Array, "rows T"]) -> Float[Array, "rows T"]:
        return jnp.where(_attended(layout, queries, positions), scores, -jnp.inf)

    # `cond` does not lower if its condition is constant.
    scores = mask(scores) if partial is True else jax.lax.cond(partial, mask, lambda scores: scores, scores)
    unit = score_unit(layout.head_dim)
    maximum = jnp.maximum(sums.maximum, scores.max(1) * unit)
    shrink = jnp.exp2(sums.maximum - maximum)
    weights = exp2_of_sum(scores, unit, jnp.broadcast_to(-maximum[:, None], scores.shape), interpret)
    weighted = sums.weighted * shrink[:, None] + dot(weights.astype(values.dtype), values)
    return Sums(maximum, sums.denominator * shrink + weights.sum(1), weighted)


def _attended(layout: Layout, queries: Queries, positions: Int32[Array, " T"]) -> Bool[Array, "rows T"]:
    own = (queries.length + queries.tokens)[:, None]
    attended = positions[None] <= own
    if layout.sliding_window is not None:
        attended &= positions[None] > own - layout.sliding_window
    return attended
