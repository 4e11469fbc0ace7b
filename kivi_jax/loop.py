"""The loop that generates: what runs on the device, and between its pieces what is read from it."""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kivi_jax.batching import PromptBatch, bucket, pad_end_tokens
from kivi_jax.completions import Completion, CompletionReader
from kivi_jax.decoding import (
    Decoding,
    begin_decoding,
    continue_decoding,
    seen_tokens,
    share_prompts,
    start_decoding,
)
from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.state import KVState
from kivi_jax.model import Params, jit_of_params
from kivi_jax.request import GenerationSettings
from kivi_jax.sampling import Sampler, make_sampler
from kivi_jax.steps import init_state, insert_prompts

PIECE_SECONDS = 0.25  # of decoding, between which Ctrl-C is heard


def run(
    params: Params,
    batch: PromptBatch,
    readers: list[CompletionReader],
    kv: KVConfig,
    settings: GenerationSettings,
    prefill_chunk: int | None,
    every: int | None,
) -> Iterator[list[Completion]]:
    """Generates, and yields the completions so far, of the rows that have a reader, after every `every` tokens."""
    sampler = make_sampler(settings)
    end_tokens = jnp.asarray(pad_end_tokens(readers[0].end_tokens), jnp.int32)
    decoding = _start(params, batch, end_tokens, sampler, len(readers), kv, settings, prefill_chunk)
    completions = [Completion(None, [], None)] * len(readers)
    while True:
        steps = int(decoding.steps)
        written = np.asarray(decoding.tokens)[:, :steps].tolist()
        logprobs = None if decoding.logprobs is None else np.asarray(decoding.logprobs)[:, :steps].tolist()
        # A finished row's columns go on being filled, with anything.
        completions = [
            done if done.finish_reason else reader.read(written[row], logprobs and logprobs[row])
            for row, done, reader in zip(batch.rows, completions, readers, strict=True)
        ]
        running = [completion.finish_reason is None for completion in completions]
        if not any(running):
            yield completions
            return
        if every is not None and steps > 1:
            yield completions
        running_rows = np.zeros(len(batch.samples), bool)
        running_rows[batch.rows] = running
        decoding = dataclasses.replace(decoding, active=decoding.active & jnp.asarray(running_rows))
        until = settings.max_new_tokens if every is None else min(steps + every, settings.max_new_tokens)
        decoding = _continue(params, decoding, end_tokens, sampler, until)


def _start(
    params: Params,
    batch: PromptBatch,
    end_tokens: Array,
    sampler: Sampler,
    rows: int,
    kv: KVConfig,
    settings: GenerationSettings,
    prefill_chunk: int | None,
) -> Decoding:
    """Prompts prefilled and the first token of `rows` rows sampled; the others only fill up the batch."""
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(random_key(settings.seed), batch.places[batch.prompt_rows])
    rngs = jax.vmap(jax.random.fold_in)(rngs, batch.samples)
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    prompt_rows = None if batch.samples.max() == 0 else jnp.asarray(batch.prompt_rows)
    start = functools.partial(
        start_decoding if len(batch.groups) == 1 else begin_decoding,
        active=jnp.asarray(np.arange(len(batch.samples)) < rows),
        max_new_tokens=bucket(settings.max_new_tokens, least=16),
        logprobs=settings.logprobs,
    )
    if len(batch.groups) == 1:
        return start(
            params,
            tokens,
            lengths,
            end_tokens,
            rngs,
            sampler,
            capacity=batch.capacity,
            kv=kv,
            prefill_chunk=prefill_chunk,
            prompt_rows=prompt_rows,
        )
    logits, state = _prefill_groups(params, batch, kv, prefill_chunk)
    seen = seen_tokens(params, tokens, lengths, sampler)
    if prompt_rows is not None:
        logits, state, seen = share_prompts(logits, state, seen, prompt_rows)
    return start(params, logits, state, seen, end_tokens, rngs, sampler)


def _continue(
    params: Params, decoding: Decoding, end_tokens: Array, sampler: Sampler, until: int
) -> Decoding:
    """`continue_decoding` in pieces that take about `PIECE_SECONDS`: between them Python hears of Ctrl-C."""
    steps, piece = int(decoding.steps), 1
    while steps < until:
        began = time.perf_counter()
        goal = min(steps + piece, until)
        decoding = continue_decoding(params, decoding, end_tokens, sampler, jnp.int32(goal))
        steps = int(decoding.steps)
        if steps < goal:  # all rows have ended
            break
        seconds = max(time.perf_counter() - began, 1e-9)
        piece = max(min(int(piece * PIECE_SECONDS / seconds), 8 * piece), 1)
    return decoding


def _prefill_groups(
    params: Params, batch: PromptBatch, kv: KVConfig, prefill_chunk: int | None
) -> tuple[Array, KVState]:
    """Logits after every prompt, 0 in rows that only fill up the batch, and the state."""
    state = _empty_state(params, len(batch.tokens), batch.capacity, kv)
    logits = []
    first = 0
    for rows, width in batch.groups:
        group = slice(first, first + rows)
        tokens, lengths = jnp.asarray(batch.tokens[group, :width]), jnp.asarray(batch.lengths[group])
        of_group, state = insert_prompts(params, tokens, lengths, state, jnp.int32(first), prefill_chunk)
        logits.append(of_group)
        first += rows
    filling = jnp.zeros((len(batch.tokens) - first, params.config.vocab_size), jnp.float32)
    return jnp.concatenate([*logits, filling]), state


_empty_state = jit_of_params(init_state, static_argnames=("batch", "capacity", "kv"))


def random_key(seed: int) -> Array:
    """`jax.random.key(seed)`, but of all 64 bits: where JAX computes in 32, it takes the lower ones only."""
    upper, lower = divmod(seed, 2**32)
    key = jax.random.key(np.uint32(lower))
    return jax.random.fold_in(key, np.uint32(upper % 2**32)) if upper else key
