"""`kivi-jax chat`."""

import contextlib
import time
from typing import Annotated

import typer

import kivi_jax
from kivi_jax.chat import Chat
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import (
    KV,
    DType,
    MaxNewTokens,
    MaxPositions,
    MinP,
    Model,
    ModelSampling,
    RepetitionPenalty,
    Revision,
    Temperature,
    TopK,
    TopP,
    given,
)
from kivi_jax.kv import PRESETS
from kivi_jax.kv.config import find_kv, resolve_kv

NOTHING_SAID = "nothing was said yet"
HELP = """/kv NAME   go on with another cache, into which the conversation is read again
/stats     what the cache holds, and how fast the last answer came
/new       begin another conversation
/help      this
/quit      end, as Ctrl-D does and Ctrl-C where a message is due; while an answer comes, Ctrl-C ends it"""


def chat(
    model: Model = "smollm2",
    kv: KV = "kivi2",
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Name of the model's chat template, if it has several.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a conversation; by default the model's positions, at most 8192."),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    model_sampling: ModelSampling = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    max_positions: MaxPositions = None,
    dtype: DType = "bfloat16",
    revision: Revision = None,
) -> None:
    """Talks with a chat model, whose cache stays between the turns. /help says what else there is.

    Example: kivi-jax chat --model smollm2 --kv kivi-k4v2 --temperature 0.7
    """
    sampling = given(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    with one_line_errors():
        find_kv(kv)
        settings = kivi_jax.GenerationSettings(max_new_tokens, seed=seed, **sampling)
        params = kivi_jax.load(model, dtype=dtype, revision=revision, max_positions=max_positions)
        if model_sampling:
            sampling = params.sampling | sampling

        def begin(kv: str) -> Chat:
            return Chat(
                params,
                kv,
                settings,
                system=system,
                capacity=capacity,
                chat_template=chat_template,
                **sampling,
            )

        conversation, stats = begin(kv), NOTHING_SAID
        print(
            f"{model} with a {kv} cache of {conversation.capacity:,} tokens. /help says what else there is."
        )
        while (line := _read_line()) is not None:
            command, _, argument = line.strip().partition(" ")
            if not command:
                continue
            if command == "/quit":
                break
            if command == "/help":
                print(HELP)
            elif command == "/stats":
                print(stats)
            elif command == "/new":
                conversation, stats = begin(kv), NOTHING_SAID
            elif command == "/kv" and not argument.strip():
                print(f"the cache is {kv}, of {', '.join(PRESETS)}")
            elif command == "/kv":
                try:
                    resolve_kv(argument.strip(), params.config.head_dim, params.config.num_layers)
                except ValueError as error:
                    print(f"the cache is {kv}; {error}")
                    continue
                kv, messages = argument.strip(), conversation.messages
                conversation = begin(kv)
                conversation.messages = messages
            else:
                stats = _answer(conversation, line, kv) or stats


with contextlib.suppress(ImportError):  # it is not everywhere
    import readline  # noqa: F401 # lines can be edited and found again once it is imported


def _read_line() -> str | None:
    """None at the end."""
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(conversation: Chat, message: str, kv: str) -> str | None:
    """Prints the answer as it comes, and returns what `/stats` says of it."""
    try:
        answer = conversation.ask(message)
    except ValueError as no_room:
        print(no_room)
        return None
    printed, tokens, error = 0, 0, None
    began = first = time.perf_counter()
    try:
        for completion in answer:
            if tokens == 0:
                first = time.perf_counter()
            text, tokens, error = completion.text or "", len(completion.tokens), completion.error
            print(text[printed:], end="", flush=True)
            printed = len(text)
    except KeyboardInterrupt:
        print(" …", end="")
    answer.close()
    print()
    if error is not None:
        print(error)
    if tokens == 0:
        return None
    seconds = max(time.perf_counter() - first, 1e-9)
    return (
        f"{kv}: {conversation.tokens:,} of {conversation.capacity:,} tokens, {conversation.kv_bytes / 2**20:.1f} MiB; "
        f"the last answer: first token after {first - began:.1f} s, then {(tokens - 1) / seconds:.1f} tokens/s"
    )
