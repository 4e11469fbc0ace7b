"""Attention of several new tokens of each row over a layer's stored keys and values, and over each other."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels import tpu_layers
from kivi_jax.pallas_kernels.chunk_attention import gpu, tpu, xla
from kivi_jax.pallas_kernels.dispatch import Implementation, Kernel, check_implementation, dispatch
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

KERNELS = {
    "pallas_tpu": Kernel("tpu", "tpu", tpu.chunk_attention, tpu_layers.check_supported),
    "pallas_gpu": Kernel("cuda", "gpu", gpu.chunk_attention, gpu.check_supported),
}


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
    implementation: Implementation = "auto",
) -> Float[Array, "B T Hq D"]:
    """Attends the `lengths` tokens that `layer` stores, and T new tokens (k, v) that it does not hold yet: each attends
    itself and those before it, exactly. The output of those beyond a row's `counts` is 0, whatever they hold.

    One softmax over everything, in float32. The dequantized cache is never materialised, nor a matrix of all scores,
    and the work over packed tokens grows with the longest row, not with capacity. On several devices it must run inside
    a `jax.shard_map`.

    Args:
        q: queries of the new tokens.
        k: their keys, of as many KV heads as `layer` has.
        v: their values, likewise.
        layer: what is stored.
        lengths: stored tokens of each row.
        counts: new tokens of each row, from none to T.
        heads: position biases, and which of the KV heads the queries read; the kernels copy nothing for it.
        implementation: as for `decode_attention`.

    Raises:
        NotImplementedError: the kernel that was asked for does not take these shapes or dtypes; the message says why.
        ValueError: `implementation` is unknown.
    """
    check_implementation(implementation)
    return _compiled(q, k, v, layer, lengths, counts, heads, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _compiled(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    heads: Heads,
    implementation: Implementation,
) -> Float[Array, "B T Hq D"]:
    """Compiled, so that layers alike are traced once."""
    out = dispatch(
        "attention of chunks",
        KERNELS,
        xla.chunk_attention,
        implementation,
        layer,
        *(q, k, layer.rotated(v), layer, lengths, counts, heads),
    )
    return jnp.where(xla.there_are(counts, q), layer.rotated(out), 0)
