"""Arrays taken apart and put together by giving registers other names, for which a GPU computes nothing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped


def split(x: Shaped[Array, "*n parts"]) -> list[Shaped[Array, "*n"]]:
    """Splits `x` along its last axis, whose size is a power of two."""
    count = x.shape[-1]
    parts = [(0, x.reshape(*x.shape[:-1], *[2] * (count.bit_length() - 1)))]
    weight = 1
    while weight < count:
        parts = [
            (index + weight * bit, part)
            for index, array in parts
            for bit, part in enumerate(jax.lax.unstack(array, axis=array.ndim - 1))
        ]
        weight *= 2
    return [part for _, part in sorted(parts, key=lambda pair: pair[0])]


def interleave(parts: Sequence[Shaped[Array, "*n"]]) -> Shaped[Array, "*n parts"]:
    """Undoes `split`."""
    shape = *parts[0].shape, len(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [jnp.stack(pair, axis=-1) for pair in zip(parts[:half], parts[half:], strict=True)]
    return parts[0].reshape(shape)
