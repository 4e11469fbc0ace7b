"""Text in, text out."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.models.registry import Params
from kivi_jax.sampling import Sampler, make_sampler
from kivi_jax.text import Completion, CompletionReader, check_stops, encode

# Tokens between looks at the text, while stop strings can end a row or somebody reads along.
STREAM_TOKENS = 8

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


def generate(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
) -> Completion | list[Completion]:
    """Completes one prompt or a batch of them.

    A row's greedy completion does not depend on the other rows, nor do its samples but through its place in the batch;
    in 16 bits up to rounding, which differs with the batch and can turn a near tie.

    Args:
        params: from `load`.
        prompts: a text, a list of texts, or a list of token-id lists (which needs no tokenizer).
        kv: storage of the KV state: "bf16", "kivi4", "kivi-k4v2", "kivi-k2v4", "kivi2" or a `KVConfig`.
        max_new_tokens: most tokens to generate for a prompt.
        temperature: 0 takes the most likely token, more samples.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens that together reach this probability.
        seed: of the samples.
        stop: strings that end a completion, which then ends before them.

    Returns:
        A `Completion` for a `str`, else a list of them in the order of the prompts.

    Raises:
        ValueError: an unknown `kv`, a setting out of range, an empty prompt, a token outside the vocabulary, texts or
            stop strings without a tokenizer, or more tokens than the model has positions.
    """
    *_, completions = stream(
        params,
        prompts,
        kv,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        chunk=STREAM_TOKENS if stop else None,
    )
    return completions[0] if isinstance(prompts, str) else completions


def stream(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    chunk: int | None = STREAM_TOKENS,
) -> Iterator[list[Completion]]:
    """Generates like `generate`, with its arguments, and yields all completions so far after every `chunk` tokens.

    The first yield comes a token later, and with a `chunk` of None only the end result does.

    Raises:
        ValueError: as `generate`, or `chunk` is less than 1; both at once, before anything is generated.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None for the end result only, got {chunk}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    sampler = make_sampler(temperature, top_k, top_p)
    stops = check_stops(params, stop)
    ids = encode(params, [prompts] if isinstance(prompts, str) else prompts)
    longest = max(map(len, ids), default=0)
    if longest + max_new_tokens > params.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's "
            f"{params.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )
    readers = [
        CompletionReader(prompt, params.end_tokens, params.tokenizer, stops, max_new_tokens) for prompt in ids
    ]
    return _stream(params, readers, config, sampler, seed, chunk)


def _stream(
    params: Params,
    readers: list[CompletionReader],
    config: KVConfig,
    sampler: Sampler,
    seed: int,
    chunk: int | None,
) -> Iterator[list[Completion]]:
    if not readers:
        yield []
        return
    max_new_tokens = readers[0].max_new_tokens
    end_tokens = jnp.asarray(params.end_tokens, jnp.int32)
    batch = PromptBatch.pad([reader.prompt for reader in readers], max_new_tokens)
    rows = jnp.arange(len(batch.lengths))
    decoding = start_decoding(
        params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.lengths),
        end_tokens,
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
        sampler,
        active=rows < len(readers),
        capacity=batch.capacity,
        kv=config,
        max_new_tokens=_bucket(max_new_tokens, least=16),
    )
    completions = [Completion(None, [], None)] * len(readers)
    while True:
        steps = int(decoding.steps)
        generated = np.asarray(decoding.tokens)[:, :steps].tolist()
        # A finished row's columns go on being filled, with anything.
        completions = [
            done if done.finish_reason else reader.read(tokens)
            for done, reader, tokens in zip(completions, readers, generated, strict=False)
        ]
        running = [completion.finish_reason is None for completion in completions]
        if not any(running):
            yield completions
            return
        if chunk is not None and steps > 1:
            yield completions
        running += [False] * (len(batch.lengths) - len(readers))
        decoding = dataclasses.replace(decoding, active=decoding.active & jnp.asarray(running))
        until = max_new_tokens if chunk is None else min(steps + chunk, max_new_tokens)
        decoding = continue_decoding(params, decoding, end_tokens, sampler, jnp.int32(until))


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts in arrays of bucketed shapes, so that different prompts rarely need another compilation.

    Attributes:
        tokens: int32 `[B, T]`, right-padded.
        lengths: int32 `[B]`; rows that only fill up the batch have one token.
        capacity: tokens a row of the KV state must hold.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    capacity: int

    @classmethod
    def pad(cls, ids: Sequence[Sequence[int]], max_new_tokens: int) -> "PromptBatch":
        longest = max(map(len, ids))
        tokens = np.zeros((_bucket(len(ids)), _bucket(longest, least=16)), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for row, prompt in enumerate(ids):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        return cls(tokens, lengths, _bucket(longest + max_new_tokens, least=16))


def _bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, … from `least` on: few shapes to compile, at most half too much."""
    bucket = least
    while bucket < size:
        three_halves = bucket * 3 // 2
        bucket = three_halves if bucket > 1 and three_halves >= size else bucket * 2
    return bucket
