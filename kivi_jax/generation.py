"""Text in, text out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import jax

from kivi_jax.arguments import read_size
from kivi_jax.batching import PromptBatch
from kivi_jax.completions import Completion, make_reader
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.loop import run
from kivi_jax.model import Params
from kivi_jax.request import GenerationOptions, GenerationSettings, make_settings
from kivi_jax.text import Conversation, Prompt, encode, is_conversation, read_stops

# Tokens between looks at the text, while stop strings can end a row or somebody reads along.
STREAM_TOKENS = 8

Single = str | Conversation
Prompts = Single | Sequence[Prompt]
PrefillChunk = int | Literal["auto"] | None

# Tokens of a prompt that a TPU or GPU runs at a time by default: in a model of 7 billion weights, their activations
# take somewhat less than 1 GiB (docs/tpu.md).
DEVICE_CHUNK = 8192


@overload
def generate(  # type: ignore[overload-overlap] # a str is a sequence of prompts, too
    params: Params,
    prompts: Single,
    kv: str | KVConfig = ...,
    settings: None = ...,
    *,
    n: None = ...,
    chat_template: str | None = ...,
    prefill_chunk: PrefillChunk = ...,
    **options: Unpack[GenerationOptions],
) -> Completion: ...


@overload
def generate(
    params: Params,
    prompts: Sequence[Prompt],
    kv: str | KVConfig = ...,
    settings: None = ...,
    *,
    n: None = ...,
    chat_template: str | None = ...,
    prefill_chunk: PrefillChunk = ...,
    **options: Unpack[GenerationOptions],
) -> list[Completion]: ...


@overload
def generate(  # type: ignore[overload-overlap]
    params: Params,
    prompts: Single,
    kv: str | KVConfig = ...,
    settings: None = ...,
    *,
    n: int,
    chat_template: str | None = ...,
    prefill_chunk: PrefillChunk = ...,
    **options: Unpack[GenerationOptions],
) -> list[Completion]: ...


@overload
def generate(
    params: Params,
    prompts: Sequence[Prompt],
    kv: str | KVConfig = ...,
    settings: None = ...,
    *,
    n: int,
    chat_template: str | None = ...,
    prefill_chunk: PrefillChunk = ...,
    **options: Unpack[GenerationOptions],
) -> list[list[Completion]]: ...


@overload
def generate(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = ...,
    settings: GenerationSettings | None = ...,
    *,
    n: int | None = ...,
    chat_template: str | None = ...,
    prefill_chunk: PrefillChunk = ...,
    **options: Unpack[GenerationOptions],
) -> Completion | list[Completion] | list[list[Completion]]: ...


def generate(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    settings: GenerationSettings | None = None,
    *,
    n: int | None = None,
    chat_template: str | None = None,
    prefill_chunk: PrefillChunk = "auto",
    **options: Unpack[GenerationOptions],
) -> Completion | list[Completion] | list[list[Completion]]:
    """Completes one prompt or a batch of them.

    A row's greedy completion does not depend on the other rows, and its samples depend only on its index in the batch;
    in 16 bits up to rounding, which differs with the batch and can turn a near tie.

    Args:
        params: from `load`.
        prompts: a text, a conversation (a list of `{"role": ..., "content": ...}` messages, which the checkpoint's
            chat template turns into a prompt for the next answer), or a list of texts, conversations or lists of token
            ids (which need no tokenizer).
        kv: storage of the KV state: the name of one of `kivi_jax.kv.PRESETS`, such as "bf16", "kivi4" or "kivi2", or a
            `KVConfig`.
        settings: how to generate; None for the defaults.
        n: samples of every prompt, as in `GenerationSettings`.
        chat_template: name of the chat template for conversations, where the checkpoint has several; None takes its
            default.
        prefill_chunk: most tokens of a prompt to run at a time, which bounds the memory of activations; a later chunk
            attends the earlier ones as they are stored. None runs prompts whole and attends them exactly. "auto" does
            so too, but for those of more than `DEVICE_CHUNK` tokens in a quantized cache of a TPU or GPU.
        **options: fields of `GenerationSettings`, which change those of `settings`: `max_new_tokens` (128),
            `temperature` (0, greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`, `stop`, `logprobs`,
            `ignore_eos`.

    Returns:
        A `Completion` for a text or a conversation, else a list of them in the order of the prompts. With `n`, a list
        of n in place of each.

    Raises:
        TypeError: an option that there is not.
        ValueError: an unknown `kv`, a setting of the wrong type or out of range, an empty prompt, a token outside the
            vocabulary, texts or stop strings without a tokenizer, a conversation without a chat template, with one that
            the checkpoint lacks, or refused by it, several greedy samples, or more tokens than the model has positions.
    """
    settings = make_settings(settings, n, **options)
    every = STREAM_TOKENS if settings.stops else None
    *_, results = stream(
        params, prompts, kv, settings, chat_template=chat_template, prefill_chunk=prefill_chunk, every=every
    )
    return results[0] if _is_single(prompts) else results


def stream(
    params: Params,
    prompts: Prompts,
    kv: str | KVConfig = "kivi2",
    settings: GenerationSettings | None = None,
    *,
    n: int | None = None,
    chat_template: str | None = None,
    prefill_chunk: PrefillChunk = "auto",
    every: int | None = STREAM_TOKENS,
    **options: Unpack[GenerationOptions],
) -> Iterator[list[Completion] | list[list[Completion]]]:
    """Generates like `generate`, with its arguments, and yields all completions so far after every `every` tokens.

    What it yields is a list with an item for each prompt, also for a single one. The first yield comes a token later,
    and if `every` is None only the end result does.

    Raises:
        TypeError, ValueError: as `generate`, or `every` is less than 1; both at once, before anything is generated.
    """
    if "chunk" in options:
        if every != STREAM_TOKENS:
            raise TypeError("stream's argument chunk is the former name of every; give one of them")
        warnings.warn("stream's argument chunk is now called every", DeprecationWarning, stacklevel=2)
        every = options.pop("chunk")  # type: ignore[typeddict-item]
    settings = make_settings(settings, n, **options)
    if every is not None:
        every = read_size("every", every, ", or None for the end result only")
    if prefill_chunk not in (None, "auto"):
        prefill_chunk = read_size("prefill_chunk", prefill_chunk, ", None for whole prompts, or 'auto'")
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    stops, end_tokens = read_stops(params, settings)
    listed = _list_prompts(prompts)
    ids = encode(params, listed, chat_template)
    longest = max(map(len, ids), default=0)
    if longest + settings.max_new_tokens > params.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {settings.max_new_tokens} exceed the model's "
            f"{params.config.max_positions} positions; shorten the prompt or lower max_new_tokens, or, "
            f"if the model was tuned for longer texts, load it with max_positions"
        )
    if not ids:
        return iter([[]])
    samples = settings.n or 1
    batch = PromptBatch.pad(ids, settings.max_new_tokens, samples, params.data_devices)
    readers = [
        make_reader(params, prompt, tokens, settings, stops, end_tokens)
        for prompt, tokens in zip(listed, ids, strict=True)
        for _ in range(samples)
    ]
    chunk = _default_chunk(config) if prefill_chunk == "auto" else prefill_chunk
    steps = run(params, batch, readers, config, settings, chunk, every)
    if settings.n is None:
        return steps
    return ([step[row : row + samples] for row in range(0, len(step), samples)] for step in steps)


def _default_chunk(kv: KVConfig) -> int | None:
    return DEVICE_CHUNK if kv.quantized and jax.default_backend() in ("tpu", "gpu") else None


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
