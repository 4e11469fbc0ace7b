"""Attention of chunks on a TPU: one Pallas kernel a layer reads packed codes, ring, sinks and the new tokens.

Queries are rows, all those of a KV head in one block if VMEM holds them, and packed tokens are decoded once for such a
block. The grid walks over a list of work made from the rows' lengths and counts: a step is a block of new tokens, a
block of packed tokens, or both, for a block of queries. Rows without new tokens have no steps, and packed blocks past a
row's end or before the window of all the queries are never read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kivi_jax.kv.channels import take_channels
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.alibi import Slopes
from kivi_jax.pallas_kernels.chunk_attention.tpu_kernel import scratch_buffers, step
from kivi_jax.pallas_kernels.chunk_attention.tpu_plan import Plan, make_plan
from kivi_jax.pallas_kernels.heads import ALL_HEADS, Heads
from kivi_jax.pallas_kernels.tpu_layers import Inputs, check_supported, stored, vmem_bytes
from kivi_jax.pallas_kernels.tpu_registers import LANES, SUBLANES, round_to_bfloat16


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
    k, v = heads.of_new(k), heads.of_new(v)
    (batch, new, query_heads, head_dim), kv_heads = q.shape, k.shape[2]
    plan = make_plan(layer, new, query_heads // kv_heads, heads.alibi_slopes is not None)
    channels = None if layer.channels is None else heads.of_stored(layer.channels)
    inputs = _inputs(plan, q, k, v, channels, heads.alibi_slopes)
    inputs |= stored(layer, plan.keys, plan.values, plan.block, None, _place)
    scratch = scratch_buffers(plan)
    names = (*inputs, "out", *scratch)
    work, steps = _list_work(lengths, counts, plan)
    shape = (batch, kv_heads, plan.query_blocks, plan.rows, head_dim)
    out = pl.pallas_call(
        functools.partial(step, plan=plan, names=names, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work) + 3,
            grid=(kv_heads, steps),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=_of_queries(plan),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        interpret=interpret,
        name="kivi_chunk_attention",
    )(
        *work,
        lengths.astype(jnp.int32),
        counts.astype(jnp.int32),
        jnp.asarray(heads.first_kv_head, jnp.int32).reshape(1),
        *(array for array, _ in inputs.values()),
    )
    return _from_rows(plan, out, new)


class _Work(NamedTuple):
    """What each grid step does, and after the last one entries that are nobody's.

    Attributes:
        row, query: the row, and which of its blocks of queries; -1 after the last step.
        new, packed: blocks of new and of packed tokens; the complement (a negative number) of a block that is not
            attended, and is that of the step before, so that nothing is read.
    """

    row: Int[Array, " steps"]
    query: Int[Array, " steps"]
    new: Int[Array, " steps"]
    packed: Int[Array, " steps"]


def _list_work(lengths: Int[Array, " B"], counts: Int[Array, " B"], plan: Plan) -> tuple[_Work, Array]:
    """The work of every step, and the number of steps, of which there is at least one."""
    batch = lengths.shape[0]
    row, query = jnp.divmod(jnp.arange(batch * plan.query_blocks), plan.query_blocks)
    length, count = lengths[row], counts[row]
    first_new, news = _new_blocks(count, query, plan)
    first_packed, packed = _packed_blocks(length, query, plan)
    steps = jnp.where(query * plan.query_tokens < count, jnp.maximum(news, packed), 0)
    ends = jnp.cumsum(steps)
    number = jnp.arange(row.size * max(plan.new_blocks, plan.blocks) + 1)
    item = jnp.minimum((number[:, None] >= ends).sum(1), row.size - 1)
    turn = jnp.maximum(number - (ends - steps)[item], 0)

    def blocks(first: Array, count: Array, most: int) -> Array:
        block = (first + jnp.clip(turn, 0, jnp.maximum(count - 1, 0))) % most
        return jnp.where(turn < count, block, ~block).astype(jnp.int32)

    total = jnp.maximum(ends[-1], 1).astype(jnp.int32)
    of_steps = number < total
    work = _Work(
        jnp.where(of_steps, row[item], -1).astype(jnp.int32),
        jnp.where(of_steps, query[item], -1).astype(jnp.int32),
        blocks(first_new[item], news[item], plan.new_blocks),
        blocks(first_packed[item], packed[item], plan.blocks),
    )
    return work, total


def _new_blocks(
    count: Int[Array, " items"], query: Int[Array, " items"], plan: Plan
) -> tuple[Int[Array, " items"], Int[Array, " items"]]:
    """The first block of new tokens that a block of queries sees, and how many it sees."""
    start = query * plan.query_tokens
    oldest = 0 if plan.window is None else jnp.maximum(start + 1 - plan.window, 0)
    first = oldest // plan.new_block
    end = -(-jnp.minimum(start + plan.query_tokens, count) // plan.new_block)
    return jnp.broadcast_to(first, end.shape), end - first


def _packed_blocks(
    length: Int[Array, " items"], query: Int[Array, " items"], plan: Plan
) -> tuple[Int[Array, " items"], Int[Array, " items"]]:
    """The same of packed blocks, which with a window are a ring."""
    end = jnp.maximum(length - plan.residual, 0)
    if plan.window is None:
        used = jnp.minimum(end, plan.capacity)
        return jnp.zeros_like(length), -(-used // plan.block)
    oldest = jnp.clip(length + query * plan.query_tokens + 1 - plan.window, 0, None)
    first, last = (token % plan.capacity for token in (oldest, jnp.maximum(end - 1, 0)))
    first_block, last_block = first // plan.block, last // plan.block
    around = jnp.where(last < first, plan.blocks, 0)
    seen = jnp.minimum(last_block - first_block + 1 + around, plan.blocks)
    return first_block, jnp.where(oldest < end, seen, 0)


def _inputs(
    plan: Plan,
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    channels: Int[Array, "B H D"] | None,
    alibi_slopes: Slopes | None,
) -> Inputs:
    """What comes with the new tokens, by KV head."""
    kv_heads, head_dim = k.shape[2:]
    padding = plan.new_blocks * plan.new_block - k.shape[1]

    def of_new(head: Any, step: Any, rows: Any, _: Any, new: Any, *__: Any) -> tuple[Any, ...]:
        return rows[step], head, _block(new, step), 0

    spec = pl.BlockSpec((None, None, plan.new_block, head_dim), of_new)
    k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (k, v))
    queries = _to_rows(plan, q, kv_heads)
    inputs = {"q": (queries, _of_queries(plan)), "new_k": (k, spec), "new_v": (v, spec)}
    if channels is not None:
        ordered = take_channels(queries.reshape(*queries.shape[:2], -1, head_dim), channels)
        inputs[plan.packed_queries] = ordered.reshape(queries.shape), _of_queries(plan)
    if alibi_slopes is not None:
        lanes = -(-plan.shared // LANES) * LANES
        slopes = round_to_bfloat16(jnp.asarray(alibi_slopes, jnp.float32)).reshape(kv_heads, 1, plan.shared)
        slopes = jnp.pad(slopes, ((0, 0), (0, SUBLANES - 1), (0, lanes - plan.shared)), mode="edge")
        inputs["slopes"] = slopes, pl.BlockSpec((None, SUBLANES, lanes), lambda head, *_: (head, 0, 0))
    return inputs


def _to_rows(plan: Plan, q: Float[Array, "B T Hq D"], kv_heads: int) -> Float[Array, "B H blocks rows D"]:
    batch, new, _, head_dim = q.shape
    by_kv_head = q.reshape(batch, new, kv_heads, plan.shared, head_dim).swapaxes(1, 2)
    missing = plan.query_blocks * plan.query_tokens - new
    padded = jnp.pad(by_kv_head, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    rows = padded.reshape(batch, kv_heads, plan.query_blocks, plan.query_tokens * plan.shared, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, plan.rows - rows.shape[3]), (0, 0)))


def _from_rows(plan: Plan, out: Float[Array, "B H blocks rows D"], new: int) -> Float[Array, "B T Hq D"]:
    batch, kv_heads, _, _, head_dim = out.shape
    rows = out[:, :, :, : plan.query_tokens * plan.shared]
    by_kv_head = rows.reshape(batch, kv_heads, -1, plan.shared, head_dim)[:, :, :new]
    return by_kv_head.swapaxes(1, 2).reshape(batch, new, kv_heads * plan.shared, head_dim)


def _of_queries(plan: Plan) -> pl.BlockSpec:
    """Of an array by rows of queries, the step's block."""

    def index(head: Any, step: Any, rows: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return rows[step], head, queries[step], 0, 0

    return pl.BlockSpec((None, None, None, plan.rows, plan.head_dim), index)


def _block(blocks: Any, step: Any) -> Any:
    """The block that a step has in VMEM, whether it is attended or not."""
    block = blocks[step]
    return jnp.maximum(block, ~block)


def _place(head: Any, step: Any, rows: Any, *prefetched: Any) -> tuple[Any, Any, Any]:
    """Of a grid step, the row, the KV head and the block of packed tokens."""
    _, _, packed, _, _, first = prefetched
    return rows[step], first[0] + head, _block(packed, step)
