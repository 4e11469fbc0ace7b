"""Text in, text out."""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kivi_jax.arguments import read_size, read_whole
from kivi_jax.decoding import (
    Decoding,
    begin_decoding,
    continue_decoding,
    init_state,
    insert_prompts,
    seen_tokens,
    start_decoding,
    take_rows,
)
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.kv.state import KVState
from kivi_jax.models.registry import Params
from kivi_jax.models.sharding import DATA_AXIS
from kivi_jax.sampling import Greedy, Sampler, make_sampler
from kivi_jax.text import (
    Completion,
    CompletionReader,
    Conversation,
    Prompt,
    encode,
    is_conversation,
    read_stops,
)

# Prompts of one batch are prefilled in groups of like length where padding them to the longest would run more than so
# many times their tokens, and more than so many tokens.
MOST_PADDED = 1.6
FREE_TOKENS = 512
PIECE_SECONDS = 0.25  # of decoding, between which Ctrl-C is heard
# Tokens between looks at the text, while stop strings can end a row or somebody reads along.
STREAM_TOKENS = 8

Prompts = str | Conversation | Sequence[Prompt]


def generate(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    chat_template: str | None = None,
    logprobs: bool = False,
    prefill_chunk: int | None = None,
) -> Completion | list[Completion] | list[list[Completion]]:
    """Completes one prompt or a batch of them.

    A row's greedy completion does not depend on the other rows, nor do its samples but through its place in the batch;
    in 16 bits up to rounding, which differs with the batch and can turn a near tie.

    Args:
        params: from `load`.
        prompts: a text, a conversation (a list of `{"role": ..., "content": ...}` messages, which the checkpoint's
            chat template turns into a prompt for the next answer), or a list of texts, conversations or lists of token
            ids (which need no tokenizer).
        kv: storage of the KV state: the name of one of `kivi_jax.kv.PRESETS`, such as "bf16", "kivi4" or "kivi2", or a
            `KVConfig`.
        max_new_tokens: most tokens to generate for a prompt.
        temperature: 0 takes the most likely token, more samples.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens that together reach this probability.
        min_p: sample among the tokens at least this times as likely as the most likely one. The cuts follow the
            temperature in this order, `sampling.Random` says exactly how.
        repetition_penalty: divides the positive and multiplies the other logits of all tokens that a row's prompt or
            completion has already, so more than 1 discourages them; also where temperature is 0.
        seed: of the samples, a whole number of 64 bits.
        n: samples of every prompt, which is prefilled once; the first is what None, a single one, gives.
        stop: strings that end a completion, which then ends before them; a special token's too, like "<|eot_id|>".
        chat_template: name of the chat template for conversations, where the checkpoint has several; None takes its
            default.
        logprobs: also give the log-probability of every token, see `Completion`.
        prefill_chunk: most prompt tokens to run at a time, which bounds the memory of activations; a later chunk
            attends the earlier ones as they are stored. None runs prompts whole and attends them exactly.

    Returns:
        A `Completion` for a text or a conversation, else a list of them in the order of the prompts. With `n`, a list
        of n `Completion`s in place of each.

    Raises:
        ValueError: an unknown `kv`, a setting of the wrong type or out of range, an empty prompt, a token outside the
            vocabulary, texts or stop strings without a tokenizer, a conversation without a chat template, with one that
            the checkpoint lacks, or refused by it, several greedy samples, or more tokens than the model has positions.
    """
    *_, results = stream(
        params,
        prompts,
        kv,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop=stop,
        chat_template=chat_template,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
        chunk=STREAM_TOKENS if stop else None,
    )
    return results[0] if _is_single(prompts) else results


