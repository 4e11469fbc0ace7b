"""Evaluations as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence

from kivi_jax.evaluation.tasks import Metrics
from kivi_jax.evaluation.text_quality import BASELINE, Summary


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is of text, the others are of numbers."""
    lines = [columns, [":--", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(results: Mapping[str, Sequence[Summary]], bits: Mapping[str, float]) -> str:
    """A row for each cache, with its `bits` per value, and below it one for each range of positions."""
    rows = []
    for name, summaries in results.items():
        for number, found in enumerate(summaries):
            label = name if number == 0 else f"{name}, positions {found.first:,}–{found.last:,}"
            rows.append(
                (
                    label,
                    f"{bits[name]:.2f}",
                    f"{found.from_codes:.0%}",
                    f"{found.loss:.4f}",
                    f"{found.perplexity:.2f}",
                    f"{found.divergence:.4f}",
                    f"{found.agreement:.1%}",
                )
            )
    return table(
        ("kv", "bits", "from codes", "loss", "perplexity", f"KL from {BASELINE}", "same token"), rows
    )


def needle_table(results: Mapping[str, Mapping[int, Mapping[float, int]]], each: int) -> str:
    """How many of the needles each cache found, at every length, over all depths and at each of these."""
    rows = []
    for name, lengths in results.items():
        for length, depths in lengths.items():
            rows.append(
                (
                    f"{name}, {length:,} tokens",
                    f"{sum(depths.values())} of {len(depths) * each}",
                    *(f"{count} of {each}" for count in depths.values()),
                )
            )
    depths = next(iter(next(iter(results.values())).values()))
    return table(("kv", "found", *(f"at {depth:.0%}" for depth in depths)), rows)


def task_table(results: Mapping[str, Metrics]) -> str:
    """The harness's metrics by task and name, side by side, and how far each cache is from the first one."""
    names = list(results)
    columns = ["task", "samples", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    rows = []
    for key, first in results[names[0]].items():
        found = [results[name][key] for name in names]
        rows.append(
            (
                ", ".join(key),
                str(first.samples),
                *(
                    f"{metric.value:.4f}" + ("" if metric.error is None else f" ± {metric.error:.4f}")
                    for metric in found
                ),
                *(f"{metric.value - first.value:+.4f}" for metric in found[1:]),
            )
        )
    return table(columns, rows)
