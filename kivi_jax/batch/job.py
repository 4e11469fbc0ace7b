"""A batch job from its options to its end."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from kivi_jax.arguments import read_size
from kivi_jax.batch.files import check_file, read_lines
from kivi_jax.batch.fingerprint import check_run, write_run
from kivi_jax.batch.lines import Failure, read_line
from kivi_jax.batch.loop import LOOK_AHEAD, Event, Loop, Server, longest_first
from kivi_jax.batch.output import Output, WrittenElsewhere, is_folder, open_output, run_file
from kivi_jax.batch.plan import Plan, Rules, list_failures, make_plan
from kivi_jax.batch.progress import Progress
from kivi_jax.batch.requests import Request, read_request
from kivi_jax.batch.results import failure_line, result_line
from kivi_jax.batch.signals import StopSignals
from kivi_jax.checkpoints.identity import model_identity
from kivi_jax.checkpoints.load import DTYPES, describe, find_model, load
from kivi_jax.kv.config import find_kv
from kivi_jax.processes import from_first, is_first
from kivi_jax.progress import progress_disabled
from kivi_jax.request import GenerationSettings


@dataclasses.dataclass(frozen=True)
class Job:
    """What a batch job is asked for.

    Attributes:
        source: the file of requests, one JSON object a line: local, or an address such as `gs://…`.
        out: the file of results, or, where it ends in "/" or is an address, a folder for parts of it.
        model, dtype, revision, max_positions, mesh: as for `kivi_jax.load`.
        kv, slots, capacity, window, prefill_tokens, chat_template: as for `kivi_jax.Engine`. A capacity of None is what
            the longest request needs, also of those that are done.
        settings: fields of `GenerationSettings` for lines without their own.
        model_sampling: also take the sampling that the checkpoint recommends, where `settings` says nothing.
        shard: (i, n), to take every n-th line from the i-th on, counted from 0.
        strict: run nothing if a line is bad.
        retry_errors: do lines again whose result is an error.
        overwrite: begin anew whatever there is.
    """

    source: str
    out: str
    model: str = "demo"
    kv: str = "kivi2"
    dtype: str = "bfloat16"
    revision: str | None = None
    max_positions: int | None = None
    mesh: Mesh | None = None
    slots: int | None = None
    capacity: int | None = None
    window: int = 64
    prefill_tokens: int = 4096
    chat_template: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_sampling: bool = False
    shard: tuple[int, int] = (0, 1)
    strict: bool = False
    retry_errors: bool = False
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        lines: how many there are in its shard.
        done: how many of them have a result.
        failed: how many of these are errors.
        before: how many had a result when it started.
        bad: what was wrong with lines that couldn't be run; empty if nothing was.
        signal: the number of the signal that ended it, if one did.
    """

    lines: int
    done: int
    failed: int
    before: int
    bad: str = ""
    signal: int | None = None


def run_job(job: Job, make_engine: Callable[..., Server]) -> Outcome:
    """Runs a job, from where an earlier run of it was stopped.

    Args:
        job: what to do.
        make_engine: `kivi_jax.Engine`.

    Raises:
        ValueError: an option is wrong, the output is another run's, or, if the job is strict, a line is bad.
        OSError: a file can't be read or written. What was written is whole, and the same job goes on from there.
    """
    find_kv(job.kv)
    if job.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {job.dtype!r}")
    defaults = GenerationSettings(**job.settings)
    for name in ("slots", "capacity", "window", "prefill_tokens"):
        if (size := getattr(job, name)) is not None:
            read_size(name, size)
    check_file(job.source)
    path = find_model(job.model, job.revision)
    described = describe(path, job.max_positions)
    if job.model_sampling:
        defaults = dataclasses.replace(defaults, **{**described.sampling, **job.settings})
    rules = Rules(described, defaults, job.chat_template, job.capacity, job.shard)
    fingerprint = _fingerprint(job, path, defaults)
    output, before = _open(job, fingerprint)
    with contextlib.closing(output):
        plan = make_plan(_shown(read_lines(job.source)), rules, output.done)
        if job.strict and plan.failures:
            raise ValueError(
                f"{len(plan.failures)} of {plan.lines} lines are bad, and with --strict none is run: "
                f"{list_failures(plan.failures)}"
            )
        # Not less than before, so that the rest is computed in the same shapes.
        capacity = job.capacity or max((before.get("capacity") or 0, *plan.tokens.values()))
        capacity = min(capacity, described.config.max_positions)
        from_first(lambda: _begin(job, output, fingerprint, capacity, plan))
        if plan.tokens:
            return _run(job, path, rules, plan, capacity, output, make_engine)
    return _outcome(plan, plan.done + len(plan.failures), plan.failed + len(plan.failures))


