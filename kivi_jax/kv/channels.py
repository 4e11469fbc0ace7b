"""The order of a head's channels: which keys' channels are boosted, and values rotated over all.

The error of a score is that of each key channel times the query there. So channels are weighed by the range of their
groups, to which the error is proportional, times the root mean square of the queries. A few channels of a head have
most of both, and the same ones in every block, so a row's first block of R tokens decides for all of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

MANY_TOKENS = 32  # a ring or a prompt has more, the queries of a step fewer


def order_channels(
    k: Float[Array, "B H R D"], query_energy: Float[Array, "B H D"], group_size: int
) -> Int32[Array, "B H D"]:
    """Channels in the order of what their keys' codes would lose, the most first; the first of equals first.

    Args:
        k: the keys of the row's first block.
        query_energy: for each channel, the sum of the squares of the queries that were asked of it so far.
        group_size: tokens of a group.
    """
    groups = k.astype(jnp.float32).reshape(*k.shape[:2], -1, group_size, k.shape[3])
    ranges = jnp.sum(groups.max(3) - groups.min(3), axis=2)
    return jnp.argsort(-ranges * jnp.sqrt(query_energy), axis=-1, stable=True).astype(jnp.int32)


def take_channels(x: Float[Array, "B H T D"], channels: Int32[Array, "B H D"]) -> Float[Array, "B H T D"]:
    """`x` with its `channels` in their order.

    A TPU gathers slowly along lanes. There it is a product with ones and zeros, which is exact for finite numbers. And
    for a CPU XLA would copy many tokens into another order before, in a loop in every step.
    """
    on_cpu = _gather if x.shape[2] < MANY_TOKENS else _take_by_product
    return jax.lax.platform_dependent(x, channels, tpu=_take_by_product, cpu=on_cpu, default=_gather)


def put_channels(x: Float[Array, "B H T D"], channels: Int32[Array, "B H D"]) -> Float[Array, "B H T D"]:
    """Undoes `take_channels`."""
    return take_channels(x, jnp.argsort(channels, axis=-1).astype(jnp.int32))


def _gather(x: Array, channels: Array) -> Array:
    return jnp.take_along_axis(x, channels[:, :, None], axis=3)


def _take_by_product(x: Array, channels: Array) -> Array:
    chosen = (jnp.arange(x.shape[3])[:, None] == channels[:, :, None]).astype(x.dtype)
    return jnp.einsum("bhtd,bhdc->bhtc", x, chosen, precision=jax.lax.Precision.HIGHEST)


def rotate(x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """`x` times an orthogonal and symmetric matrix, so that twice is nothing: a Hadamard matrix, or where D is no power
    of two, equal ones along the diagonal.
    """
    size = x.shape[-1]
    product = jnp.einsum(
        "...d,dc->...c",
        x,
        jnp.asarray(hadamard(size), x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (product * _power_in(size) ** -0.5).astype(x.dtype)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of ones and minus ones, or several along the diagonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < _power_in(size):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // len(matrix)), matrix)


def _power_in(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size
