"""Attention of a new token of each row over a layer's stored keys and values."""

import functools

import jax
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.layer import Layer
from kivi_jax.pallas_kernels import tpu_layers
from kivi_jax.pallas_kernels.decode_attention import gpu, tpu, xla
from kivi_jax.pallas_kernels.dispatch import Implementation, Kernel, check_implementation, dispatch
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

KERNELS = {
    "pallas_tpu": Kernel("tpu", "tpu", tpu.decode_attention, tpu_layers.check_supported),
    "pallas_gpu": Kernel("cuda", "gpu", gpu.decode_attention, gpu.check_supported),
}


def decode_attention(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 H D"],
    v: Float[Array, "B 1 H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
    implementation: Implementation = "auto",
) -> Float[Array, "B 1 Hq D"]:
    """Attends the `lengths` tokens that `layer` stores, and a new token (k, v) that it does not hold yet, exactly.

    One softmax over everything, in float32. The dequantized cache is never materialised, and the work over packed
    tokens grows with the longest row, not with capacity. On several devices it must run inside a `jax.shard_map`.

    Args:
        q: queries of the new tokens.
        k: their keys, of as many KV heads as `layer` has.
        v: their values, likewise.
        layer: what is stored.
        lengths: stored tokens of each row.
        heads: position biases, and which of the KV heads the queries read; the kernels copy nothing for it.
        implementation: `"xla"` runs everywhere; `"pallas_tpu"` is the TPU kernel and `"pallas_gpu"` that for NVIDIA
            GPUs, which other devices interpret, slowly; `"auto"` is the kernel for the platform that a program is
            compiled for, where there is one that takes these shapes, and else XLA.

    Raises:
        NotImplementedError: the kernel that was asked for does not take these shapes or dtypes; the message says why.
        ValueError: `implementation` is unknown.
    """
    check_implementation(implementation)
    return _compiled(q, k, v, layer, lengths, heads, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _compiled(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 H D"],
    v: Float[Array, "B 1 H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    heads: Heads,
    implementation: Implementation,
) -> Float[Array, "B 1 Hq D"]:
    """Compiled, so that layers alike are traced once: the kernel takes a while."""
    out = dispatch(
        "decode attention",
        KERNELS,
        xla.decode_attention,
        implementation,
        layer,
        *(q, k, layer.rotated(v), layer, lengths, heads),
    )
    return layer.rotated(out)
