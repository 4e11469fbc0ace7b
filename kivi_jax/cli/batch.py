"""`kivi-jax batch`."""

import signal
import sys
from typing import Annotated

import jax
import typer

import kivi_jax
from kivi_jax.batch.job import Job, Outcome, run_job
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import (
    KV,
    DType,
    IgnoreEos,
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
from kivi_jax.mesh import lay_out
from kivi_jax.processes import is_first, join_processes


def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="File of requests, a JSON object a line: OpenAI's batch lines, or a prompt or messages with any of "
            "generate's settings. Local or gs://.",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="File of results, a line for each of IN; a folder of parts if it ends in / or is gs://.",
        ),
    ],
    model: Model = "demo",
    kv: KV = "kivi2",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Most tokens to generate. This and the settings below are for lines without."
        ),
    ] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    model_sampling: ModelSampling = False,
    seed: Annotated[int, typer.Option(help="Of the samples, each line's together with its id.")] = 0,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Add each token's log-probability.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="Name of the model's chat template, if it has several.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Completions that run at a time; by default as many as fit.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a prompt and its completion; by default the longest's."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens that are decoded between looks at them.")] = 64,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens to run at a time; longer prompts run in pieces.")
    ] = 4096,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Take every N-th line, from the I-th on, counted from 0.")
    ] = "0/1",
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Do lines again whose result is an error.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever OUT has.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Run nothing if a line of IN is bad.")] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="DATAxMODEL",
            help="Split slots over DATA devices and the model over MODEL; their product is all that this machine "
            "has, or with --distributed all machines.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="One of several processes that run a wider model together, each with the same command; the first "
            "one writes.",
        ),
    ] = False,
    max_positions: MaxPositions = None,
    dtype: DType = "bfloat16",
    revision: Revision = None,
) -> None:
    """Completes a file of requests. Stopped or killed at any moment, the same command goes on where it was.

    Example: kivi-jax batch requests.jsonl results.jsonl --model org/name --kv kivi2
    """
    settings = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    try:
        with one_line_errors(join_processes if distributed else None):
            if distributed and mesh is None:
                raise ValueError(
                    "--distributed needs --mesh, which says how the devices of all machines are laid out"
                )
            job = Job(
                source=source,
                out=out,
                model=model,
                kv=kv,
                dtype=dtype,
                revision=revision,
                max_positions=max_positions,
                mesh=None
                if mesh is None
                else lay_out(mesh, jax.devices() if distributed else jax.local_devices()),
                slots=slots,
                capacity=capacity,
                window=window,
                prefill_tokens=prefill_tokens,
                chat_template=chat_template,
                settings=settings,
                model_sampling=model_sampling,
                shard=read_shard(shard),
                strict=strict,
                retry_errors=retry_errors,
                overwrite=overwrite,
            )
            outcome = run_job(job, kivi_jax.Engine)
    except KeyboardInterrupt:  # before anything ran
        raise typer.Exit(128 + signal.SIGINT) from None
    if is_first():
        report(source, out, outcome)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def report(source: str, out: str, outcome: Outcome) -> None:
    """Says how the job ended."""
    if outcome.bad:
        print(f"bad lines of {source}, each an error in {out}: {outcome.bad}")
    if not outcome.lines:
        print(f"{source} has no lines, so {out} has none")
    elif outcome.before == outcome.lines:
        print(f"{out} has all {outcome.lines} lines already, {outcome.failed} of them errors")
    else:
        print(f"{out} has {outcome.done} of {outcome.lines} lines, {outcome.failed} of them errors")
    if outcome.signal is not None:
        print(f"stopped by {signal.Signals(outcome.signal).name}; the same command goes on", file=sys.stderr)


def read_shard(text: str) -> tuple[int, int]:
    """The numbers in "i/n".

    Raises:
        ValueError: they aren't there, or i is not one of n.
    """
    first, _, count = text.partition("/")
    if first.isdecimal() and count.isdecimal() and int(first) < int(count):
        return int(first), int(count)
    raise ValueError(f"--shard must be I/N with I from 0 to N - 1, as in 0/4, got {text!r}")
