"""Prefill, chunks and single tokens: the pure functions of a model and its KV state that every loop is made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.arguments import read_size
from kivi_jax.attend import attend_chunk, attend_prompts, attend_token
from kivi_jax.kv.buffers import once_computed
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.kv.layer import Layer
from kivi_jax.kv.state import KVState, advance, empty_state
from kivi_jax.model import Params, jit_of_params
from kivi_jax.models.layers import Attend
from kivi_jax.partition import Partition, empty_state_on_mesh

# Prompt tokens that run at a time, in whole rows: enough to keep any accelerator's multipliers busy for the weights
# that each pass reads, few enough that activations are small beside weights and state.
PREFILL_TOKENS = 4096


def init_state(params: Params, batch: int, capacity: int, kv: str | KVConfig = "kivi2") -> KVState:
    """An empty KV state for `batch` rows of up to `capacity` tokens, on the mesh of `params` if there is one.

    Raises:
        ValueError: `kv` is unknown or does not fit the model, or `batch` or `capacity` is no positive whole number.
    """
    batch, capacity = read_size("batch", batch), read_size("capacity", capacity)
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    return new_state(params, params.partition(batch), batch, capacity, config)


def new_state(params: Params, partition: Partition, batch: int, capacity: int, config: KVConfig) -> KVState:
    """`init_state` with sizes and a configuration that are known to fit."""
    model = params.config
    shape = (
        model.num_layers,
        batch,
        model.num_kv_heads,
        capacity,
        model.head_dim,
        config,
        params.dtype,
        model.sliding_windows,
    )
    return empty_state(*shape) if partition.mesh is None else empty_state_on_mesh(partition, *shape)


@jit_of_params
def prefill(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], state: KVState
) -> tuple[Float[Array, "B vocab"], KVState]:
    """Runs prompts and stores their keys and values; whatever `state` held before is gone.

    Args:
        params: the model.
        tokens: prompts, right-padded with any token.
        lengths: the real tokens of each row, 1 to T.
        state: a state for B rows with a capacity of at least T.

    Returns:
        The float32 logits of each row's last real token, and the state.

    Raises:
        ValueError: the shapes of `tokens`, `lengths` and `state` don't fit together.
    """
    _check_chunk(tokens, lengths, state)
    return _prefill(params, params.partition(lengths.size), tokens, lengths, state)


@jit_of_params
def extend(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], state: KVState
) -> tuple[Float[Array, "B vocab"], KVState]:
    """Appends a chunk of tokens to every row: a further turn of a conversation, or the next piece of a long prompt.

    The new tokens attend each other exactly, and what the state stores as it stores it. So after chunks the state is
    what one prefill of all the tokens leaves, but for what attending quantized keys and values changes in later layers.

    Args:
        params: the model.
        tokens: new tokens, right-padded with any token.
        lengths: the real new tokens of each row, 0 to T. A row whose activations are not numbers gets none.
        state: a state for B rows with room for them; in your own `jax.jit`, donate it.

    Returns:
        The float32 logits of each row's last new token, which mean nothing for rows without any, and the state.

    Raises:
        ValueError: the shapes of `tokens`, `lengths` and `state` don't fit together.
    """
    _check_chunk(tokens, lengths, state)
    return _extend(params, params.partition(lengths.size), tokens, lengths, state)


@jit_of_params
def decode_step(
    params: Params,
    tokens: Int[Array, " B"],
    state: KVState,
    active: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B vocab"], KVState]:
    """Appends one token to every row, or to the `active` ones.

    Args:
        params: the model.
        tokens: the new token of each row.
        state: a state for B rows; in your own `jax.jit`, donate it so that it is updated in place.
        active: rows to append to; all by default. A row whose activations are not numbers is not appended to either.

    Returns:
        The float32 logits after the new token, which mean nothing for inactive rows and for rows beyond the state's
        capacity, and the state.

    Raises:
        ValueError: `tokens` or `active` don't have the state's batch.
    """
    shapes = {tokens.shape, state.lengths.shape} | (set() if active is None else {active.shape})
    if len(shapes) > 1:
        raise ValueError(f"tokens, state.lengths and active must be one number a row, got shapes {shapes}")
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    return append_token(params, params.partition(tokens.size), tokens, state, active)


def append_token(
    params: Params,
    partition: Partition,
    tokens: Int[Array, " B"],
    state: KVState,
    active: Bool[Array, " B"],
) -> tuple[Float[Array, "B vocab"], KVState]:
    """`decode_step`, within a compiled function."""
    tokens, active = partition.place((tokens, active))
    attend = functools.partial(
        partition.attend,
        functools.partial(attend_token, params.decode_attention),
        (state.lengths, active),
    )
    model = params.model()
    hidden, layers = model(tokens[:, None], state.lengths[:, None], state.layers, attend)
    stepped = dataclasses.replace(state, layers=layers)
    return model.logits(hidden[:, 0]), partition.update(advance, stepped, once_computed(active, hidden))


@functools.partial(jit_of_params, static_argnames="prefill_chunk", donate_argnames="state")
def insert_prompts(
    params: Params,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    state: KVState,
    first_row: Int[Array, ""],
    prefill_chunk: int | None = None,
) -> tuple[Float[Array, "N vocab"], KVState]:
    """`prefill` of some rows of a state, from `first_row` on; the others stay as they are.

    So prompts of different lengths need not be padded to the longest. Not for a mesh that splits rows over devices.

    Args:
        params: the model.
        tokens: prompts, right-padded with any token.
        lengths: the real tokens of each, 1 to T.
        state: a state of more rows with a capacity of at least T; it is donated.
        first_row: where the first prompt goes.
        prefill_chunk: most tokens of a prompt to run at a time.

    Returns:
        The float32 logits of each prompt's last token, and the state.
    """
    partition = params.partition(lengths.size)
    if prefill_chunk is None or tokens.shape[1] <= prefill_chunk:
        logits, layers = _fill_rows(params, partition, tokens, lengths, state.layers, first_row)
    else:  # which goes over all rows of a state
        own = new_state(params, partition, lengths.size, state.capacity, state.config)
        logits, own = prefill_in_chunks(params, partition, tokens, lengths, own, prefill_chunk)
        layers = tuple(
            layer.put_rows(rows, first_row) for layer, rows in zip(state.layers, own.layers, strict=True)
        )
    all_lengths = jax.lax.dynamic_update_slice(state.lengths, lengths.astype(jnp.int32), (first_row,))
    return logits, dataclasses.replace(state, lengths=all_lengths, layers=layers)


def prefill_in_chunks(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
    prefill_chunk: int | None,
) -> tuple[Float[Array, "B vocab"], KVState]:
    """`prefill` of at most `prefill_chunk` tokens a row at a time, as many times as the longest row needs."""
    if prefill_chunk is None or tokens.shape[1] <= prefill_chunk:
        return _prefill(params, partition, tokens, lengths, state)
    size = prefill_chunk
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))

    def step(i: Array, carry: tuple[Array, KVState]) -> tuple[Array, KVState]:
        logits, state = carry
        counts = jnp.clip(lengths - i * size, 0, size)
        chunk = jax.lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
        newer, state = _extend(params, partition, chunk, counts, state)
        return jnp.where(counts[:, None] > 0, newer, logits), state

    first = _prefill(params, partition, tokens[:, :size], jnp.minimum(lengths, size), state)
    return jax.lax.fori_loop(1, -(-lengths.max() // size), step, first)


def _prefill(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
) -> tuple[Float[Array, "B vocab"], KVState]:
    logits, layers = _fill_rows(params, partition, tokens, lengths, state.layers, jnp.int32(0))
    return logits, dataclasses.replace(state, lengths=lengths.astype(jnp.int32), layers=layers)


def _fill_rows(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    layers: tuple[Layer, ...],
    first_row: Int[Array, ""],
) -> tuple[Float[Array, "N vocab"], tuple[Layer, ...]]:
    """Logits of each prompt's last token, and the layers with the prompts in their rows from `first_row` on."""
    tokens, lengths = partition.place((tokens, lengths))
    devices, rows = partition.row_devices, lengths.size // partition.row_devices
    groups = -(-rows // max(PREFILL_TOKENS // tokens.shape[1], 1))
    size = -(-rows // groups)

    def fill_group(i: Array, carry: tuple[Array, tuple[Layer, ...]]) -> tuple[Array, tuple[Layer, ...]]:
        """Fills group i: equally many rows of each device that the batch is split over."""
        logits, layers = carry
        start = jnp.minimum(i * size, rows - size)  # the last group starts early
        group_tokens, group_lengths = partition.place(
            tuple(
                jax.lax.dynamic_slice_in_dim(x.reshape(devices, rows, -1), start, size, axis=1).reshape(
                    devices * size, *x.shape[1:]
                )
                for x in (tokens, lengths)
            )
        )
        first_rows = jnp.full_like(group_lengths, first_row + start)
        attend = functools.partial(partition.attend, attend_prompts, (group_lengths, first_rows))
        zeros = jnp.zeros_like(group_lengths)
        new, layers = _run_chunk(params, group_tokens, zeros, group_lengths, layers, attend)
        new = new.reshape(devices, size, -1)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=1), layers

    logits = jnp.zeros((devices, rows, params.config.vocab_size), jnp.float32)
    logits, layers = jax.lax.fori_loop(0, groups, fill_group, (logits, layers))
    return logits.reshape(lengths.size, -1), layers


def _extend(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
) -> tuple[Float[Array, "B vocab"], KVState]:
    tokens, lengths = partition.place((tokens, lengths))
    attend = functools.partial(partition.attend, attend_chunk, (state.lengths, lengths))
    logits, layers = _run_chunk(params, tokens, state.lengths, lengths, state.layers, attend)
    counts = jnp.where(once_computed(lengths > 0, logits), lengths, 0)
    return logits, dataclasses.replace(state, lengths=state.lengths + counts, layers=layers)


def _run_chunk(
    params: Params,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    layers: tuple[Layer, ...],
    attend: Attend,
) -> tuple[Float[Array, "B vocab"], tuple[Layer, ...]]:
    """Logits of each row's last real token, and the layers as `attend` left them."""
    last = jnp.maximum(counts - 1, 0)[:, None]
    # Padding repeats the last position, so that the largest one tells a row's length (dynamic RoPE depends on it).
    positions = starts[:, None] + jnp.minimum(jnp.arange(tokens.shape[1]), last)
    model = params.model()
    hidden, layers = model(tokens, positions, layers, attend)
    return model.logits(jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]), layers


def _check_chunk(tokens: Array, lengths: Array, state: KVState) -> None:
    batch = tokens.shape[:1]
    if tokens.ndim != 2 or lengths.shape != batch or state.lengths.shape != batch:
        raise ValueError(
            f"tokens {tokens.shape}, lengths {lengths.shape} and state.lengths {state.lengths.shape} "
            f"must agree on the batch"
        )
    if tokens.shape[1] > state.capacity:
        raise ValueError(f"{tokens.shape[1]} tokens a row exceed the state's capacity of {state.capacity}")
