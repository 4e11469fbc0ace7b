"""Decode attention on an NVIDIA GPU: a Pallas kernel over items of work, and one that merges them.

A row's stored tokens are cut into items, as many as fill the GPU, from the rows' lengths: its exact tokens (ring, sinks
and new token) are one, and its packed ones some more. So one long row keeps the whole GPU busy, and so do many short
ones. Of very many short rows each is one item, and nothing is merged. What is beyond a row's end is never read.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.decode_attention.gpu_boosted import queries_of_packed
from kivi_jax.pallas_kernels.decode_attention.gpu_plan import Plan, list_work
from kivi_jax.pallas_kernels.devices import nvidia_capability
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

try:
    from kivi_jax.pallas_kernels.decode_attention import gpu_kernel, gpu_wide
except ImportError:  # of Pallas' Triton lowering, which is deprecated since JAX 0.11 and will go
    gpu_kernel = gpu_wide = None  # type: ignore[assignment]

HEAD_DIMS = (64, 128)
GROUP_SIZES = (32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
BOOSTED = 16  # of which boosted channels are a multiple: what a product sums over
LEAST_CAPABILITY = 8.0  # from Ampere on: matrix products in bfloat16


def decode_attention(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 H D"],
    v: Float[Array, "B 1 H D"],
    layer: QuantizedLayer,
    lengths: Int[Array, " B"],
    heads: Heads = ALL_HEADS,
    *,
    interpret: bool = False,
) -> Float[Array, "B 1 Hq D"]:
    """`api.decode_attention` as two kernels, or one.

    Args:
        interpret: run anywhere, slowly.

    Raises:
        NotImplementedError: something the kernel does not cover, which the message names.
    """
    check_supported(q, layer)
    batch, _, query_heads, head_dim = q.shape
    kv_heads = heads.kv_heads or layer.num_kv_heads
    plan = Plan(
        **Plan.fields_of(query_heads, kv_heads, layer),
        alibi=heads.alibi_slopes is not None,
        batch=batch,
    )
    queries = queries_by_name(q, layer, heads)
    if not plan.wide:
        queries = {name: x[:, 0] for name, x in queries.items()}
        k, v = heads.of_new(k)[:, 0], heads.of_new(v)[:, 0]
    work, of_rows = list_work(lengths, plan)
    inputs = {
        **work,
        "lengths": lengths.astype(jnp.int32),
        "first_kv_head": jnp.asarray(heads.first_kv_head, jnp.int32).reshape(1),
        **queries,
        "k": k,
        "v": v,
        **stored(layer),
    }
    if heads.alibi_slopes is not None:
        inputs["slopes"] = rounded_slopes(heads.alibi_slopes)
    programs: ModuleType = gpu_wide if plan.wide else gpu_kernel
    params = gpu_wide.compiler_params() if plan.wide else gpu_kernel.compiler_params(warps=1)
    out_shape = jax.ShapeDtypeStruct((batch, query_heads, head_dim), q.dtype)
    if plan.whole_rows:
        return pl.pallas_call(
            functools.partial(programs.attend_rows, plan=plan, names=(*inputs, "out"), interpret=interpret),
            out_shape=out_shape,
            grid=(plan.programs_of_item, batch),
            compiler_params=params,
            interpret=interpret,
            name="kivi_decode_attention",
        )(*inputs.values())[:, None]
    items = work["rows"].size
    places = (items, kv_heads, plan.row_blocks * plan.rows)
    results = {
        "maximum": jax.ShapeDtypeStruct(places, jnp.float32),
        "denominator": jax.ShapeDtypeStruct(places, jnp.float32),
        "weighted": jax.ShapeDtypeStruct((*places, head_dim), jnp.float32),
    }
    parts = pl.pallas_call(
        functools.partial(programs.attend_items, plan=plan, names=(*inputs, *results), interpret=interpret),
        out_shape=list(results.values()),
        grid=(plan.programs_of_item, items),
        compiler_params=params,
        interpret=interpret,
        name="kivi_decode_attention",
    )(*inputs.values())
    names = (*of_rows, *results, "out")
    out = pl.pallas_call(
        functools.partial(gpu_kernel.merge, shared=plan.shared, names=names),
        out_shape=out_shape,
        grid=(batch, query_heads),
        compiler_params=gpu_kernel.compiler_params(warps=4),
        interpret=interpret,
        name="kivi_merge",
    )(*of_rows.values(), *parts)
    return out[:, None]


def check_supported(q: Float[Array, "B T Hq D"], layer: QuantizedLayer) -> None:
    """Raises NotImplementedError with what the kernel does not cover, if there is something."""
    if gpu_kernel is None:
        raise NotImplementedError(
            "the GPU kernel needs Pallas' Triton lowering, which this JAX no longer has"
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"the GPU kernel takes a head_dim of 64 or 128, not {q.shape[-1]}")
    group_size = layer.config.group_size
    if group_size not in GROUP_SIZES:
        raise NotImplementedError(f"the GPU kernel takes a group_size of 32, 64 or 128, not {group_size}")
    boosted = layer.config.boosted_of(q.shape[-1])
    if layer.config.boosted_channels and (not boosted or boosted % BOOSTED):
        raise NotImplementedError(
            f"the GPU kernel takes boosted channels in a multiple of {BOOSTED}, not {boosted} of a head_dim of "
            f"{q.shape[-1]}"
        )
    if q.dtype not in DTYPES or layer.window_k.dtype != q.dtype:
        raise NotImplementedError(
            "the GPU kernel takes queries and a state in bfloat16 or both in float16, not "
            f"{q.dtype} and {layer.window_k.dtype}"
        )
    device = jax.devices()[0]
    if device.platform == "gpu" and (nvidia_capability() or 0) < LEAST_CAPABILITY:
        raise NotImplementedError(
            f"the GPU kernel needs an NVIDIA GPU of compute capability {LEAST_CAPABILITY}, and {device.device_kind} "
            f"has {device.compute_capability}"
        )


def rounded_slopes(slopes: Slopes) -> Float[Array, " Hq"]:
    """To bfloat16, as `alibi_bias` has them."""
    return jax.lax.reduce_precision(jnp.asarray(slopes, jnp.float32), exponent_bits=8, mantissa_bits=7)


def queries_by_name(
    q: Float[Array, "B T Hq D"], layer: QuantizedLayer, heads: Heads
) -> dict[str, Float[Array, "B T Hq _"]]:
    """The queries by the names that kernels know them by: `packed_q` is for packed keys of another order."""
    if layer.channels is None:
        return {"q": q}
    boosted = layer.config.boosted_of(q.shape[-1])
    return {"q": q, "packed_q": queries_of_packed(q, heads.of_stored(layer.channels), boosted)}


def stored(layer: QuantizedLayer) -> dict[str, Array]:
    """The layer's arrays by the names that kernels know them by."""
    head_dim = layer.window_k.shape[-1]

    def unfold(codes: Array) -> Array:
        """The same memory, one word row a row."""
        return codes.reshape(*codes.shape[:2], -1, head_dim)

    stored = {
        "k_codes": unfold(layer.k_codes),
        "k_scale": layer.k_scale,
        "k_zero": layer.k_zero,
        "v_codes": unfold(layer.v_codes),
        "v_scale": layer.v_scale,
        "v_zero": layer.v_zero,
        "window_k": layer.window_k,
        "window_v": layer.window_v,
    }
    if layer.k_low is not None:
        stored["k_low"] = layer.k_low
    if layer.sinks is not None:
        stored |= dict(zip(("sink_k", "sink_v"), layer.sinks, strict=True))
    return stored
