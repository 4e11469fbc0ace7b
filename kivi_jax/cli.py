"""The `kivi-jax` command."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import typer
from tqdm import tqdm

import kivi_jax
from kivi_jax.kv.config import find_kv
from kivi_jax.progress import progress_disabled

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> bool:
    if wanted:
        print(f"kivi-jax {kivi_jax.__version__}")
        raise typer.Exit
    return wanted  # typer passes on what this returns


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """LLM inference in JAX with a 2-bit key-value cache."""


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to complete; give it more than once for a batch.")],
    model: Annotated[
        str, typer.Option(help="Folder, 'org/name' on the Hugging Face Hub, or 'demo'.")
    ] = "demo",
    kv: Annotated[
        str, typer.Option(help=f"Storage of the KV state: {', '.join(kivi_jax.kv.PRESETS)}.")
    ] = "kivi2",
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages, to be answered by a chat model.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message before each prompt, with --chat.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Name of the model's chat template, with --chat, if it has several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate for a prompt.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default, takes the most likely token, more samples.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest tokens that reach this probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample among tokens at least this times as likely as the most likely one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="More than 1 discourages tokens that are there already.")
    ] = None,
    model_sampling: Annotated[
        bool, typer.Option("--model-sampling", help="Sample as the checkpoint recommends; other flags win.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end tokens.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each completion when all are done.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Add each token's log-probability, with --json.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Most prompt tokens to run at a time, for long prompts in little memory."),
    ] = None,
    max_positions: Annotated[
        int | None,
        typer.Option(help="Longest text of a model tuned for another length than its config.json says."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Completes prompts. One prompt streams its text as it comes; of several, each is printed when all are done."""
    if system is not None and not chat:
        fail("--system needs --chat")
    if chat_template is not None and not chat:
        fail("--chat-template needs --chat")
    if logprobs and not as_json:
        fail("--logprobs needs --json")
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
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
            prefill_chunk=prefill_chunk,
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


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder, 'org/name' on the Hugging Face Hub, or 'demo'.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[
        str, typer.Option(help="To store weights in: bfloat16, float16 or float32.")
    ] = "bfloat16",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Writes a model in a form that loads straight onto several devices: kivi_jax.load(OUT, mesh=...)."""
    with one_line_errors():
        kivi_jax.convert(model, out, dtype, revision=revision)
    print(f"wrote {out}")


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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr where its input or the machine is at fault."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first, without a message, for want of a plugin
        platforms = os.environ.get("JAX_PLATFORMS", "")
        fail(f"JAX can't start with JAX_PLATFORMS={platforms!r}: {str(error) or 'there is no such backend'}")
    try:
        yield
    except BrokenPipeError:  # whoever read along has had enough
        raise SystemExit(1) from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # JAX out of memory is a RuntimeError
        fail(str(error) or "out of memory")


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    app()
