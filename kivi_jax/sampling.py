"""Token samplers: pure functions of logits and one random key a row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.promotion import with_usual_promotion
from kivi_jax.request import GenerationSettings

LEAST_TEMPERATURE = 1e-6  # as good as greedy; much less and float32 logits overflow


@functools.partial(jax.tree_util.register_dataclass, data_fields=["repetition_penalty"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token, of equals the one with the lowest id, after the `repetition_penalty` (see `penalize`)."""

    repetition_penalty: Float[Array, ""] | None = None

    __no_type_check__ = True  # for JAX, whose trees hold anything in the places of arrays

    @with_usual_promotion
    def __call__(
        self, logits: Float[Array, "B vocab"], rngs: Any, seen: Bool[Array, "B vocab"] | None = None
    ) -> Int[Array, " B"]:
        return jnp.argmax(penalize(logits, seen, self.repetition_penalty), axis=-1).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Categorical:
    """A token drawn from a distribution that is shaped in this order, which is transformers':

    - the `repetition_penalty` (see `penalize`);
    - softmax(logits / temperature);
    - `top_k`: the k most likely tokens;
    - `top_p`: of what then remains, the fewest most likely ones that together reach this probability (Holtzman et
      al. 2020);
    - `min_p`: the tokens at least this times as likely as the most likely one (Nguyen et al. 2024).

    Tokens as likely as the last one that a cut keeps are kept with it. The fields are values and not part of the
    compiled program; only whether they are None is.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None

    __no_type_check__ = True  # for JAX, whose trees hold anything in the places of arrays

    @with_usual_promotion
    def __call__(
        self, logits: Float[Array, "B vocab"], rngs: Any, seen: Bool[Array, "B vocab"] | None = None
    ) -> Int[Array, " B"]:
        return jax.vmap(jax.random.categorical)(rngs, self.scores(logits, seen)).astype(jnp.int32)

    @with_usual_promotion
    def scores(
        self, logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"] | None = None
    ) -> Float[Array, "B vocab"]:
        """Logits of the distribution that tokens are drawn from, -inf for those that are cut."""
        logits = penalize(logits, seen, self.repetition_penalty) / self.temperature
        least = jnp.full((logits.shape[0], 1), -jnp.inf)
        if self.top_k is not None or self.top_p is not None:
            least = self._least_of_the_top(logits)
        if self.min_p is not None:
            least = jnp.maximum(least, logits.max(axis=-1, keepdims=True) + jnp.log(self.min_p))
        return jnp.where(logits < least, -jnp.inf, logits)

    def _least_of_the_top(self, logits: Float[Array, "B vocab"]) -> Float[Array, "B 1"]:
        """The least logit that `top_k` and `top_p` keep."""
        least = jnp.full((logits.shape[0], 1), -jnp.inf)
        ranks = _flip_negatives(jax.lax.bitcast_convert_type(logits, jnp.int32))
        if self.top_k is not None:
            top_k = jnp.minimum(self.top_k, logits.shape[-1])
            least = _largest(ranks, lambda kept: kept.sum(axis=-1, keepdims=True) >= top_k)
        if (top_p := self.top_p) is not None:
            probabilities = jax.nn.softmax(jnp.where(logits < least, -jnp.inf, logits), axis=-1)
            reaching = _largest(
                ranks,
                lambda kept: jnp.where(kept, probabilities, 0).sum(axis=-1, keepdims=True) >= top_p,
            )
            least = jnp.maximum(least, reaching)
        return least


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


Sampler = Greedy | Categorical


def penalize(
    logits: Float[Array, "B vocab"], seen: Bool[Array, "B vocab"] | None, penalty: Float[Array, ""] | None
) -> Float[Array, "B vocab"]:
    """Logits of the tokens that a row has `seen` divided by `penalty` where positive and multiplied by it where not
    (Keskar et al. 2019); with a penalty of None, just the logits.
    """
    if penalty is None:
        return logits
    assert seen is not None
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def make_sampler(settings: GenerationSettings) -> Sampler:
    """The sampler for these settings; temperature 0 is greedy."""
    penalty = None if settings.repetition_penalty == 1 else jnp.float32(settings.repetition_penalty)
    if settings.temperature == 0:
        return Greedy(penalty)
    return Categorical(
        jnp.float32(max(settings.temperature, LEAST_TEMPERATURE)),
        # Settings that cut nothing are left out: summed up in float32, 1 can be reached too early.
        None if settings.top_k is None else jnp.int32(min(settings.top_k, 2**31 - 1)),
        None if settings.top_p in (None, 1) else jnp.float32(settings.top_p),
        None if settings.min_p in (None, 0) else jnp.float32(settings.min_p),
        penalty,
    )
