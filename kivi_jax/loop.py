"""The loop that generates: what runs on the device, and between its pieces what is read from it."""

import dataclasses
import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool

from kivi_jax.batching import PromptBatch, bucket
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
from kivi_jax.rows import make_rows
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
    decoding = _start(params, batch, readers, kv, settings, prefill_chunk)
    yield from continue_to_end(params, batch, readers, decoding, settings.max_new_tokens, every)


def continue_to_end(
    params: Params,
    batch: PromptBatch,
    readers: list[CompletionReader],
    decoding: Decoding,
    max_new_tokens: int,
    every: int | None = None,
) -> Iterator[list[Completion]]:
    """`run` from the first token of every row on; `decoding` is donated."""
    completions = [Completion(None, [], None)] * len(readers)
    steps = 1
    while True:
        completions = _read(decoding, batch, readers, completions)
        running = [completion.finish_reason is None for completion in completions]
        if not any(running):
            yield completions
            return
        if every is not None and steps > 1:
            yield completions
        running_rows = np.zeros(len(batch.samples), bool)
        running_rows[batch.rows] = running
        more = max_new_tokens - steps if every is None else every
        decoding = _continue(params, decoding, more, running_rows)
        steps += more


def _read(
    decoding: Decoding, batch: PromptBatch, readers: list[CompletionReader], completions: list[Completion]
) -> list[Completion]:
    """The completions after what is generated now; those that have ended stay."""
    counts, tokens = np.asarray(decoding.counts), np.asarray(decoding.tokens)
    logprobs = None if decoding.logprobs is None else np.asarray(decoding.logprobs)

    def read(row: int, reader: CompletionReader) -> Completion:
        count = counts[row]
        return reader.read(
            tokens[row, :count].tolist(), None if logprobs is None else logprobs[row, :count].tolist()
        )

    return [
        done if done.finish_reason else read(row, reader)
        for row, done, reader in zip(batch.rows.tolist(), completions, readers, strict=True)
    ]


def _start(
    params: Params,
    batch: PromptBatch,
    readers: list[CompletionReader],
    kv: KVConfig,
    settings: GenerationSettings,
    prefill_chunk: int | None,
) -> Decoding:
    """Prompts prefilled, and the first token of every row that has a reader."""
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    prompt_rows = None if batch.samples.max() == 0 else jnp.asarray(batch.prompt_rows)
    places = batch.places[batch.prompt_rows]
    rows = make_rows(settings, readers[0].end_tokens, places, batch.samples, len(readers))
    columns = bucket(settings.max_new_tokens, least=16)
    penalized = settings.repetition_penalty != 1
    if settings.temperature == 0 and not penalized:
        rows = dataclasses.replace(rows, sampling=None)
    if len(batch.groups) == 1:
        return start_decoding(
            params,
            tokens,
            lengths,
            rows,
            capacity=batch.capacity,
            kv=kv,
            max_new_tokens=columns,
            prompt_rows=prompt_rows,
            logprobs=settings.logprobs,
            penalized=penalized,
            prefill_chunk=prefill_chunk,
        )
    logits, state = _prefill_groups(params, batch, kv, prefill_chunk)
    seen = seen_tokens(params, tokens, lengths) if penalized else None
    if prompt_rows is not None:
        logits, state, seen = share_prompts(logits, state, seen, prompt_rows)
    return begin_decoding(
        params, logits, state, seen, rows, max_new_tokens=columns, logprobs=settings.logprobs
    )


def _continue(params: Params, decoding: Decoding, steps: int, wanted: Bool[np.ndarray, " B"]) -> Decoding:
    """`continue_decoding` in pieces that take about `PIECE_SECONDS`: between them Python hears of Ctrl-C."""
    piece = 1
    while steps > 0:
        began = time.perf_counter()
        piece = min(piece, steps)
        decoding = continue_decoding(params, decoding, jnp.int32(piece), jnp.asarray(wanted))
        if not np.asarray(decoding.active).any():
            break
        steps -= piece
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
        places = first + jnp.arange(rows, dtype=jnp.int32)
        of_group, state = insert_prompts(params, tokens, lengths, state, places, prefill_chunk)
        logits.append(of_group)
        first += rows
    filling = jnp.zeros((len(batch.tokens) - first, params.config.vocab_size), jnp.float32)
    return jnp.concatenate([*logits, filling]), state


_empty_state = jit_of_params(init_state, static_argnames=("batch", "capacity", "kv"))
