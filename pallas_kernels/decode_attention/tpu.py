"""Decode attention on a TPU: one Pallas kernel a layer reads packed codes, ring, sinks and the new token.

The grid walks over a list of work made from the rows' lengths: a step is a block of packed tokens of one row, the first
step of a row begins its softmax with the ring and the new token, the last one writes its output. Rows without tokens
have no steps, and blocks past a row's end are never read, so the cost is that of the tokens that are there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.chunk_attention import tpu as chunk_attention
from kivi_jax.pallas_kernels.decode_attention.tpu_kernel import scratch_buffers, step
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import Plan, make_plan
from kivi_jax.pallas_kernels.decode_attention.tpu_tiles import LANES
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads

HEAD_DIMS = (64, 128, 256)
# By head_dim, the most queries of a KV head for which applying scales costs less than decoding what they read: by the
# static schedules for v5e and v6e. At 256 it does for as many as were tried, 16.
FEW_QUERIES = {64: 8, 128: 16}


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
    """`api.decode_attention` as one kernel.

    Args:
        interpret: run anywhere, slowly.

    Raises:
        NotImplementedError: something the kernel does not cover, which the message names.
    """
    check_supported(q, layer)
    if _are_many(q, layer, heads):
        return _attend_many(q, k, v, layer, lengths, heads, interpret)
    q, k, v = q[:, 0], heads.of_new(k)[:, 0], heads.of_new(v)[:, 0]
    batch, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    shared = query_heads // kv_heads
    plan = make_plan(layer, shared, kv_heads, heads.alibi_slopes is not None)
    inputs = _inputs(plan, q, k, v, heads.alibi_slopes) | _stored(plan, layer)
    scratch = scratch_buffers(plan)
    names = (*inputs, "out", *scratch)
    work, steps = _list_work(lengths, plan)
    out = pl.pallas_call(
        functools.partial(step, plan=plan, names=names, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, plan.rows, head_dim), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(kv_heads // plan.heads, steps),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=pl.BlockSpec((None, plan.heads, plan.rows, head_dim), _of_row),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="kivi_decode_attention",
    )(
        *work,
        jnp.asarray(heads.first_kv_head, jnp.int32).reshape(1) // plan.heads,
        *(array for array, _ in inputs.values()),
    )
    out = out[:, :, :shared].reshape(q.shape)
    # Rows without tokens had no step.
    return jnp.where((lengths > 0)[:, None, None], out, jnp.repeat(v, shared, axis=1))[:, None]


def check_supported(q: Float[Array, "B 1 Hq D"], layer: QuantizedLayer) -> None:
    """Raises NotImplementedError with what the kernel does not cover, if there is something."""
    head_dim = q.shape[-1]
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"the TPU kernel takes a head_dim of 64, 128 or 256, not {head_dim}")
    for name, dtype in (("queries", q.dtype), ("a state", layer.window_k.dtype)):
        if dtype != jnp.bfloat16:
            raise NotImplementedError(f"the TPU kernel takes bfloat16, not {name} of {dtype}")


def _are_many(q: Float[Array, "B 1 Hq D"], layer: QuantizedLayer, heads: Heads) -> bool:
    """Whether a KV head has so many queries that it's better to decode what they read, once for all of them."""
    shared, head_dim = q.shape[2] // (heads.kv_heads or layer.num_kv_heads), q.shape[3]
    taken = layer.config.group_size in chunk_attention.GROUP_SIZES
    return taken and head_dim in FEW_QUERIES and shared > FEW_QUERIES[head_dim]


def _attend_many(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B 1 H D"],
    v: Float[Array, "B 1 H D"],
    layer: QuantizedLayer,
    lengths: Int[Array, " B"],
    heads: Heads,
    interpret: bool,
) -> Float[Array, "B 1 Hq D"]:
    """The same as a chunk of one token in each row that has tokens."""
    counts = (lengths > 0).astype(jnp.int32)
    out = chunk_attention.chunk_attention(q, k, v, layer, lengths, counts, heads, interpret=interpret)
    v = heads.of_new(v)
    alone = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.where((lengths > 0)[:, None, None, None], out, alone)