def stream(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    chat_template: str | None = None,
    logprobs: bool = False,
    prefill_chunk: int | None = None,
    chunk: int | None = STREAM_TOKENS,
) -> Iterator[list[Completion] | list[list[Completion]]]:
    """Generates like `generate`, with its arguments, and yields all completions so far after every `chunk` tokens.

    What it yields is a list with an item for each prompt, also for a single one. The first yield comes a token later,
    and with a `chunk` of None only the end result does.

    Raises:
        ValueError: as `generate`, or `chunk` is less than 1; both at once, before anything is generated.
    """
    max_new_tokens = read_size("max_new_tokens", max_new_tokens)
    if chunk is not None:
        chunk = read_size("chunk", chunk, ", or None for the end result only")
    if prefill_chunk is not None:
        prefill_chunk = read_size("prefill_chunk", prefill_chunk, ", or None for whole prompts")
    if n is not None:
        n = read_size("n", n, ", or None for a single sample")
    if not -(2**63) <= (seed := read_whole("seed", seed)) < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    sampler = make_sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    if n is not None and n > 1 and isinstance(sampler, Greedy):
        raise ValueError(f"{n} samples at temperature 0 would all be the same; set a temperature above 0")
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    stops, end_tokens = read_stops(params, stop)
    listed = _list_prompts(prompts)
    ids = encode(params, listed, chat_template)
    longest = max(map(len, ids), default=0)
    if longest + max_new_tokens > params.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's "
            f"{params.config.max_positions} positions; shorten the prompt or lower max_new_tokens, or, "
            f"if the model was tuned for longer texts, load it with max_positions"
        )
    if not ids:
        return iter([[]])
    devices = 1 if params.mesh is None else params.mesh.shape.get(DATA_AXIS, 1)
    batch = PromptBatch.pad(ids, max_new_tokens, n or 1, devices)
    readers = [
        CompletionReader(
            () if is_conversation(prompt) else tokens,
            end_tokens,
            params.tokenizer,
            stops,
            max_new_tokens,
            error=_overflow(params),
        )
        for prompt, tokens in zip(listed, ids, strict=True)
        for _ in range(1 if n is None else n)
    ]
    steps = _stream(params, batch, readers, config, sampler, seed, logprobs, prefill_chunk, chunk)
    if n is None:
        return steps
    return ([step[row : row + n] for row in range(0, len(step), n)] for step in steps)


def _overflow(params: Params) -> str:
    """What is said of a row whose logits are no finite numbers."""
    dtype = params.dtype.name
    problem = f"the model's activations are no finite numbers in {dtype}"
    if dtype == "float16":
        return f"{problem}, whose largest is 65504; load it with dtype='bfloat16' or 'float32'"
    return f"{problem}; its weights may be damaged or of another model"


def _list_prompts(prompts: Prompts) -> list[Any]:
    if _is_single(prompts):
        return [prompts]
    try:
        if not isinstance(prompts, bytes):
            return list(prompts)
    except TypeError:
        pass
    raise ValueError(f"prompts must be a text, a conversation or a list of prompts, got {prompts!r}")


def _is_single(prompts: Prompts) -> bool:
    """Whether this is one prompt; a lone message counts, so that `encode` refuses it instead of reading its keys."""
    return isinstance(prompts, str | Mapping) or is_conversation(prompts)


def _stream(
    params: Params,
    batch: "PromptBatch",
    readers: list[CompletionReader],
    config: KVConfig,
    sampler: Sampler,
    seed: int,
    with_logprobs: bool,
    prefill_chunk: int | None,
    chunk: int | None,
) -> Iterator[list[Completion]]:
    """Generates and yields the completions of the rows that have a reader."""
    max_new_tokens = readers[0].max_new_tokens
    end_tokens = jnp.asarray(_pad_end_tokens(readers[0].end_tokens), jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_random_key(seed), batch.places[batch.prompt_rows])
    keys = jax.vmap(jax.random.fold_in)(keys, batch.samples)
    settings: dict[str, Any] = {
        "active": jnp.asarray(np.arange(len(batch.samples)) < len(readers)),
        "max_new_tokens": _bucket(max_new_tokens, least=16),
        "logprobs": with_logprobs,
    }
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    prompt_rows = None if batch.samples.max() == 0 else jnp.asarray(batch.prompt_rows)
    if len(batch.groups) == 1:
        settings |= {"capacity": batch.capacity, "kv": config, "prefill_chunk": prefill_chunk}
        settings["prompt_rows"] = prompt_rows
        decoding = start_decoding(params, tokens, lengths, end_tokens, keys, sampler, **settings)
    else:
        prompts = (
            *_prefill_groups(params, batch, config, prefill_chunk),
            seen_tokens(params, tokens, lengths, sampler),
        )
        if prompt_rows is not None:
            prompts = take_rows(prompts, prompt_rows)
        decoding = begin_decoding(params, *prompts, end_tokens, keys, sampler, **settings)
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
        if chunk is not None and steps > 1:
            yield completions
        running_rows = np.zeros(len(batch.samples), bool)
        running_rows[batch.rows] = running
        decoding = dataclasses.replace(decoding, active=decoding.active & jnp.asarray(running_rows))
        until = max_new_tokens if chunk is None else min(steps + chunk, max_new_tokens)
        decoding = _continue(params, decoding, end_tokens, sampler, until)


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
    params: Params, batch: "PromptBatch", config: KVConfig, prefill_chunk: int | None
) -> tuple[Array, KVState]:
    """Logits after every prompt, 0 in rows that only fill up the batch, and the state."""
    state = _empty_state(params, len(batch.tokens), batch.capacity, config)
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


