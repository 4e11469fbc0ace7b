"""The `kivi-jax` command."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import jax
import typer
from tqdm import tqdm

import kivi_jax

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """LLM inference in JAX with a 2-bit key-value cache."""


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to complete; give it more than once for a batch.")],
    model: Annotated[
        str, typer.Option(help="Folder, 'org/name' on the Hugging Face Hub, or 'demo'.")
    ] = "demo",
    kv: Annotated[
        str, typer.Option(help="Storage of the KV state: bf16, kivi4, kivi-k4v2, kivi-k2v4 or kivi2.")
    ] = "kivi2",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate for a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, more samples.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest tokens that reach this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Completes prompts. One prompt streams its text as it comes; of several, each is printed when all are done."""
    try:
        params = kivi_jax.load(model, dtype=dtype)
        steps = kivi_jax.stream(
            params,
            prompt,
            kv,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        if len(prompt) == 1:
            print_stream(prompt[0], steps)
            return
        completions: list[kivi_jax.Completion] = []
        with tqdm(
            total=len(prompt) * max_new_tokens, unit="token", desc="generating", leave=False
        ) as progress:
            for completions in steps:
                progress.update(sum(len(completion.tokens) for completion in completions) - progress.n)
    except BrokenPipeError:  # whoever read along has had enough
        raise SystemExit(1) from None
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:  # the last: out of memory
        fail(str(error))
    for text, completion in zip(prompt, completions, strict=True):
        print(f"{text}{completion.text}\n")


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
    try:
        kivi_jax.convert(model, out, dtype, revision=revision)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        fail(str(error))
    print(f"wrote {out}")


def print_stream(prompt: str, steps: Iterator[list[kivi_jax.Completion]]) -> None:
    """Prints what each step adds to the text."""
    print(prompt, end="", flush=True)
    printed = 0
    for (completion,) in steps:
        text = completion.text or ""
        # Half a character decodes to U+FFFD until its last byte is there.
        whole = text if completion.finish_reason else text.rstrip("\ufffd")
        print(whole[printed:], end="", flush=True)
        printed = max(printed, len(whole))
    print()


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    app()
