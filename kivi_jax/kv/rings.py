"""Rings: entry i lies in slot i % size, where it replaces entry i - size."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


def slot_of(entry: Array, size: int) -> Array:
    """Where `entry` lies in a ring of `size` slots."""
    return entry % size


def newest_round(count: Array, size: int) -> tuple[Array, Array]:
    """How a ring that was given `count` entries is filled, as `(slots, first)`.

    The first `slots` slots hold entries of the newest round, which began with entry `first` in slot 0; the others still
    hold those of the round before. They never held any if that gives a negative number.
    """
    last = count - 1  # -1, for an empty ring, has a quotient of 0 and a remainder of -1
    sizes = jax.lax.full_like(last, size)
    return jax.lax.rem(last, sizes) + 1, jax.lax.div(last, sizes) * size


def entry_in(slot: Array, count: Array, size: int) -> Array:
    """The entry that `slot` holds after `count` of them, negative if it holds none."""
    slots, first = newest_round(count, size)
    return slot + jnp.where(slot < slots, first, first - size)


def token_at(place: Array, length: Array, block: int, capacity: int) -> Array:
    """`entry_in` of places for tokens, which come to a ring of `capacity` in whole blocks, after `length` of them.

    Nothing is divided for each place. Those of tokens that are not in the ring yet, or that it never held, are told by
    the token only.
    """
    slots, first = newest_round(jax.lax.div(length, jax.lax.full_like(length, block)), capacity // block)
    first *= block
    return place + jnp.where(place < slots * block, first, first - capacity)


def entries_in(counts: Int[Array, " B"], size: int) -> Int[Array, "B size"]:
    """`entry_in` of every slot, for the rings of all rows."""
    return entry_in(jnp.arange(size), counts[:, None], size)
