"""Attention of chunks in plain XLA operations: the reference, for every device."""

from jax import Array
from jaxtyping import Float, Int

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
    return xla.decode_attention(q, k, v, layer, lengths, heads)
