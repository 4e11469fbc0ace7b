"""The compiled loop that generates until every row has ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.buffers import scatter
from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.rings import slot_of
from kivi_jax.kv.state import KVState
from kivi_jax.model import Params, jit_of_params
from kivi_jax.rows import Rows
from kivi_jax.sampling import likeliest
from kivi_jax.steps import append_token, new_state, prefill_in_chunks

# In place of the token of a row whose activations overflowed.
NO_TOKEN = -1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "rows", "tokens", "counts", "last", "active", "logprobs", "seen"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Generation in progress, the carry of the decode loop. Rows need not have begun together.

    Attributes:
        state: the KV state, which lacks only the newest token of each row.
        rows: what each row is asked for.
        tokens: a ring of the newest generated tokens of each row, token i in column i % N: all of them where no row is
            asked for more than N.
        counts: how many tokens each row has generated.
        last: the newest token.
        active: the rows that have not ended; a row ends at its limit, by one of its end tokens, which stays in
            `tokens`, or by `NO_TOKEN`, where its logits are not all finite numbers.
        logprobs: the log-probability of each of `tokens`, if asked for.
        seen: the tokens of a row's prompt and completion, if any row's repetition may be penalized.
    """

    state: KVState
    rows: Rows
    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]
    last: Int[Array, " B"]
    active: Bool[Array, " B"]
    logprobs: Float[Array, "B N"] | None = None
    seen: Bool[Array, "B vocab"] | None = None

    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays


@functools.partial(
    jit_of_params,
    static_argnames=("capacity", "kv", "max_new_tokens", "logprobs", "penalized", "prefill_chunk"),
)
def start_decoding(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rows: Rows,
    *,
    capacity: int,
    kv: KVConfig,
    max_new_tokens: int,
    prompt_rows: Int[Array, " rows"] | None = None,
    logprobs: bool = False,
    penalized: bool = False,
    prefill_chunk: int | None = None,
) -> Decoding:
    """Prefills a new state and chooses the first token of every row that may have one.

    Row i continues prompt i, or prompt `prompt_rows[i]`: several rows can share a prompt that is prefilled once.
    """
    batch = tokens.shape[0]
    partition = params.partition(batch)
    state = new_state(params, partition, batch, capacity, kv)
    logits, state = prefill_in_chunks(params, partition, tokens, lengths, state, prefill_chunk)
    seen = seen_tokens(params, tokens, lengths) if penalized else None
    if prompt_rows is not None:
        logits, state, seen = share_prompts(logits, state, seen, prompt_rows)
    return begin_decoding(params, logits, state, seen, rows, max_new_tokens=max_new_tokens, logprobs=logprobs)


@functools.partial(
    jit_of_params, static_argnames=("max_new_tokens", "logprobs"), donate_argnames=("state", "seen")
)
def begin_decoding(
    params: Params,
    logits: Float[Array, "B vocab"],
    state: KVState,
    seen: Bool[Array, "B vocab"] | None,
    rows: Rows,
    *,
    max_new_tokens: int,
    logprobs: bool = False,
) -> Decoding:
    """Chooses the first token of every row that may have one, after prompts that are prefilled; their state is donated.

    No row may be asked for more than `max_new_tokens`.
    """
    batch = rows.limits.size
    decoding = Decoding(
        state=state,
        rows=rows,
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        last=jnp.zeros(batch, jnp.int32),
        active=rows.limits > 0,
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32) if logprobs else None,
        seen=seen,
    )
    return params.partition(batch).place(take_token(decoding, logits))


@functools.partial(jit_of_params, donate_argnames="decoding")
def continue_decoding(
    params: Params,
    decoding: Decoding,
    steps: Int[Array, ""],
    wanted: Bool[Array, " B"] | None = None,
    enough: Int[Array, ""] | None = None,
) -> Decoding:
    """Generates up to `steps` more tokens a row, until every row has ended; the state is updated in place.

    Args:
        params: the model.
        decoding: what was generated so far; it is donated.
        steps: most tokens to generate for a row.
        wanted: the rows that may go on; the others end here. None for all.
        enough: it returns once so many of `wanted` have ended, though not before a step; None once all have.
    """
    partition = params.partition(decoding.active.size)
    if wanted is not None:
        decoding = dataclasses.replace(decoding, active=decoding.active & wanted)
    # Of the wanted, some may have ended with their first token.
    begun = decoding.active.sum() if wanted is None else wanted.sum()

    def unfinished(carry: tuple[Array, Decoding]) -> Array:
        step, decoding = carry
        left = decoding.active.sum()
        going_on = (step < steps) & (left > 0)
        return going_on if enough is None else going_on & ((step == 0) | (begun - left < enough))

    def take_step(carry: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
        step, decoding = carry
        logits, state = append_token(params, partition, decoding.last, decoding.state, decoding.active)
        return step + 1, take_token(dataclasses.replace(decoding, state=state), logits)

    _, decoding = jax.lax.while_loop(unfinished, take_step, (jnp.zeros_like(steps), decoding))
    return partition.place(decoding)


def take_token(decoding: Decoding, logits: Float[Array, "B vocab"]) -> Decoding:
    """Chooses the next token of every active row and writes it down."""
    rows, counts, active = decoding.rows, decoding.counts, decoding.active
    failed = ~jnp.isfinite(logits).all(-1)
    if rows.sampling is None:
        chosen = likeliest(logits)
    else:
        rngs = jax.vmap(jax.random.fold_in)(rows.rngs, counts)
        chosen = rows.sampling(logits, rngs, decoding.seen)
    token = jnp.where(failed, NO_TOKEN, chosen)
    ended = failed | (token[:, None] == rows.end_tokens).any(-1) | (counts + 1 >= rows.limits)
    row, columns = jnp.arange(counts.size), decoding.tokens.shape[1]
    # Rows that have ended are left out.
    place = (row, jnp.where(active, slot_of(counts, columns), columns))
    logprobs, seen = decoding.logprobs, decoding.seen
    if logprobs is not None:
        taken = jax.lax.cond(
            rows.logprobs.any(),
            lambda: jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0],
            lambda: jnp.zeros(token.shape, jnp.float32),
        )
        logprobs = scatter(logprobs, place, taken)
    if seen is not None:
        seen = scatter(seen, (row, jnp.where(active & ~failed, token, seen.shape[1])), jnp.array(True))
    return dataclasses.replace(
        decoding,
        tokens=scatter(decoding.tokens, place, token),
        counts=counts + active,
        last=jnp.where(active, jnp.maximum(token, 0), decoding.last),
        active=active & ~ended,
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
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Bool[Array, "B vocab"]:
    """Which tokens each row's prompt has; padding doesn't count."""
    vocab_size = params.config.vocab_size
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, vocab_size)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].set(True, mode="drop")
