"""`kivi-jax eval`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import kivi_jax
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import DType, MaxPositions, Model, Revision
from kivi_jax.evaluation.needle import MAX_NEW_TOKENS, find_needles, make_cases
from kivi_jax.evaluation.report import needle_table, task_table, text_table
from kivi_jax.evaluation.tasks import Tasks
from kivi_jax.evaluation.text_quality import BASELINE, compare, cut_windows, summarize
from kivi_jax.kv import PRESETS
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.progress import progress_disabled
from kivi_jax.text import encode

DEFAULT_KVS = (BASELINE, "kivi4", "kivi-k4v2", "kivi2-sinks", "kivi2")


def evaluate(
    texts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TEXT…", help="Files of UTF-8 text to predict, and to hide needles in."),
    ] = None,
    model: Model = "demo",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Caches side by side, once for each or with commas: {', '.join(PRESETS)}. "
            f"By default {','.join(DEFAULT_KVS)}."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of a window, prefilled; the others are predicted through the cache.")
    ] = 64,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Most windows; by default all there are.")
    ] = None,
    ranges: Annotated[
        list[int] | None, typer.Option("--from", help="Also by positions: a first one of each range.")
    ] = None,
    needle: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of prompts that hide a number in the texts.")
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Places of the number, evenly spread.")] = 5,
    each: Annotated[int, typer.Option(min=1, help="Prompts for each length and depth.")] = 4,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-evaluation-harness, or a YAML file of one (needs kivi-jax[eval])."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples of a task.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask a task's questions through the model's chat template.")
    ] = False,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers of tasks that are generated at a time.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    dtype: DType = "bfloat16",
    max_positions: MaxPositions = None,
    revision: Revision = None,
) -> None:
    """Measures what caches cost a model: on texts, on needles in them, and on tasks, each read from the cache."""
    with one_line_errors():
        if not texts and not task:
            raise ValueError("name files of text, or tasks")
        if needle and not texts:
            raise ValueError("--needle hides numbers in texts; name files of text")
        if prompt_tokens >= length:
            raise ValueError(f"--prompt-tokens {prompt_tokens} leave nothing to predict of {length}")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} for --json {out}")
        text = "\n\n".join(map(_read, texts or []))
        tasks = Tasks(task) if task else None
        params = kivi_jax.load(model, dtype, revision=revision, max_positions=max_positions)
        positions = params.config.max_positions
        if texts and length > positions:
            raise ValueError(f"--length {length} exceeds the model's {positions} positions")
        if needle and max(needle) > positions - MAX_NEW_TOKENS:
            raise ValueError(
                f"--needle {max(needle)} and an answer of {MAX_NEW_TOKENS} tokens exceed the model's {positions} "
                f"positions"
            )
        names = [name for given in kv or DEFAULT_KVS for name in given.split(",")]
        layers = params.config.num_layers
        configs = {name: resolve_kv(name, params.config.head_dim, layers) for name in names}
        report: dict[str, Any] = {"model": model, "dtype": dtype}
        if texts:
            report["text"] = _measure_text(
                params, text, configs, length, prompt_tokens, windows, ranges or []
            )
        if needle:
            report["needle"] = _measure_needles(params, text, configs, needle, depths, each)
        if tasks is not None:
            results = dict(tasks.measure(params, configs, limit, chat, slots))
            print(task_table(results), end="\n\n")
            report["tasks"] = {
                name: {", ".join(key): value for key, value in metrics.items()}
                for name, metrics in results.items()
            }
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def _measure_text(
    params: kivi_jax.Params,
    text: str,
    configs: dict[str, KVConfig],
    length: int,
    prompt_tokens: int,
    windows: int | None,
    ranges: list[int],
) -> dict[str, Any]:
    (ids,) = encode(params, [text])
    cut = cut_windows(ids, length, windows)
    found: dict[str, list[Any]] = {name: [] for name in configs}
    with tqdm(total=len(cut), desc="predicting", leave=False, disable=progress_disabled()) as progress:
        for comparisons in compare(params, cut, prompt_tokens, list(configs.values())):
            for name, comparison in zip(configs, comparisons, strict=True):
                found[name].append(comparison)
            progress.update(len(comparisons[0].loss))
    results = {
        name: summarize(parts, configs[name], params.config.num_layers, prompt_tokens, ranges)
        for name, parts in found.items()
    }
    predicted = len(cut) * (length - prompt_tokens)
    print(
        f"{predicted:,} tokens in {len(cut)} windows of {length}, the first {prompt_tokens} of each prefilled\n"
    )
    print(text_table(results, configs), end="\n\n")
    return {name: [dataclasses.asdict(summary) for summary in of] for name, of in results.items()}


def _measure_needles(
    params: kivi_jax.Params,
    text: str,
    configs: dict[str, KVConfig],
    lengths: list[int],
    depths: int,
    each: int,
) -> dict[str, Any]:
    places = [place / max(depths - 1, 1) for place in range(depths)]
    cases = make_cases(params, text, lengths, places, each)
    results: dict[str, dict[int, dict[float, float]]] = {}
    with tqdm(
        total=len(cases) * len(configs), desc="searching", leave=False, disable=progress_disabled()
    ) as progress:
        for name, config in configs.items():
            found = {length: dict.fromkeys(places, 0.0) for length in lengths}
            for case, hit in find_needles(params, cases, config):
                found[case.length][case.depth] += hit / each
                progress.update()
            results[name] = found
    print(f"{len(cases)} needles\n")
    print(needle_table(results), end="\n\n")
    return results
