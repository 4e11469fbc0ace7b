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

from kivi_jax.kv.channels import take_channels
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.chunk_attention import tpu as chunk_attention
from kivi_jax.pallas_kernels.decode_attention.tpu_kernel import scratch_buffers, step
from kivi_jax.pallas_kernels.decode_attention.tpu_plan import MOST_QUERIES, SET, Plan, make_plan
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads
from kivi_jax.pallas_kernels.tpu_layers import Inputs, check_supported, stored, vmem_bytes
from kivi_jax.pallas_kernels.tpu_registers import LANES


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
    """`api.decode_attention` as one kernel; of more than `MOST_QUERIES` queries of a KV head, as that of chunks.

    Args:
        interpret: run anywhere, slowly.

    Raises:
        NotImplementedError: something the kernel does not cover, which the message names.
    """
    check_supported(q, layer)
    if q.shape[2] // (heads.kv_heads or layer.num_kv_heads) > MOST_QUERIES:
        return _attend_many(q, k, v, layer, lengths, heads, interpret)
    q, k, v = q[:, 0], heads.of_new(k)[:, 0], heads.of_new(v)[:, 0]
    batch, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    shared = query_heads // kv_heads
    plan = make_plan(layer, shared, kv_heads, heads.alibi_slopes is not None)
    channels = None if layer.channels is None else heads.of_stored(layer.channels)
    inputs = _inputs(plan, q, k, v, channels, heads.alibi_slopes)
    inputs |= stored(layer, plan.keys, plan.values, plan.block, plan.heads, _place)
    scratch = scratch_buffers(plan)
    names = (*inputs, "out", *scratch)
    work, steps = _list_work(lengths, plan)
    out = pl.pallas_call(
        functools.partial(step, plan=plan, names=names, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, plan.sets * SET, head_dim), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(kv_heads // plan.heads, steps),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=pl.BlockSpec((None, plan.heads, plan.sets * SET, head_dim), _of_row),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        interpret=interpret,
        name="kivi_decode_attention",
    )(
        *work,
        jnp.asarray(heads.first_kv_head, jnp.int32).reshape(1) // plan.heads,
        *(array for array, _ in inputs.values()),
    )
    out = out[:, :, :: SET // plan.set_heads][:, :, :shared].reshape(q.shape)
    # Rows without tokens had no step.
    return jnp.where((lengths > 0)[:, None, None], out, jnp.repeat(v, shared, axis=1))[:, None]


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


def _inputs(
    plan: Plan,
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    channels: Int[Array, "B H D"] | None,
    alibi_slopes: Slopes | None,
) -> Inputs:
    """What comes with the new token, by KV head."""
    kv_heads = k.shape[1]

    def by_kv_head(x: Array) -> Array:  # [B, Hq, ...] -> [B, H, rows, ...]
        x = x.reshape(x.shape[0], kv_heads, plan.shared, -1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.sets * plan.set_heads - plan.shared), (0, 0)))
        x = x.reshape(*x.shape[:2], plan.sets, plan.set_heads, 1, x.shape[3])
        x = jnp.pad(x, ((0, 0),) * 4 + ((0, SET // plan.set_heads - 1), (0, 0)))
        x = x.reshape(*x.shape[:3], 1, SET, x.shape[5])
        return jnp.concatenate([x, x], axis=3).reshape(*x.shape[:2], plan.rows, x.shape[5])

    def with_spec(x: Array) -> tuple[Array, pl.BlockSpec]:
        return x, pl.BlockSpec((None, plan.heads, *x.shape[2:]), _of_row)

    queries = by_kv_head(q)
    inputs = {"new": with_spec(jnp.stack([k, v], axis=2))}
    middle_code: Any = plan.keys.middle_code
    if channels is not None:
        inputs["q"] = with_spec(queries)
        queries = take_channels(queries, channels)
        boosted = jnp.arange(plan.head_dim) < plan.boosted
        middle_code = jnp.where(boosted, plan.keys.boosted_middle_code, middle_code).astype(q.dtype)
    # For products with zeros and scales side by side, whose sum is that with what the middle code decodes to.
    inputs[plan.packed_queries] = with_spec(jnp.concatenate([queries, queries * middle_code], axis=3))
    if alibi_slopes is not None:
        slopes = by_kv_head(jnp.asarray(alibi_slopes, jnp.float32)[None])[0]
        slopes = jnp.broadcast_to(slopes, (*slopes.shape[:2], LANES))
        spec = pl.BlockSpec((plan.heads, plan.rows, LANES), lambda head, *_: (head, 0, 0))
        inputs["slopes"] = slopes, spec
    return inputs


def _of_row(head: Any, step: Any, rows: Any, *_: Any) -> tuple[Any, ...]:
    """Block of an array that has but one a row."""
    return (rows[step], head, 0, 0)


def _place(head: Any, step: Any, rows: Any, blocks: Any, _: Any, first: Any) -> tuple[Any, Any, Any]:
    """Of a grid step, the row, the block of KV heads and the block of packed tokens."""
    return rows[step], first[0] + head, blocks[step]