def _list_work(lengths: Int[Array, " B"], plan: Plan) -> tuple[tuple[Array, Array, Array], Array]:
    """The row and the block of every step, lengths, and the number of steps, of which there is at least one."""
    batch = lengths.shape[0]
    most = -(-plan.capacity // plan.block)
    used = jnp.clip(lengths - plan.residual, 0, plan.capacity)
    steps = jnp.where(lengths > 0, jnp.maximum(-(-used // plan.block), 1), 0)
    ends = jnp.cumsum(steps)
    number = jnp.arange(batch * most)
    row = jnp.minimum((number[:, None] >= ends).sum(1), batch - 1)
    block = jnp.clip(number - (ends - steps)[row], 0, most - 1)
    work = (row.astype(jnp.int32), block.astype(jnp.int32), lengths.astype(jnp.int32))
    return work, jnp.maximum(ends[-1], 1).astype(jnp.int32)


Inputs = dict[str, tuple[Array, pl.BlockSpec]]


def _inputs(plan: Plan, q: Array, k: Array, v: Array, alibi_slopes: Slopes | None) -> Inputs:
    """What comes with the new token, by KV head."""
    kv_heads = k.shape[1]

    def by_kv_head(x: Array) -> Array:  # [B, Hq, ...] -> [B, H, rows, ...]
        x = x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, plan.copy_rows - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
        return jnp.concatenate([x] * plan.copies, axis=2)

    def with_spec(x: Array) -> tuple[Array, pl.BlockSpec]:
        return x, pl.BlockSpec((None, plan.heads, *x.shape[2:]), _of_row)

    queries = by_kv_head(q)
    if plan.keys.halves == 2:
        zeros = jnp.zeros_like(queries)
        first = jnp.concatenate([queries, zeros], axis=3)
        queries = jnp.concatenate([first, jnp.concatenate([zeros, queries], axis=3)], axis=2)
    inputs = {"q": with_spec(queries), "new": with_spec(jnp.stack([k, v], axis=2))}
    if alibi_slopes is not None:
        slopes = by_kv_head(jnp.asarray(alibi_slopes, jnp.float32)[None])[0]
        slopes = jnp.broadcast_to(slopes[..., None], (*slopes.shape, LANES))
        spec = pl.BlockSpec((plan.heads, plan.rows, LANES), lambda head, *_: (head, 0, 0))
        inputs["slopes"] = slopes, spec
    return inputs


def _of_row(head: Any, step: Any, rows: Any, *_: Any) -> tuple[Any, ...]:
    """Block of an array that has but one a row."""
    return (rows[step], head, 0, 0)


def _stored(plan: Plan, layer: QuantizedLayer) -> Inputs:
    """The layer's arrays. A grid step gets its own block of packed arrays, and its row's block of the others."""

    def spec(token_axis: int | None, size: int, other: int) -> pl.BlockSpec:
        """The spec of a block with `size` along the axis of tokens (2 or 3) and `other` along the other one."""

        def index(head: Any, step: Any, rows: Any, blocks: Any, _: Any, first: Any) -> tuple[Any, ...]:
            block = blocks[step]
            place = (block, 0) if token_axis == 2 else (0, block) if token_axis == 3 else (0, 0)
            return (rows[step], first[0] + head, *place)

        shape = (other, size) if token_axis == 3 else (size, other)
        return pl.BlockSpec((None, plan.heads, *shape), index)

    keys, values, block = plan.keys, plan.values, plan.block
    key_scales = spec(2, block // keys.group_size, plan.head_dim)

    def ring(window: Array) -> tuple[Array, pl.BlockSpec]:
        if plan.ring_on_lanes:  # which is how it lies in memory, and moves nothing
            return window.swapaxes(2, 3), spec(None, plan.head_dim, plan.residual)
        return window, spec(None, plan.residual, plan.head_dim)

    value_scales = spec(3, block, plan.channel_groups)
    inputs = {
        "k_codes": (layer.k_codes, spec(2, block // keys.tokens * keys.word_rows, keys.lanes)),
        "k_scale": (layer.k_scale, key_scales),
        "k_zero": (layer.k_zero, key_scales),
        "v_codes": (layer.v_codes, spec(2, block // values.tokens * values.word_rows, values.lanes)),
        "v_scale": (layer.v_scale, value_scales),
        "v_zero": (layer.v_zero, value_scales),
        "window_k": ring(layer.window_k),
        "window_v": ring(layer.window_v),
    }
    if layer.sinks is not None:
        for name, sinks in zip(("sink_k", "sink_v"), layer.sinks, strict=True):
            inputs[name] = sinks, spec(None, plan.sinks, plan.head_dim)
    return inputs
