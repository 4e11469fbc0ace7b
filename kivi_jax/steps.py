"""Prefill, chunks and single tokens: the pure functions of a model and its KV state that every loop is made of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.arguments import read_size
from kivi_jax.attend import attend_chunk, attend_prompts, attend_prompts_for_each, attend_token
from kivi_jax.kv.buffers import once_computed
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.kv.state import KVState, advance, empty_state
from kivi_jax.model import Params, jit_of_params
from kivi_jax.models.layers import Attend
from kivi_jax.partition import Partition, empty_state_on_mesh

# Prompt tokens that run at a time, in whole rows: enough to keep any accelerator's multipliers busy for the weights
# that each pass reads, few enough that activations are small beside weights and state.
PREFILL_TOKENS = 4096
# And of chunks, whose first tokens attend what is stored: a group's rows are taken out of the state, and put back.
CHUNK_TOKENS = 8192


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


@functools.partial(jit_of_params, donate_argnames="states")
def prefill_each(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], states: tuple[KVState, ...]
) -> tuple[Float[Array, "B vocab"], tuple[KVState, ...]]:
    """`prefill` of several states, which are donated, by one pass of the model: prompts attend themselves, whatever
    stores them.

    Raises:
        ValueError: the shapes of `tokens`, `lengths` and a state don't fit together.
    """
    for state in states:
        _check_chunk(tokens, lengths, state)
    partition = params.partition(lengths.size)
    layers = tuple(zip(*(state.layers for state in states), strict=True))
    logits, layers = _fill_rows(
        params, partition, tokens, lengths, layers, attend_and_store=attend_prompts_for_each
    )
    lengths = lengths.astype(jnp.int32)
    return logits, tuple(
        dataclasses.replace(state, lengths=lengths, layers=filled)
        for state, filled in zip(states, zip(*layers, strict=True), strict=True)
    )


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
    rows: Int[Array, " N"],
    prefill_chunk: int | None = None,
) -> tuple[Float[Array, "N vocab"], KVState]:
    """`prefill` of some rows of a state; the others stay as they are.

    So prompts of different lengths need not be padded to the longest.

    Args:
        params: the model.
        tokens: prompts, right-padded with any token.
        lengths: the real tokens of each, 1 to T.
        state: a state of more rows with a capacity of at least T; it is donated.
        rows: where each prompt goes, as in `_fill_rows`.
        prefill_chunk: most tokens of a prompt to run at a time.

    Returns:
        The float32 logits of each prompt's last token, and the state.
    """
    if prefill_chunk is None or tokens.shape[1] <= prefill_chunk:
        return put_prompts(params, tokens, lengths, state, rows)
    # Chunks are appended to all rows of a state.
    batch = lengths.size
    own_partition = params.partition(batch)
    own = new_state(params, own_partition, batch, state.capacity, state.config)
    logits, own = prefill_in_chunks(params, own_partition, tokens, lengths, own, prefill_chunk)
    return logits, params.partition(state.lengths.size).update(KVState.put_rows, state, own, rows)


def put_prompts(
    params: Params,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    state: KVState,
    rows: Int[Array, " N"],
    at_once: int = PREFILL_TOKENS,
) -> tuple[Float[Array, "N vocab"], KVState]:
    """`insert_prompts` of whole prompts, within a compiled function; `at_once` as in `_fill_rows`."""
    partition = params.partition(state.lengths.size)
    logits, layers = _fill_rows(params, partition, tokens, lengths, state.layers, rows, at_once)
    filled = dataclasses.replace(state, layers=layers)
    return logits, partition.update(KVState.with_lengths, filled, rows, lengths.astype(jnp.int32))


def extend_rows(
    params: Params,
    tokens: Int[Array, "D T"],
    lengths: Int[Array, " D"],
    state: KVState,
    rows: Int[Array, " D"],
) -> tuple[Float[Array, "D vocab"], KVState]:
    """`extend` of some rows, equally many of each device that the batch is split over; negative `rows` are none.

    `rows` are counted from their device's first one. Of all rows `extend` would attend and rewrite each.
    """
    partition = params.partition(state.lengths.size)
    own = partition.update(KVState.take_rows, state, rows)
    logits, own = _extend(params, params.partition(rows.size), tokens, lengths, own)
    return logits, partition.update(KVState.put_rows, state, own, rows)


def prefill_in_chunks(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
    prefill_chunk: int | None,
) -> tuple[Float[Array, "B vocab"], KVState]:
    """`prefill` of at most `prefill_chunk` tokens a row at a time, as many times as the longest row needs.

    And of at most `CHUNK_TOKENS` of each device's rows, but at least one row.
    """
    if prefill_chunk is None or tokens.shape[1] <= prefill_chunk:
        return _prefill(params, partition, tokens, lengths, state)
    size = prefill_chunk
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))

    def step(i: Array, carry: tuple[Array, KVState]) -> tuple[Array, KVState]:
        logits, state = carry
        counts = jnp.clip(lengths - i * size, 0, size)
        chunk = jax.lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
        newer, state = _extend_in_groups(params, partition, chunk, counts, state)
        return jnp.where(counts[:, None] > 0, newer, logits), state

    first = _prefill(params, partition, tokens[:, :size], jnp.minimum(lengths, size), state)
    return jax.lax.fori_loop(1, -(-lengths.max() // size), step, first)


def _extend_in_groups(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
) -> tuple[Float[Array, "B vocab"], KVState]:
    """`_extend` of as many rows at a time as have `CHUNK_TOKENS` on each device."""
    devices, count = partition.row_devices, lengths.size // partition.row_devices
    most = max(CHUNK_TOKENS // tokens.shape[1], 1)
    size = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    if size == count:
        return _extend(params, partition, tokens, lengths, state)

    def extend_group(i: Array, carry: tuple[Array, KVState]) -> tuple[Array, KVState]:
        logits, state = carry
        rows = i * size + jnp.arange(size, dtype=jnp.int32)
        of_group, counts = partition.place(
            tuple(x.reshape(devices, count, -1)[:, rows].reshape(-1, *x.shape[1:]) for x in (tokens, lengths))
        )
        new, state = extend_rows(params, of_group, counts, state, jnp.tile(rows, devices))
        return logits.at[:, rows].set(new.reshape(devices, size, -1)), state

    logits = jnp.zeros((devices, count, params.config.vocab_size), jnp.float32)
    logits, state = jax.lax.fori_loop(0, count // size, extend_group, (logits, state))
    return logits.reshape(lengths.size, -1), state


def _prefill(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
) -> tuple[Float[Array, "B vocab"], KVState]:
    logits, layers = _fill_rows(params, partition, tokens, lengths, state.layers)
    return logits, dataclasses.replace(state, lengths=lengths.astype(jnp.int32), layers=layers)


def _fill_rows(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    layers: tuple[Any, ...],
    rows: Int[Array, " N"] | None = None,
    at_once: int = PREFILL_TOKENS,
    attend_and_store: Callable[..., tuple[Array, Any]] = attend_prompts,
) -> tuple[Float[Array, "N vocab"], tuple[Any, ...]]:
    """Logits of each prompt's last token, and the layers with the prompts in their `rows`.

    Args:
        params: the model.
        partition: of the layers' rows; each device has N / `partition.row_devices` of the prompts.
        tokens: prompts, right-padded with any token.
        lengths: the real tokens of each, 1 to T.
        layers: of the state.
        rows: where each prompt goes, counted from its device's first row; None for the first ones in their order. Those
            of negative rows, which are the last of their device, are left out.
        at_once: tokens of each device that run at a time, in whole rows.
        attend_and_store: what prompts attend themselves by, and are stored by in each of `layers`.
    """
    devices, count = partition.row_devices, lengths.size // partition.row_devices
    groups = -(-count // max(at_once // tokens.shape[1], 1))
    size = -(-count // groups)
    if rows is None and groups > 1:
        rows = jnp.arange(lengths.size, dtype=jnp.int32) % count
    tokens, *per_row = partition.place((tokens, lengths) if rows is None else (tokens, lengths, rows))

    def fill_group(i: Array, carry: tuple[Array, tuple[Any, ...]]) -> tuple[Array, tuple[Any, ...]]:
        """Fills group i: equally many rows of each device that the batch is split over."""
        logits, layers = carry
        start = jnp.minimum(i * size, count - size)  # the last group starts early
        group_tokens, *group = partition.place(
            tuple(
                jax.lax.dynamic_slice_in_dim(x.reshape(devices, count, -1), start, size, axis=1).reshape(
                    devices * size, *x.shape[1:]
                )
                for x in (tokens, *per_row)
            )
        )
        attend = functools.partial(partition.attend, attend_and_store, tuple(group))
        zeros = jnp.zeros_like(group[0])
        new, layers = _run_chunk(params, group_tokens, zeros, group[0], layers, attend)
        new = new.reshape(devices, size, -1)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=1), layers

    logits = jnp.zeros((devices, count, params.config.vocab_size), jnp.float32)
    used: int | Array = groups
    if rows is not None:
        used = -(-jnp.sum(rows.reshape(devices, count) >= 0, axis=1).max() // size)
    logits, layers = jax.lax.fori_loop(0, used, fill_group, (logits, layers))
    return logits.reshape(lengths.size, -1), layers


def _extend(
    params: Params,
    partition: Partition,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
) -> tuple[Float[Array, "B vocab"], KVState]:
    tokens, lengths = partition.place((tokens, lengths))
    attend = functools.partial(
        partition.attend,
        functools.partial(attend_chunk, params.decode_attention),
        (state.lengths, lengths),
    )
    logits, layers = _run_chunk(params, tokens, state.lengths, lengths, state.layers, attend)
    counts = jnp.where(once_computed(lengths > 0, logits), lengths, 0)
    return logits, dataclasses.replace(state, lengths=state.lengths + counts, layers=layers)


def _run_chunk(
    params: Params,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    layers: tuple[Any, ...],
    attend: Attend,
) -> tuple[Float[Array, "B vocab"], tuple[Any, ...]]:
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
