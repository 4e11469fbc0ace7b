"""`kivi-jax eval`."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Int
from tqdm import tqdm

import kivi_jax
from kivi_jax.cli.errors import one_line_errors
from kivi_jax.cli.options import DType, MaxPositions, Model, Revision
from kivi_jax.evaluation.needle import MAX_NEW_TOKENS, Case, find_needles, make_cases
from kivi_jax.evaluation.report import needle_table, task_table, text_table
from kivi_jax.evaluation.tasks import Tasks
from kivi_jax.evaluation.text_quality import BASELINE, Comparison, compare, summarize, windows_of_text
from kivi_jax.kv import PRESETS
from kivi_jax.kv.config import KVConfig, find_kv, resolve_kv
from kivi_jax.progress import progress_disabled

DEFAULT_KVS = (BASELINE, "kivi4", "kivi-k4v2", "kivi2-plus", "kivi2-sinks", "kivi2")


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
    """Measures what caches cost a model: on texts, on needles in them, and on tasks, each read from the cache.

    Example: kivi-jax eval book.txt --model org/name --kv bf16,kivi4,kivi2 --needle 4096
    """
    with one_line_errors():
        if not texts and not task:
            raise ValueError("name files of text, or tasks")
        if needle and not texts:
            raise ValueError("--needle hides numbers in texts; name files of text")
        if (limit or chat or slots) and not task:
            raise ValueError("--limit, --chat and --slots are for tasks; name some by --task")
        if prompt_tokens >= length:
            raise ValueError(f"--prompt-tokens {prompt_tokens} leave nothing to predict of {length}")
        if outside := [start for start in ranges or [] if not prompt_tokens < start < length]:
            raise ValueError(f"--from must be between {prompt_tokens} and {length}, got {outside[0]}")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} for --json {out}")
        names = [name for given in kv or DEFAULT_KVS for name in given.split(",")]
        for name in names:
            find_kv(name)
        text = "\n\n".join(map(_read, texts or []))
        tasks = Tasks(task) if task else None
        params = kivi_jax.load(model, dtype, revision=revision, max_positions=max_positions)
        configs = _resolve(params, names, may_leave_out=kv is None)
        # Whatever can be wrong is found before anything is measured.
        cut = windows_of_text(params, text, length, windows) if texts and windows != 0 else None
        cases = _hide(params, text, list(dict.fromkeys(needle)), depths, each) if needle else []
        if tasks is not None:
            tasks.check(params, chat)
        report: dict[str, Any] = {"model": model, "dtype": dtype}
        if cut is not None:
            report["text"] = _measure_text(params, cut, configs, prompt_tokens, ranges or [])
            _write(out, report)
        if cases:
            report["needle"] = _measure_needles(params, cases, configs, each)
            _write(out, report)
        if tasks is not None:
            results = dict(tasks.measure(params, configs, limit, chat, slots))
            print(task_table(results), end="\n\n")
            report["tasks"] = {
                name: {", ".join(key): dataclasses.asdict(metric) for key, metric in metrics.items()}
                for name, metrics in results.items()
            }
            _write(out, report)


def _resolve(params: kivi_jax.Params, names: list[str], may_leave_out: bool) -> dict[str, KVConfig]:
    """The caches by name, perhaps but for those that don't fit the model."""
    configs = {}
    for name in names:
        try:
            configs[name] = resolve_kv(name, params.config.head_dim, params.config.num_layers)
        except ValueError:
            if not may_leave_out:
                raise
    return configs


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def _write(out: Path | None, report: dict[str, Any]) -> None:
    """After every part, so that none is lost by what comes after it."""
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _hide(params: kivi_jax.Params, text: str, lengths: list[int], depths: int, each: int) -> list[Case]:
    positions = params.config.max_positions
    if max(lengths) > positions - MAX_NEW_TOKENS:
        raise ValueError(
            f"--needle {max(lengths)} and an answer of {MAX_NEW_TOKENS} tokens exceed the model's {positions} positions"
        )
    return make_cases(params, text, lengths, [place / max(depths - 1, 1) for place in range(depths)], each)


def _measure_text(
    params: kivi_jax.Params,
    windows: Int[np.ndarray, "windows T"],
    configs: dict[str, KVConfig],
    prompt_tokens: int,
    ranges: list[int],
) -> dict[str, Any]:
    found: dict[str, list[Comparison]] = {name: [] for name in configs}
    with tqdm(total=len(windows), desc="predicting", leave=False, disable=progress_disabled()) as progress:
        for comparisons in compare(params, windows, prompt_tokens, list(configs.values())):
            for name, comparison in zip(configs, comparisons, strict=True):
                found[name].append(comparison)
            progress.update(len(comparisons[0].loss))
    results = {
        name: summarize(parts, configs[name], params.config.sliding_windows, prompt_tokens, ranges)
        for name, parts in found.items()
    }
    count, length = windows.shape
    print(
        f"{count * (length - prompt_tokens):,} tokens in {count} windows of {length}, "
        f"the first {prompt_tokens} of each prefilled\n"
    )
    layers = params.config.num_layers
    bits = {
        name: statistics.mean(layer.bits_per_value() for layer in config.of_layers(layers))
        for name, config in configs.items()
    }
    print(text_table(results, bits), end="\n\n")
    caches = {
        name: {
            "bits": bits[name],
            "positions": [
                dataclasses.asdict(summary) | {"perplexity": summary.perplexity} for summary in summaries
            ],
        }
        for name, summaries in results.items()
    }
    return {"windows": count, "length": length, "prompt_tokens": prompt_tokens, "kv": caches}


def _measure_needles(
    params: kivi_jax.Params, cases: list[Case], configs: dict[str, KVConfig], each: int
) -> dict[str, Any]:
    results: dict[str, dict[int, dict[float, int]]] = {name: {} for name in configs}
    with tqdm(total=len(cases), desc="searching", leave=False, disable=progress_disabled()) as progress:
        for case, hits in find_needles(params, cases, list(configs.values())):
            for found, hit in zip(results.values(), hits, strict=True):
                at = found.setdefault(case.length, {})
                at[case.depth] = at.get(case.depth, 0) + hit
            progress.update()
    print(f"{len(cases)} needles\n")
    print(needle_table(results, each), end="\n\n")
    return {"each": each, "found": results}
