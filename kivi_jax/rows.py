"""What the rows of a generation are asked for, as arrays."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Key

from kivi_jax.request import GenerationSettings
from kivi_jax.sampling import Sampling, make_sampling


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rngs", "limits", "end_tokens", "sampling"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """What each row of a generation is asked for, whatever its neighbours are.

    Attributes:
        rngs: a random key, of which each of the row's tokens gets its own.
        limits: most tokens to generate; 0 for a row that only fills up the batch.
        end_tokens: tokens that end the row, padded with -1.
        sampling: how its tokens are chosen; None if all rows just take the most likely ones, for which the program is
            smaller, and needs no memory for probabilities.
    """

    rngs: Key[Array, " B"]
    limits: Int[Array, " B"]
    end_tokens: Int[Array, "B E"]
    sampling: Sampling | None

    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays


def make_rows(
    settings: GenerationSettings,
    end_tokens: Sequence[int],
    places: Int[np.ndarray, " B"],
    samples: Int[np.ndarray, " B"],
    used: int,
) -> Rows:
    """Rows that are all asked for the same.

    Args:
        settings: what for.
        end_tokens: ids that end a row.
        places: which of the prompts a row continues.
        samples: which of its prompt's samples a row is. Place and sample tell a row's random numbers from others'.
        used: the rows from this one on only fill up the batch.
    """
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(random_key(settings.seed), places)
    rngs = jax.vmap(jax.random.fold_in)(rngs, samples)
    padded = jnp.asarray(pad_end_tokens(end_tokens), jnp.int32)
    limits = np.where(np.arange(places.size) < used, settings.max_new_tokens, 0)
    return Rows(
        rngs,
        jnp.asarray(limits, jnp.int32),
        jnp.broadcast_to(padded, (places.size, padded.size)),
        make_sampling(settings).of_rows(places.size),
    )


def greedy_rows(batch: int, limit: int, end_tokens: Sequence[int] = ()) -> Rows:
    """Rows that take the most likely tokens."""
    places = np.arange(batch, dtype=np.int32)
    rows = make_rows(GenerationSettings(limit), end_tokens, places, np.zeros_like(places), batch)
    return dataclasses.replace(rows, sampling=None)


def pad_end_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """To a multiple of 4, so that one more of them rarely needs another compilation; no token is -1."""
    return (*tokens, *[-1] * (-len(tokens) % 4 if tokens else 4))


def random_key(seed: int) -> Array:
    """`jax.random.key(seed)`, but of all 64 bits: where JAX computes in 32, it takes the lower ones only."""
    upper, lower = divmod(seed, 2**32)
    key = jax.random.key(np.uint32(lower))
    return jax.random.fold_in(key, np.uint32(upper % 2**32)) if upper else key
