"""Attention of chunks in plain XLA operations: the reference, for every device."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels.decode_attention import xla
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
) -> Float[Array, "B T Hq D"]:
    """`api.chunk_attention`, of any storage: what decodes a token attends several as well."""
    # What is no number would be one of none, whatever its weight.
    k, v = (jnp.where(there_are(counts, x), x, 0) for x in (k, v))
    return xla.decode_attention(q, k, v, layer, jnp.where(counts > 0, lengths, 0), heads)


def there_are(counts: Int[Array, " B"], x: Float[Array, "B T H D"]) -> Bool[Array, "B T 1 1"]:
    """Which of T tokens are among the `counts` of their row."""
    return (jnp.arange(x.shape[1]) < counts[:, None])[:, :, None, None]
