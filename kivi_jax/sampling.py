"""Token samplers: pure functions of logits and one random key a row."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

LEAST_TEMPERATURE = 1e-6  # as good as greedy; much less and float32 logits overflow


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; of equals, the one with the lowest id."""

    def __call__(self, logits: Float[Array, "B vocab"], keys: Any) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Random:
    """A token drawn from softmax(logits / temperature), cut to the `top_k` most likely tokens, and of what then
    remains to the fewest most likely ones that together reach probability `top_p` (Holtzman et al. 2020).

    The fields are values and not part of the compiled program; only whether top_k and top_p are None is.
    """

    temperature: Any
    top_k: Any = None
    top_p: Any = None

    def __call__(self, logits: Float[Array, "B vocab"], keys: Any) -> Int[Array, " B"]:
        logits = logits / self.temperature
        if self.top_k is not None or self.top_p is not None:
            logits = self._cut(logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def _cut(self, logits: Float[Array, "B vocab"]) -> Float[Array, "B vocab"]:
        """Logits with -inf for the tokens that are not to be drawn."""
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        kept = jnp.ones_like(ranked, bool)
        if self.top_k is not None:
            kept = kept & (jnp.arange(ranked.shape[-1]) < self.top_k)
        if self.top_p is not None:
            probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            kept = kept & (before < self.top_p)
        rows = jnp.arange(logits.shape[0])[:, None]
        return jnp.full_like(logits, -jnp.inf).at[rows, order].set(jnp.where(kept, ranked, -jnp.inf))


Sampler = Greedy | Random


def make_sampler(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """The sampler for these settings; temperature 0 is greedy.

    Raises:
        ValueError: temperature < 0, top_k < 1, or top_p outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return Greedy()
    return Random(
        jnp.float32(max(temperature, LEAST_TEMPERATURE)),
        None if top_k is None else jnp.int32(min(top_k, 2**31 - 1)),
        None if top_p is None else jnp.float32(top_p),
    )