_empty_state = jax.jit(init_state, static_argnames=("batch", "capacity", "kv"))


def _pad_end_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """To a multiple of 4, so that one more of them rarely needs another compilation; no token is -1."""
    return (*tokens, *[-1] * (-len(tokens) % 4 if tokens else 4))


def _random_key(seed: int) -> Array:
    """`jax.random.key(seed)`, but of all 64 bits: where JAX computes in 32, it takes the lower ones only."""
    upper, lower = divmod(seed, 2**32)
    key = jax.random.key(np.uint32(lower))
    return jax.random.fold_in(key, np.uint32(upper % 2**32)) if upper else key


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts in arrays of bucketed shapes, so that different prompts rarely need another compilation.

    Attributes:
        tokens: int32 `[B, T]`, right-padded; if there are several groups, from the shortest prompt to the longest.
        lengths: int32 `[B]`; rows that only fill up the batch have one token.
        places: int32 `[B]`, which of the prompts a row of `tokens` is.
        groups: rows that are prefilled together, one group after the other, and how many columns they need.
        prompt_rows: int32 `[N]`, the row of `tokens` that each row of the generation continues.
        samples: int32 `[N]`, which of its prompt's samples a row of the generation is.
        rows: the rows of the generation in the order of the prompts, those of one prompt's samples together.
        capacity: tokens a row of the KV state must hold.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    groups: tuple[tuple[int, int], ...]
    prompt_rows: np.ndarray
    samples: np.ndarray
    rows: np.ndarray
    capacity: int

    @classmethod
    def pad(
        cls, ids: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, devices: int = 1
    ) -> "PromptBatch":
        """`n` samples of prompts that are split over `devices`, each of which gets as many rows as the others."""
        longest = max(map(len, ids))
        tokens = np.zeros((_bucket(-(-len(ids) // devices)) * devices, _bucket(longest, least=16)), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        places = np.arange(len(tokens), dtype=np.int32)
        groups = _groups([len(prompt) for prompt in ids], tokens.shape) if devices == 1 else [tokens.shape]
        if len(groups) > 1:
            places[: len(ids)] = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for row, place in enumerate(places[: len(ids)]):
            prompt = ids[place]
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        rows = np.arange(_bucket(-(-len(ids) * n // devices)) * devices, dtype=np.int32)
        prompt_rows = np.minimum(rows // n, len(tokens) - 1)
        first_rows = n * np.argsort(places[: len(ids)])
        return cls(
            tokens,
            lengths,
            places,
            tuple(groups),
            prompt_rows,
            rows % n,
            (first_rows[:, None] + np.arange(n)).reshape(-1),
            _bucket(longest + max_new_tokens, least=16),
        )


def _groups(lengths: Sequence[int], whole: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the fewest groups of prompts, from short to long, that don't pad too much.

    Every shape of a group has to be compiled once, and one group, `whole`, costs the least where it may be.
    """
    # The shortest are padded to a bucket of 16 in any case, and equals need no groups for it.
    affordable = max(MOST_PADDED * sum(max(length, 16) for length in lengths), FREE_TOKENS)
    if math.prod(whole) <= affordable:
        return [whole]
    counts = Counter(_bucket(length, least=16) for length in lengths)
    widths = sorted(counts)
    cost = sum(width * counts[width] for width in widths)
    # Narrow ones join the next wider ones, the cheapest first.
    while len(widths) > 1:
        more, width, wider = min((counts[a] * (b - a), a, b) for a, b in itertools.pairwise(widths))
        if cost + more > affordable:
            break
        cost += more
        counts[wider] += counts.pop(width)
        widths.remove(width)
    return [(rows, width) for width in widths for rows in _bucket_sizes(counts[width])]


def _bucket_sizes(count: int) -> Iterator[int]:
    """Sizes that `_bucket` has, the largest first, whose sum is `count`."""
    while count:
        size = max(size for size in range(1, count + 1) if _bucket(size) == size)
        yield size
        count -= size


def _bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, … from `least` on: few shapes to compile, at most half too much."""
    bucket = least
    while bucket < size:
        three_halves = bucket * 3 // 2
        bucket = three_halves if bucket > 1 and three_halves >= size else bucket * 2
    return bucket
