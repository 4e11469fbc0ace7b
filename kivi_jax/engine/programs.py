"""What an engine runs on the device: prompts into free rows of a batch, and windows of decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from kivi_jax.decoding import Decoding, seen_tokens, take_token
from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.state import KVState
from kivi_jax.model import Params, jit_of_params
from kivi_jax.rows import Rows, row_rngs
from kivi_jax.sampling import Sampling
from kivi_jax.steps import extend_rows, new_state, put_prompts

# Prompt tokens of each device that run at a time, in whole rows: enough that an accelerator's multipliers take longer
# than the weights' way from memory, few enough that a single short prompt does not wait for much padding.
PASS_TOKENS = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "begins",
        "sources",
        "origins",
        "seeds",
        "samples",
        "limits",
        "end_tokens",
        "sampling",
        "logprobs",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Newcomers:
    """What the rows that begin are asked for, in arrays of all rows of the batch; the others' values are not used.

    Attributes:
        begins: the rows that begin to generate.
        sources: which of the prompts that just ran each of them continues.
        origins: the row that holds that prompt's keys and values, counted from its device's first; of all other rows
            themselves.
        seeds: of the random numbers, as `split_seed` gives it.
        samples: which of its prompt's samples a row is.
        limits: most tokens to generate.
        end_tokens: tokens that end the row, padded with -1.
        sampling: how its tokens are chosen.
        logprobs: whether their log-probabilities are wanted.
    """

    begins: Bool[Array, " B"]
    sources: Int[Array, " B"]
    origins: Int[Array, " B"]
    seeds: UInt32[Array, "B 2"]
    samples: Int[Array, " B"]
    limits: Int[Array, " B"]
    end_tokens: Int[Array, "B E"]
    sampling: Sampling
    logprobs: Bool[Array, " B"]

    __no_type_check__ = True  # for JAX, whose trees hold shapes and shardings in the places of arrays

    def rows(self) -> Rows:
        rngs = row_rngs(self.seeds, jnp.zeros_like(self.samples), self.samples)
        return Rows(rngs, self.limits, self.end_tokens, self.sampling, self.logprobs)


@functools.partial(jit_of_params, static_argnames=("batch", "capacity", "kv", "columns", "ends"))
def empty_decoding(
    params: Params, *, batch: int, capacity: int, kv: KVConfig, columns: int, ends: int
) -> Decoding:
    """A batch of rows that have ended, for up to `ends` end tokens a row."""
    partition = params.partition(batch)

    def zeros(*shape: int, dtype: type = jnp.int32) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    floats, numbers = zeros(dtype=jnp.float32), zeros()
    rows = Rows(
        row_rngs(zeros(2, dtype=jnp.uint32), numbers, numbers),
        numbers,
        zeros(ends),
        Sampling(floats, numbers, floats, floats, floats + 1),
        zeros(dtype=bool),
    )
    return partition.place(
        Decoding(
            state=new_state(params, partition, batch, capacity, kv),
            rows=rows,
            tokens=zeros(columns),
            counts=numbers,
            last=numbers,
            active=zeros(dtype=bool),
            logprobs=zeros(columns, dtype=jnp.float32),
            seen=zeros(params.config.vocab_size, dtype=bool),
        )
    )


@functools.partial(jit_of_params, donate_argnames="decoding")
def insert_newcomers(
    params: Params,
    decoding: Decoding,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    rows: Int[Array, " N"],
    newcomers: Newcomers,
) -> Decoding:
    """Prefills prompts, or their first pieces, straight into `rows`, and begins those that `newcomers` says.

    Each device that the batch is split over has as many of the prompts; `rows` are counted from its first row, and are
    negative, after the others, where there is no prompt.
    """
    logits, state = put_prompts(params, tokens, lengths, decoding.state, rows, PASS_TOKENS)

    def replace(seen: Array, new: Array, rows: Array) -> Array:
        return seen.at[_places(rows, seen)].set(new, mode="drop")

    partition = params.partition(decoding.active.size)
    seen = partition.update(replace, decoding.seen, seen_tokens(params, tokens, lengths), rows)
    return _begin(params, dataclasses.replace(decoding, state=state, seen=seen), logits, newcomers)


@functools.partial(jit_of_params, donate_argnames="decoding")
def extend_newcomers(
    params: Params,
    decoding: Decoding,
    tokens: Int[Array, "D T"],
    lengths: Int[Array, " D"],
    rows: Int[Array, " D"],
    newcomers: Newcomers,
) -> Decoding:
    """`insert_newcomers` of a further piece of a prompt, whose row holds those before it, of one on each device."""
    logits, state = extend_rows(params, tokens, lengths, decoding.state, rows)

    def add(seen: Array, new: Array, rows: Array) -> Array:
        return seen.at[_places(rows, seen)].max(new, mode="drop")

    partition = params.partition(decoding.active.size)
    seen = partition.update(add, decoding.seen, seen_tokens(params, tokens, lengths), rows)
    return _begin(params, dataclasses.replace(decoding, state=state, seen=seen), logits, newcomers)


def _places(rows: Int[Array, " N"], array: Array) -> Int[Array, " N"]:
    """`rows`, where negative ones are beyond `array`."""
    return jnp.where(rows < 0, array.shape[0], rows)


def _begin(
    params: Params, decoding: Decoding, logits: Float[Array, "N vocab"], newcomers: Newcomers
) -> Decoding:
    """Gives every row that begins its prompt's keys and values, and its first token."""
    partition = params.partition(decoding.active.size)
    newcomers, begins = partition.place((newcomers, newcomers.begins))

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    started = dataclasses.replace(
        decoding,
        state=partition.update(KVState.share_rows, decoding.state, newcomers.origins),
        seen=partition.update(lambda seen, origins: seen[origins], decoding.seen, newcomers.origins),
        rows=jax.tree.map(choose, newcomers.rows(), decoding.rows),
        counts=jnp.where(begins, 0, decoding.counts),
        active=begins,
    )
    taken = take_token(started, partition.place(logits[newcomers.sources]))
    return partition.place(dataclasses.replace(taken, active=choose(taken.active, decoding.active)))


@jit_of_params
def report(params: Params, decoding: Decoding) -> Int[Array, "B columns"]:
    """All that is read of a batch after a window, as one array: counts, active, tokens and the bits of logprobs."""
    columns = (decoding.counts[:, None], decoding.active[:, None].astype(jnp.int32), decoding.tokens)
    assert decoding.logprobs is not None
    logprobs = jax.lax.bitcast_convert_type(decoding.logprobs, jnp.int32)
    packed = jnp.concatenate([*columns, logprobs], axis=1)
    if params.mesh is None:
        return packed
    # Every process reads all of it.
    return jax.lax.with_sharding_constraint(packed, NamedSharding(params.mesh, PartitionSpec()))
