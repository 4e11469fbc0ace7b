"""What the rows of a generation are asked for, as arrays."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Key, UInt32

from kivi_jax.request import GenerationSettings
from kivi_jax.sampling import Sampling, make_sampling


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rngs", "limits", "end_tokens", "sampling", "logprobs"],
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
        logprobs: whether its tokens' log-probabilities are wanted.
    """

    rngs: Key[Array, " B"]
    limits: Int[Array, " B"]
    end_tokens: Int[Array, "B E"]
    sampling: Sampling | None
    logprobs: Bool[Array, " B"]

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
    batch = places.size
    seeds = np.broadcast_to(split_seed(settings.seed), (batch, 2))
    padded = jnp.asarray(pad_end_tokens(end_tokens), jnp.int32)
    limits = np.where(np.arange(batch) < used, settings.max_new_tokens, 0)
    return Rows(
        row_rngs(jnp.asarray(seeds), places, samples),
        jnp.asarray(limits, jnp.int32),
        jnp.broadcast_to(padded, (batch, padded.size)),
        make_sampling(settings).of_rows(batch),
        jnp.full(batch, settings.logprobs),
    )


def greedy_rows(batch: int, limit: int, end_tokens: Sequence[int] = ()) -> Rows:
    """Rows that take the most likely tokens."""
    places = np.arange(batch, dtype=np.int32)
    rows = make_rows(GenerationSettings(limit), end_tokens, places, np.zeros_like(places), batch)
    return dataclasses.replace(rows, sampling=None)


def pad_end_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """To a multiple of 4, so that one more of them rarely needs another compilation; no token is -1."""
    return (*tokens, *[-1] * (-len(tokens) % 4 if tokens else 4))


def row_rngs(
    seeds: UInt32[Array, "B 2"], places: Int[ArrayLike, " B"], samples: Int[ArrayLike, " B"]
) -> Key[Array, " B"]:
    """A random key of each row, folded from its seed, the place of its prompt among its request's, and its sample."""
    rngs = jax.vmap(random_key)(seeds)
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(rngs, places), samples)


def random_key(seed: UInt32[Array, "2"]) -> Key[Array, ""]:
    """`jax.random.key(seed)`, but of all 64 bits: where JAX computes in 32, it takes the lower ones only."""
    key = jax.random.key(seed[0])
    return jnp.where(seed[1] == 0, key, jax.random.fold_in(key, seed[1]))


def split_seed(seed: int) -> UInt32[np.ndarray, "2"]:
    """The lower and the upper half of a seed of 64 bits."""
    return np.asarray([seed % 2**32, (seed >> 32) % 2**32], np.uint32)
