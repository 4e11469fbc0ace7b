"""`kivi-jax generate`."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from tqdm import tqdm

import kivi_jax
from kivi_jax.cli.errors import fail, one_line_errors
from kivi_jax.cli.options import (
    KV,
    DType,
    IgnoreEos,
    MaxNewTokens,
    MaxPositions,
    MinP,
    Model,
    ModelSampling,
    RepetitionPenalty,
    Revision,
    Stop,
    Temperature,
    TopK,
    TopP,
    given,
)
from kivi_jax.kv.config import find_kv
from kivi_jax.progress import progress_disabled


def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to complete; give it more than once for a batch.")],
    model: Model = "demo",
    kv: KV = "kivi2",
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages, to be answered by a chat model.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message before each prompt, with --chat.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Name of the model's chat template, with --chat, if it has several.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    model_sampling: ModelSampling = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each completion when all are done.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Add each token's log-probability, with --json.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of a prompt to run at a time, for long prompts in little memory; by default 8192 on TPUs "
            "and GPUs.",
        ),
    ] = None,
    max_positions: MaxPositions = None,
    dtype: DType = "bfloat16",
    revision: Revision = None,
) -> None:
    """Completes prompts. One prompt streams its text as it comes; of several, each is printed when all are done.

    Example: kivi-jax generate --model org/name --chat --prompt "What is a cache?" --temperature 0.7
    """
    if system is not None and not chat:
        fail("--system needs --chat")
    if chat_template is not None and not chat:
        fail("--chat-template needs --chat")
    if logprobs and not as_json:
        fail("--logprobs needs --json")
    sampling = given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    with one_line_errors():
        # Found wrong before the weights are read; several samples may get their temperature from the model.
        find_kv(kv)
        settings = kivi_jax.GenerationSettings(
            max_new_tokens, seed=seed, stop=stop, logprobs=logprobs, ignore_eos=ignore_eos, **sampling
        )
        params = kivi_jax.load(model, dtype=dtype, revision=revision, max_positions=max_positions)
        if model_sampling:
            settings = dataclasses.replace(settings, **params.sampling | sampling)
        steps: Iterator[Any] = kivi_jax.stream(
            params,
            [conversation(text, system) for text in prompt] if chat else prompt,
            kv,
            settings,
            n=samples,
            chat_template=chat_template,
            prefill_chunk="auto" if prefill_chunk is None else prefill_chunk,
        )
        shown = [""] * len(prompt) if chat else prompt
        if len(prompt) == samples == 1 and not as_json:
            if error := print_stream(shown[0], (completion for ((completion,),) in steps)):
                fail(error)
            return
        results: list[list[kivi_jax.Completion]] = []
        total = len(prompt) * samples * max_new_tokens
        with tqdm(
            total=total, unit="token", desc="generating", leave=False, disable=progress_disabled()
        ) as progress:
            for results in steps:
                done = sum(len(completion.tokens) for completions in results for completion in completions)
                progress.update(done - progress.n)
        for text, before, completions in zip(prompt, shown, results, strict=True):
            for completion in completions:
                print(json_line(text, completion) if as_json else f"{before}{completion.text}\n")
        errors = {completion.error for completions in results for completion in completions} - {None}
        if errors:
            fail("; ".join(map(str, errors)))


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A user's message, after a system message if there is one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": prompt}]


def json_line(prompt: str, completion: kivi_jax.Completion) -> str:
    fields = dataclasses.asdict(completion)
    for name in ("logprobs", "error"):
        if fields[name] is None:
            del fields[name]
    return json.dumps({"prompt": prompt} | fields)


def print_stream(prompt: str, completions: Iterator[kivi_jax.Completion]) -> str | None:
    """Prints what each step adds to the text, and returns the last one's error."""
    error = None
    print(prompt, end="", flush=True)
    printed = 0
    for completion in completions:
        text, error = completion.text or "", completion.error
        print(text[printed:], end="", flush=True)
        printed = max(printed, len(text))
    print()
    return error
