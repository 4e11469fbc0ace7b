"""Prefill, one decode step, and the compiled loop that generates until every row has ended."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Num

from kivi_jax.arguments import read_size
from kivi_jax.attention import chunk_attention, decode_attention, prefill_attention
from kivi_jax.kv.buffers import finite
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.kv.state import KVState, Layer, advance, empty_state
from kivi_jax.models.layers import Attend
from kivi_jax.models.registry import Params
from kivi_jax.partition import Heads, Partition, empty_state_on_mesh
from kivi_jax.promotion import with_usual_promotion
from kivi_jax.sampling import Sampler

# Prompt tokens that `prefill` runs at a time, in whole rows: enough to keep any accelerator's multipliers busy for the
# weights that each pass reads, few enough that activations are small beside weights and state.
PREFILL_TOKENS = 4096
# In place of the token of a row whose activations overflowed.
NO_TOKEN = -1


def init_state(params: Params, batch: int, capacity: int, kv: str | KVConfig = "kivi2") -> KVState:
    """An empty KV state for `batch` rows of up to `capacity` tokens, on the mesh of `params` if there is one.

    Raises:
        ValueError: `kv` is unknown or does not fit the model, or `batch` or `capacity` is no positive whole number.
    """
    batch, capacity = read_size("batch", batch), read_size("capacity", capacity)
    model = params.config
    config = resolve_kv(kv, model.head_dim, model.num_layers)
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
    if params.mesh is None:
        return empty_state(*shape)
    return empty_state_on_mesh(Partition.of(model, params.mesh, batch), *shape)


@jax.jit
@with_usual_promotion
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
    logits, layers = _fill_rows(params, tokens, lengths, state.layers, jnp.int32(0))
    return logits, dataclasses.replace(state, lengths=lengths.astype(jnp.int32), layers=layers)


@functools.partial(jax.jit, static_argnames="prefill_chunk", donate_argnames="state")
@with_usual_promotion
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
    if prefill_chunk is None or tokens.shape[1] <= prefill_chunk:
        logits, layers = _fill_rows(params, tokens, lengths, state.layers, first_row)
    else:  # which goes over all rows of a state
        own = init_state(params, lengths.size, state.capacity, state.config)
        logits, own = _prefill_in_chunks(params, tokens, lengths, own, prefill_chunk)
        layers = jax.tree.map(
            lambda all_rows, rows: jax.lax.dynamic_update_slice_in_dim(all_rows, rows, first_row, axis=0),
            state.layers,
            own.layers,
        )
    all_lengths = jax.lax.dynamic_update_slice(state.lengths, lengths.astype(jnp.int32), (first_row,))
    return logits, dataclasses.replace(state, lengths=all_lengths, layers=layers)


def _fill_rows(
    params: Params,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    layers: tuple[Layer, ...],
    first_row: Int[Array, ""],
) -> tuple[Float[Array, "N vocab"], tuple[Layer, ...]]:
    """Logits of each prompt's last token, and the layers with the prompts in their rows from `first_row` on."""
    partition = Partition.of(params.config, params.mesh, lengths.size)
    tokens, lengths = partition.place((tokens, lengths))
    devices, rows = partition.row_devices, lengths.size // partition.row_devices
    groups = -(-rows // max(PREFILL_TOKENS // tokens.shape[1], 1))
    size = -(-rows // groups)

    def attend_and_store(
        heads: Heads, q: Array, k: Array, v: Array, layer: Layer, lengths: Array, starts: Array
    ) -> tuple[Array, Layer]:
        out = prefill_attention(q, heads.of(k), heads.of(v), layer.sliding_window, heads.alibi_slopes)
        before, layer = layer, layer.store_prompt(finite(k), finite(v), lengths, starts[0])
        # The model goes on once all is stored: XLA would else keep every layer's keys and values until the end.
        stored = jnp.ones_like(lengths, bool)
        for old, array in zip(jax.tree.leaves(before), jax.tree.leaves(layer), strict=True):
            if array is not old:  # what a short prompt leaves as it is may hold anything
                stored = after(
                    stored, jax.lax.dynamic_slice_in_dim(array[:, 0, 0, 0], starts[0], lengths.size)
                )
        return jnp.where(stored[:, None, None, None], out, jnp.nan), layer

    def run(i: Array, carry: tuple[Array, tuple[Layer, ...]]) -> tuple[Array, tuple[Layer, ...]]:
        """Group i: as many rows of each device that the batch is split over."""
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

        def attend(q: Array, k: Array, v: Array, layer: Layer) -> tuple[Array, Layer]:
            starts = jnp.full_like(group_lengths, first_row + start)
            return partition.attend(attend_and_store, q, k, v, layer, group_lengths, starts)

        zeros = jnp.zeros_like(group_lengths)
        new, layers = _run_chunk(params, group_tokens, zeros, group_lengths, layers, attend)
        new = new.reshape(devices, size, -1)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=1), layers

    logits = jnp.zeros((devices, rows, params.config.vocab_size), jnp.float32)
    logits, layers = jax.lax.fori_loop(0, groups, run, (logits, layers))
    return logits.reshape(lengths.size, -1), layers


@jax.jit
@with_usual_promotion
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
    partition = Partition.of(params.config, params.mesh, lengths.size)
    tokens, lengths = partition.place((tokens, lengths))

    def attend_and_store(
        heads: Heads, q: Array, k: Array, v: Array, layer: Layer, stored: Array, lengths: Array
    ) -> tuple[Array, Layer]:
        out = chunk_attention(
            q, heads.of(k), heads.of(v), layer, stored, heads.alibi_slopes, first_kv_head=heads.first_kv_head
        )
        counts = jnp.where(after(lengths > 0, out), lengths, 0)
        return out, layer.append_chunk(finite(k), finite(v), stored, counts)

    def attend(q: Array, k: Array, v: Array, layer: Layer) -> tuple[Array, Layer]:
        return partition.attend(attend_and_store, q, k, v, layer, state.lengths, lengths)

    logits, layers = _run_chunk(params, tokens, state.lengths, lengths, state.layers, attend)
    counts = jnp.where(after(lengths > 0, logits), lengths, 0)
    return logits, dataclasses.replace(state, lengths=state.lengths + counts, layers=layers)


def _check_chunk(tokens: Array, lengths: Array, state: KVState) -> None:
    batch = tokens.shape[:1]
    if tokens.ndim != 2 or lengths.shape != batch or state.lengths.shape != batch:
        raise ValueError(
            f"tokens {tokens.shape}, lengths {lengths.shape} and state.lengths {state.lengths.shape} "
            f"must agree on the batch"
        )
    if tokens.shape[1] > state.capacity:
        raise ValueError(f"{tokens.shape[1]} tokens a row exceed the state's capacity of {state.capacity}")


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


@jax.jit
@with_usual_promotion
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
    partition = Partition.of(params.config, params.mesh, tokens.size)
    tokens, active = partition.place((tokens, active))

    def attend_and_store(
        heads: Heads, q: Array, k: Array, v: Array, layer: Layer, lengths: Array, active: Array
    ) -> tuple[Array, Layer]:
        attended = jnp.where(active, lengths, 0)  # rows that have ended must not cost reads
        out = decode_attention(
            q[:, 0],
            heads.of(k)[:, 0],
            heads.of(v)[:, 0],
            layer,
            attended,
            heads.alibi_slopes,
            params.decode_attention,
            first_kv_head=heads.first_kv_head,
        )
        return out[:, None], layer.append_token(finite(k[:, 0]), finite(v[:, 0]), lengths, after(active, out))

    def attend(q: Array, k: Array, v: Array, layer: Layer) -> tuple[Array, Layer]:
        return partition.attend(attend_and_store, q, k, v, layer, state.lengths, active)

    model = params.model()
    hidden, layers = model(tokens[:, None], state.lengths[:, None], state.layers, attend)
    state = partition.update(advance, dataclasses.replace(state, layers=layers), after(active, hidden))
    return model.logits(hidden[:, 0]), state


def after(mask: Bool[Array, " B"], computed: Num[Array, "B ..."]) -> Bool[Array, " B"]:
    """`mask`, but known only once `computed` is: XLA updates an array in place only after reads that the update
    depends on, and copies it for the others.

    The dependency has to survive simplification, so rows where `computed` is not a number are left out.
    """
    first = computed.reshape(computed.shape[0], -1)[:, 0].astype(jnp.float32)
    return mask & (first == first)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "tokens", "steps", "last", "active", "keys", "logprobs", "seen"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Generation in progress, the carry of the decode loop.

    Attributes:
        state: the KV state, which lacks only the newest token of each row.
        tokens: int32 `[B, N]`, the generated tokens.
        steps: how many columns of `tokens` are written.
        last: int32 `[B]`, the newest token.
        active: bool `[B]`, the rows that have not ended; a row ends by an end token, which stays in `tokens`, or by
            `NO_TOKEN`, where its logits are not all finite numbers.
        keys: one random key a row, so that a row's samples don't depend on its neighbours.
        logprobs: float32 `[B, N]`, the log-probability of each of `tokens`, if asked for.
        seen: bool `[B, vocab]`, the tokens of a row's prompt and completion, if the sampler penalizes repetition.
    """

    state: KVState
    tokens: Any
    steps: Any
    last: Any
    active: Any
    keys: Any
    logprobs: Any = None
    seen: Any = None


@functools.partial(jax.jit, static_argnames=("capacity", "kv", "max_new_tokens", "logprobs", "prefill_chunk"))
@with_usual_promotion
def start_decoding(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    end_tokens: Int[Array, " E"],
    keys: Array,
    sampler: Sampler,
    *,
    active: Bool[Array, " rows"],
    capacity: int,
    kv: KVConfig,
    max_new_tokens: int,
    prompt_rows: Int[Array, " rows"] | None = None,
    logprobs: bool = False,
    prefill_chunk: int | None = None,
) -> Decoding:
    """Prefills a new state and samples the first token of every active row.

    Row i continues prompt i, or prompt `prompt_rows[i]`: several rows can share a prompt that is prefilled once.
    """
    state = init_state(params, tokens.shape[0], capacity, kv)
    logits, state = _prefill_in_chunks(params, tokens, lengths, state, prefill_chunk)
    seen = seen_tokens(params, tokens, lengths, sampler)
    if prompt_rows is not None:
        logits, state, seen = take_rows((logits, state, seen), prompt_rows)
    return begin_decoding(
        params,
        logits,
        state,
        seen,
        end_tokens,
        keys,
        sampler,
        active=active,
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "logprobs"), donate_argnames=("state", "seen"))
@with_usual_promotion
def begin_decoding(
    params: Params,
    logits: Float[Array, "rows vocab"],
    state: KVState,
    seen: Bool[Array, "rows vocab"] | None,
    end_tokens: Int[Array, " E"],
    keys: Array,
    sampler: Sampler,
    *,
    active: Bool[Array, " rows"],
    max_new_tokens: int,
    logprobs: bool = False,
) -> Decoding:
    """Samples the first token of every active row, after prompts that are prefilled; their state is donated."""
    batch = active.shape[0]
    decoding = Decoding(
        state=state,
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        steps=jnp.int32(0),
        last=jnp.zeros(batch, jnp.int32),
        active=active,
        keys=keys,
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32) if logprobs else None,
        seen=seen,
    )
    return _place(params, _take_token(decoding, logits, end_tokens, sampler))


def _place(params: Params, decoding: Decoding) -> Decoding:
    """On a mesh always in the same places, so that the loop is compiled once and its state stays split."""
    return Partition.of(params.config, params.mesh, decoding.active.size).place(decoding)


def _prefill_in_chunks(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: KVState,
    size: int | None,
) -> tuple[Float[Array, "B vocab"], KVState]:
    """`prefill` of at most `size` tokens a row at a time, as many times as the longest row needs."""
    if size is None or tokens.shape[1] <= size:
        return prefill(params, tokens, lengths, state)
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % size)))

    def step(i: Array, carry: tuple[Array, KVState]) -> tuple[Array, KVState]:
        logits, state = carry
        counts = jnp.clip(lengths - i * size, 0, size)
        chunk = jax.lax.dynamic_slice_in_dim(tokens, i * size, size, axis=1)
        newer, state = extend(params, chunk, counts, state)
        return jnp.where(counts[:, None] > 0, newer, logits), state

    first = prefill(params, tokens[:, :size], jnp.minimum(lengths, size), state)
    return jax.lax.fori_loop(1, -(-lengths.max() // size), step, first)


@functools.partial(jax.jit, donate_argnames="decoding")
@with_usual_promotion
def continue_decoding(
    params: Params,
    decoding: Decoding,
    end_tokens: Int[Array, " E"],
    sampler: Sampler,
    until: Int[Array, ""],
) -> Decoding:
    """Generates until `until` tokens a row are there or every row has ended; the state is updated in place."""

    def unfinished(decoding: Decoding) -> Array:
        return (decoding.steps < until) & decoding.active.any()

    def step(decoding: Decoding) -> Decoding:
        logits, state = decode_step(params, decoding.last, decoding.state, decoding.active)
        return _take_token(dataclasses.replace(decoding, state=state), logits, end_tokens, sampler)

    return _place(params, jax.lax.while_loop(unfinished, step, decoding))


def _take_token(
    decoding: Decoding, logits: Float[Array, "B vocab"], end_tokens: Int[Array, " E"], sampler: Sampler
) -> Decoding:
    """Samples the next token of every row and writes it down."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(decoding.keys, decoding.steps)
    failed = ~jnp.isfinite(logits).all(-1)
    token = jnp.where(failed, NO_TOKEN, sampler(logits, keys, decoding.seen))
    ended = failed | (token[:, None] == end_tokens).any(-1)
    column = (jnp.zeros_like(decoding.steps), decoding.steps)
    logprobs, seen = decoding.logprobs, decoding.seen
    if logprobs is not None:
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
        logprobs = jax.lax.dynamic_update_slice(logprobs, taken, column)
    if seen is not None:
        seen = seen | jax.nn.one_hot(token, seen.shape[-1], dtype=bool)
    return dataclasses.replace(
        decoding,
        tokens=jax.lax.dynamic_update_slice(decoding.tokens, token[:, None], column),
        steps=decoding.steps + 1,
        last=jnp.maximum(token, 0),
        active=decoding.active & ~ended,
        logprobs=logprobs,
        seen=seen,
    )


@jax.jit
def take_rows(tree: Any, rows: Int[Array, " rows"]) -> Any:
    """Those rows of every array."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)


@jax.jit
@with_usual_promotion
def seen_tokens(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], sampler: Sampler
) -> Bool[Array, "B vocab"] | None:
    """Which tokens each row's prompt has, if the sampler penalizes repetition; padding doesn't count."""
    if sampler.repetition_penalty is None:
        return None
    vocab_size = params.config.vocab_size
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, vocab_size)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].set(True, mode="drop")
