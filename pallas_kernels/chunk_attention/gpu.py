"""Attention of chunks on an NVIDIA GPU: flash attention of a block of queries, to which packed tokens are unpacked."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.chunk_attention.gpu_plan import Plan
from kivi_jax.pallas_kernels.decode_attention import gpu
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

try:
    from kivi_jax.pallas_kernels.chunk_attention import gpu_kernel
    from kivi_jax.pallas_kernels.decode_attention import gpu_wide
except ImportError:  # of Pallas' Triton lowering, see `gpu`
    gpu_kernel = gpu_wide = None  # type: ignore[assignment]


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: QuantizedLayer,
    lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
    *,
    interpret: bool = False,
) -> Float[Array, "B T Hq D"]:
    """`api.chunk_attention` as one kernel.

    Args:
        interpret: run anywhere, slowly.

    Raises:
        NotImplementedError: something the kernel does not cover, which the message names.
    """
    check_supported(q, layer)
    batch, new, query_heads, _ = q.shape
    kv_heads = heads.kv_heads or layer.num_kv_heads
    plan = Plan(**Plan.fields_of(query_heads, kv_heads, layer), new=new)
    inputs = {
        "lengths": lengths.astype(jnp.int32),
        "counts": counts.astype(jnp.int32),
        "first_kv_head": jnp.asarray(heads.first_kv_head, jnp.int32).reshape(1),
        **gpu.queries_by_name(q, layer, heads),
        "k": k,
        "v": v,
        **gpu.stored(layer),
    }
    if heads.alibi_slopes is not None:
        inputs["slopes"] = gpu.rounded_slopes(heads.alibi_slopes)
    return pl.pallas_call(
        functools.partial(gpu_kernel.attend_block, plan=plan, names=(*inputs, "out"), interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(plan.blocks, kv_heads, batch),  # programs that read the same tokens begin together
        compiler_params=gpu_wide.compiler_params(),
        interpret=interpret,
        name="kivi_chunk_attention",
    )(*inputs.values())


check_supported = gpu.check_supported
