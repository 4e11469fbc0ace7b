"""The compiled loop that generates until every row has ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.state import KVState
from kivi_jax.model import Params, jit_of_params
from kivi_jax.sampling import Sampler
from kivi_jax.steps import append_token, new_state, prefill_in_chunks

# In place of the token of a row whose activations overflowed.
NO_TOKEN = -1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "tokens", "steps", "last", "active", "rngs", "logprobs", "seen"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Generation in progress, the carry of the decode loop.

    Attributes:
        state: the KV state, which lacks only the newest token of each row.
        tokens: the generated tokens.
        steps: how many columns of `tokens` are written.
        last: the newest token.
        active: the rows that have not ended; a row ends by an end token, which stays in `tokens`, or by
            `NO_TOKEN`, where its logits are not all finite numbers.
        rngs: one random key a row, so that a row's samples don't depend on its neighbours.
        logprobs: the log-probability of each of `tokens`, if asked for.
        seen: the tokens of a row's prompt and completion, if the sampler penalizes repetition.
    """

    state: KVState
    tokens: Int[Array, "B N"]
    steps: Int[Array, ""]
    last: Int[Array, " B"]
    active: Bool[Array, " B"]
    rngs: Key[Array, " B"]
    logprobs: Float[Array, "B N"] | None = None
    seen: Bool[Array, "B vocab"] | None = None

    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays


@functools.partial(
    jit_of_params, static_argnames=("capacity", "kv", "max_new_tokens", "logprobs", "prefill_chunk")
)
def start_decoding(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    end_tokens: Int[Array, " E"],
    rngs: Array,
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
    batch = tokens.shape[0]
    partition = params.partition(batch)
    state = new_state(params, partition, batch, capacity, kv)
    logits, state = prefill_in_chunks(params, partition, tokens, lengths, state, prefill_chunk)
    seen = seen_tokens(params, tokens, lengths, sampler)
    if prompt_rows is not None:
        logits, state, seen = share_prompts(logits, state, seen, prompt_rows)
    return begin_decoding(
        params,
        logits,
        state,
        seen,
        end_tokens,
        rngs,
        sampler,
        active=active,
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
    )


@functools.partial(
    jit_of_params, static_argnames=("max_new_tokens", "logprobs"), donate_argnames=("state", "seen")
)
def begin_decoding(
    params: Params,
    logits: Float[Array, "rows vocab"],
    state: KVState,
    seen: Bool[Array, "rows vocab"] | None,
    end_tokens: Int[Array, " E"],
    rngs: Array,
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
        rngs=rngs,
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32) if logprobs else None,
        seen=seen,
    )
    return params.partition(batch).place(_take_token(decoding, logits, end_tokens, sampler))


@functools.partial(jit_of_params, donate_argnames="decoding")
def continue_decoding(
    params: Params,
    decoding: Decoding,
    end_tokens: Int[Array, " E"],
    sampler: Sampler,
    until: Int[Array, ""],
) -> Decoding:
    """Generates until `until` tokens a row are there or every row has ended; the state is updated in place."""
    partition = params.partition(decoding.active.size)

    def unfinished(decoding: Decoding) -> Array:
        return (decoding.steps < until) & decoding.active.any()

    def step(decoding: Decoding) -> Decoding:
        logits, state = append_token(params, partition, decoding.last, decoding.state, decoding.active)
        return _take_token(dataclasses.replace(decoding, state=state), logits, end_tokens, sampler)

    return partition.place(jax.lax.while_loop(unfinished, step, decoding))


def _take_token(
    decoding: Decoding, logits: Float[Array, "B vocab"], end_tokens: Int[Array, " E"], sampler: Sampler
) -> Decoding:
    """Samples the next token of every row and writes it down."""
    rngs = jax.vmap(jax.random.fold_in, (0, None))(decoding.rngs, decoding.steps)
    failed = ~jnp.isfinite(logits).all(-1)
    token = jnp.where(failed, NO_TOKEN, sampler(logits, rngs, decoding.seen))
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
def share_prompts(
    logits: Float[Array, "B vocab"],
    state: KVState,
    seen: Bool[Array, "B vocab"] | None,
    prompt_rows: Int[Array, " rows"],
) -> tuple[Float[Array, "rows vocab"], KVState, Bool[Array, "rows vocab"] | None]:
    """What follows prompts, for rows that continue prompt `prompt_rows[i]`."""
    return logits[prompt_rows], state.take_rows(prompt_rows), None if seen is None else seen[prompt_rows]


@jit_of_params
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