def _open(job: Job, fingerprint: Mapping[str, Any]) -> tuple[Output, dict[str, Any]]:
    """The output, which only the first process writes, and how the results that it has were made."""
    opened: list[Output] = []

    def open_first() -> dict[str, Any]:
        output = open_output(job.source, job.out, job.shard, job.overwrite, job.retry_errors)
        opened.append(output)
        before = {}
        # Of shards that share a folder, another one may have begun and have no part yet.
        begun = output.used or (is_folder(job.out) and run_file(job.out).exists())
        if begun and not job.overwrite:
            before = check_run(run_file(job.out), job.out, fingerprint)
        return {"done": output.done, "before": before}

    try:
        found = from_first(open_first)
    except (ValueError, OSError):
        for output in opened:
            output.close()
        raise
    return (opened[0] if opened else WrittenElsewhere(found["done"])), found["before"]


def _begin(job: Job, output: Output, fingerprint: Mapping[str, Any], capacity: int, plan: Plan) -> None:
    output.begin()
    write_run(run_file(job.out), fingerprint, capacity)
    for failure in plan.failures:
        output.write(failure_line(failure))


def _shown(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield from tqdm(lines, desc="checking", unit="line", leave=False, disable=progress_disabled())


def _run(
    job: Job,
    path: Path,
    rules: Rules,
    plan: Plan,
    capacity: int,
    output: Output,
    make_engine: Callable[..., Server],
) -> Outcome:
    params = load(path, job.dtype, mesh=job.mesh, max_positions=job.max_positions)
    with _memory_told(capacity):
        engine = make_engine(
            params,
            job.kv,
            slots=job.slots,
            # Of all lines, done or not, so that those of a job that goes on are computed in the same shapes.
            most_slots=plan.samples,
            capacity=capacity,
            window=job.window,
            prefill_tokens=job.prefill_tokens,
            chat_template=job.chat_template,
        )

    def answer(request: Request, event: Event) -> bytes:
        return result_line(request, event.completions, event.prompt_tokens, params, job.model)

    bad = len(plan.failures)
    progress = Progress(plan.lines, plan.done + bad, plan.failed + bad, engine.slots, is_first())
    requests = longest_first(_read_again(job.source, rules, plan), plan.tokens, LOOK_AHEAD * engine.slots)
    with contextlib.closing(progress), _memory_told(capacity, engine.slots), StopSignals() as stop:
        signal = Loop(engine, output, answer, progress).run(requests, stop)
    return _outcome(plan, progress.done, progress.failed, signal)


@contextlib.contextmanager
def _memory_told(capacity: int, slots: int | None = None) -> Iterator[None]:
    """Makes one line of the pages that XLA has to say when memory is full."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason, *_ = str(error).splitlines()
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise MemoryError(
            f"the device's memory is full with {slots or 'so many'} slots of {capacity} tokens; the same command goes "
            f"on with a smaller --slots: {reason}"
        ) from error


def _read_again(source: str, rules: Rules, plan: Plan) -> Iterator[Request]:
    """The requests to do, which the first pass found good."""
    for number, data in read_lines(source):
        if number not in plan.tokens:
            continue
        line = read_line(number, data)
        request = line if isinstance(line, Failure) else read_request(line, rules.defaults)
        if isinstance(request, Failure):
            raise ValueError(f"{source} was changed while it was read: line {number} is bad now")
        yield request


def _outcome(plan: Plan, done: int, failed: int, signal: int | None = None) -> Outcome:
    return Outcome(plan.lines, done, failed, plan.done, list_failures(plan.failures), signal)


def _fingerprint(job: Job, path: Path, defaults: GenerationSettings) -> dict[str, Any]:
    """What results depend on. They don't on slots, capacity and window."""
    return {
        "model": job.model,
        "weights": model_identity(path),
        "dtype": job.dtype,
        "kv": job.kv,
        "prefill_tokens": job.prefill_tokens,
        "chat_template": job.chat_template,
        "input": job.source.rstrip("/").rpartition("/")[-1],
        **dataclasses.asdict(defaults),
        "stop": list(defaults.stops),  # as JSON has it
    }
