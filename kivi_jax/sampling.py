"""Tokens from logits: what each row asks for are values, so that any mixture of rows is one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from kivi_jax.promotion import with_usual_promotion
from kivi_jax.request import GenerationSettings

LEAST_TEMPERATURE = 1e-6  # as good as greedy; much less and float32 logits overflow
ALL_TOKENS = 2**31 - 1  # a top_k that cuts nothing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row's token is chosen; a scalar holds for all rows.

    At temperature 0 it is the most likely one after the `repetition_penalty` (see `penalize`), of equals the one with
    the lowest id. Otherwise it is drawn from a distribution that is shaped in this order, which is transformers':

    - the `repetition_penalty`;
    - softmax(logits / temperature);
    - `top_k`: the k most likely tokens;
    - `top_p`: of what then remains, the fewest most likely ones that together reach this probability (Holtzman et
      al. 2020);
    - `min_p`: the tokens at least this times as likely as the most likely one (Nguyen et al. 2024).

    Tokens as likely as the last one that a cut keeps are kept with it. `ALL_TOKENS`, 1 and 0 cut nothing.
    """

    temperature: Float[Array, "#B"] | Float[Array, ""]
    top_k: Int[Array, "#B"] | Int[Array, ""]
    top_p: Float[Array, "#B"] | Float[Array, ""]
    min_p: Float[Array, "#B"] | Float[Array, ""]
    repetition_penalty: Float[Array, "#B"] | Float[Array, ""]

    __no_type_check__ = True  # for JAX, whose trees hold anything in the places of arrays

    def of_rows(self, rows: int) -> "Sampling":
        """The same for each of so many rows."""
        return jax.tree.map(lambda value: jnp.broadcast_to(value, (rows,)), self)

    @with_usual_promotion
    def __call__(
        self,
        logits: Float[Array, "B vocab"],
        rngs: Key[Array, " B"],
        seen: Bool[Array, "B vocab"] | None = None,
    ) -> Int[Array, " B"]:
        """One token a row. Without `seen`, the tokens that a row has already, no row's repetition is penalized."""
        logits = self._penalize(logits, seen)

        def draw() -> Array:
            drawn = jax.vmap(jax.random.categorical)(rngs, self._cut(logits)).astype(jnp.int32)
            return jnp.where(self.temperature == 0, likeliest(logits), drawn)

        return jax.lax.cond(jnp.any(self.temperature > 0), draw, lambda: likeliest(logits))

    @with_usual_promotion
    def scores(
        self, logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"] | None = None
    ) -> Float[Array, "B vocab"]:
        """Logits of the distribution that tokens are drawn from, -inf for those that are cut."""
        return self._cut(self._penalize(logits, seen))

    def _penalize(
        self, logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"] | None
    ) -> Float[Array, "B vocab"]:
        if seen is None:
            return logits
        penalty = jnp.asarray(self.repetition_penalty)
        return jax.lax.cond(jnp.any(penalty != 1), lambda: penalize(logits, seen, penalty), lambda: logits)

    def _cut(self, logits: Float[Array, "B vocab"]) -> Float[Array, "B vocab"]:
        logits = logits / jnp.maximum(self.temperature, LEAST_TEMPERATURE)[..., None]
        ranks = _flip_negatives(jax.lax.bitcast_convert_type(logits, jnp.int32))
        nothing = jnp.full((logits.shape[0], 1), -jnp.inf, jnp.float32)
        top_k, top_p, min_p = (x[..., None] for x in (self.top_k, self.top_p, self.min_p))

        def least_of_top_k() -> Array:
            most = jnp.minimum(top_k, logits.shape[-1])
            return _largest(ranks, lambda kept: kept.sum(axis=-1, keepdims=True) >= most)

        least = jax.lax.cond(jnp.any(top_k < logits.shape[-1]), least_of_top_k, lambda: nothing)

        def least_of_top_p() -> Array:
            probabilities = jax.nn.softmax(jnp.where(logits < least, -jnp.inf, logits), axis=-1)
            reaching = _largest(
                ranks, lambda kept: jnp.where(kept, probabilities, 0).sum(axis=-1, keepdims=True) >= top_p
            )
            # Summed up in float32, 1 can be reached too early.
            return jnp.where(top_p < 1, jnp.maximum(least, reaching), least)

        least = jax.lax.cond(jnp.any(top_p < 1), least_of_top_p, lambda: least)
        least = jnp.maximum(least, logits.max(axis=-1, keepdims=True) + jnp.log(min_p))
        return jnp.where(logits < least, -jnp.inf, logits)


def _largest(
    ranks: Int[Array, "B vocab"], enough: Callable[[Bool[Array, "B vocab"]], Bool[Array, "B 1"]]
) -> Float[Array, "B 1"]:
    """The largest logit of each row of which those that are at least as large are `enough`; the least if none is.

    Bisects its rank: 32 passes over the vocabulary take a fraction of the time of a sort.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; low + high can overflow
        kept = enough(ranks >= middle)
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle - 1)

    bounds = ranks.min(axis=-1, keepdims=True), ranks.max(axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(_flip_negatives(low), jnp.float32)


def _flip_negatives(bits: Int[Array, "B n"]) -> Int[Array, "B n"]:
    """Between the bits of floats, which order negative ones backwards, and integers in the order of the floats."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def likeliest(logits: Float[Array, "B vocab"]) -> Int[Array, " B"]:
    """The most likely token of each row, of equals the one with the lowest id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def penalize(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"], penalty: Float[Array, "..."]
) -> Float[Array, "B vocab"]:
    """Logits of the tokens that a row has `seen` divided by `penalty` where positive and multiplied by it where not
    (Keskar et al. 2019).
    """
    penalty = penalty[..., None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def make_sampling(settings: GenerationSettings) -> Sampling:
    """The sampling of one request, as scalars."""
    temperature = settings.temperature and max(settings.temperature, LEAST_TEMPERATURE)
    values: dict[str, Any] = {
        "temperature": np.float32(temperature),
        "top_k": np.int32(ALL_TOKENS if settings.top_k is None else min(settings.top_k, ALL_TOKENS)),
        "top_p": np.float32(1 if settings.top_p is None else settings.top_p),
        "min_p": np.float32(settings.min_p or 0),
        "repetition_penalty": np.float32(settings.repetition_penalty),
    }
    return Sampling(**values)
