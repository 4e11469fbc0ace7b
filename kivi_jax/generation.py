"""Text in, text out."""

import bisect
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kivi_jax.decoding import Decoding, continue_decoding, start_decoding
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.models.registry import Params
from kivi_jax.sampling import make_sampler

# Tokens between looks at the text, while stop strings can end a row or somebody reads along.
STREAM_TOKENS = 8

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        text: the decoded tokens; None if the checkpoint has no tokenizer.
        tokens: generated ids, without the end token; after a stop string, those up to its last one.
        finish_reason: "stop" after an end token or a stop string, "length" at `max_new_tokens`; None while unfinished.
    """

    text: str | None
    tokens: list[int]
    finish_reason: Literal["stop", "length"] | None


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

    A row's greedy completion does not depend on the other rows, nor do its samples but through its place in the batch.

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

    With a `chunk` of None only the end result comes.

    Raises:
        ValueError: as `generate`, at the first completion asked for.
    """
    config = resolve_kv(kv, params.config.head_dim)
    sampler = make_sampler(temperature, top_k, top_p)
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(stops):
        raise ValueError("stop strings must not be empty")
    if stops and params.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = encode(params, [prompts] if isinstance(prompts, str) else prompts)
    if not ids:
        yield []
        return
    longest = max(map(len, ids))
    if longest + max_new_tokens > params.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's "
            f"{params.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )
    end_tokens = jnp.asarray(params.end_tokens, jnp.int32)
    batch = PromptBatch.pad(ids, max_new_tokens)
    rows = jnp.arange(len(batch.lengths))
    decoding = start_decoding(
        params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.lengths),
        end_tokens,
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
        sampler,
        active=rows < len(ids),
        capacity=batch.capacity,
        kv=config,
        max_new_tokens=_bucket(max_new_tokens, least=16),
    )
    while True:
        completions = _completions(params, decoding, len(ids), max_new_tokens, stops)
        if all(completion.finish_reason for completion in completions):
            yield completions
            return
        if chunk is not None and int(decoding.steps) > 1:
            yield completions
        if stops:
            running = [completion.finish_reason is None for completion in completions]
            running += [False] * (len(batch.lengths) - len(ids))
            decoding = dataclasses.replace(decoding, active=decoding.active & jnp.asarray(running))
        until = max_new_tokens if chunk is None else min(int(decoding.steps) + chunk, max_new_tokens)
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


def _completions(
    params: Params, decoding: Decoding, rows: int, max_new_tokens: int, stops: tuple[str, ...]
) -> list[Completion]:
    """What the first `rows` rows hold so far."""
    generated = np.asarray(decoding.tokens)[:rows, : int(decoding.steps)].tolist()
    return [_completion(params, tokens, max_new_tokens, stops) for tokens in generated]


def _completion(params: Params, tokens: list[int], max_new_tokens: int, stops: tuple[str, ...]) -> Completion:
    finish_reason: Literal["stop", "length"] | None = "length" if len(tokens) == max_new_tokens else None
    ends = [place for place, token in enumerate(tokens) if token in params.end_tokens]
    if ends:
        tokens, finish_reason = tokens[: ends[0]], "stop"
    if params.tokenizer is None:
        return Completion(None, tokens, finish_reason)
    decode = functools.partial(load_tokenizer(params.tokenizer).decode, skip_special_tokens=True)
    text = decode(tokens)
    if _first_stop(text, stops) is not None:
        # The first tokens that complete a stop string decide, whatever was generated since.
        needed = bisect.bisect_left(
            range(len(tokens)), True, key=lambda count: _first_stop(decode(tokens[:count]), stops) is not None
        )
        tokens, finish_reason = tokens[:needed], "stop"
        text = decode(tokens)
        text = text[: _first_stop(text, stops)]
    elif finish_reason is None:
        text = text[: len(text) - _begun_stop(text, stops)]
    return Completion(text, tokens, finish_reason)


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first of the stop strings in `text` begins."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _begun_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with: it may be about to come."""
    lengths = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(lengths, default=0)


def encode(params: Params, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a text but no tokenizer.
    """
    encoded = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if params.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer; pass prompts as lists of token ids")
            ids = load_tokenizer(params.tokenizer).encode(prompt) if prompt else []
        elif isinstance(prompt, int):
            raise ValueError(
                "prompts must be texts or lists of token ids; wrap a single list of ids in another list"
            )
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError(f"prompt {number} is empty; give it at least one token")
        if outside := [token for token in ids if not 0 <= token < params.config.vocab_size]:
            raise ValueError(
                f"prompt {number} has token {outside[0]}, outside the vocabulary of {params.config.vocab_size}"
            )
        encoded.append(ids)
    return encoded


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer in `folder`; no code from the folder is run.

    Raises:
        ValueError: its files are damaged or of an unknown kind.
    """
    # transformers warns that it has no PyTorch, which nobody here wants it to have.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # seconds to import, and token-id prompts don't need it

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's files make its parsers raise
        raise ValueError(f"{folder}: the tokenizer can't be loaded: {error}") from error


def _bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, … from `least` on: few shapes to compile, at most half too much."""
    bucket = least
    while bucket < size:
        three_halves = bucket * 3 // 2
        bucket = three_halves if bucket > 1 and three_halves >= size else bucket * 2
    return bucket
