"""The page of a device's measurements, and what follows from them: written from the records alone."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu.plan import KINDS
from benchmarks.gpu.results import Results
from benchmarks.gpu.worker import Record
from tools.report_page import table

GIB = 2**30


def page(results: Results) -> str:
    sections = (
        runs_section,
        correctness_section,
        copy_section,
        attention_section,
        chunks_section,
        throughput_section,
    )
    lines = [f"# {results.device}", ""]
    for section in sections:
        lines += section(results)
    lines += ["Written by `python -m benchmarks.gpu --render` from the JSON beside it.", ""]
    return "\n".join(lines)


def runs_section(results: Results) -> Iterator[str]:
    measured = {record["run"] for record in results.records}
    yield from table(
        "run|date|commit|python|packages|GPU, driver, memory|command",
        (
            [
                str(number),
                run["date"],
                run["commit"][:12] + ("+changes" if run["commit"].endswith("+changes") else ""),
                run["python"],
                ", ".join(f"{name} {version}" for name, version in run["packages"].items()),
                ", ".join(filter(None, [run["driver"], run["backend"]])),
                f"`{run['command']}`",
            ]
            for number, run in enumerate(results.runs)
            if number in measured
        ),
    )
    yield ""


def correctness_section(results: Results) -> Iterator[str]:
    records = results.of("correctness")
    if not records:
        return
    checked = list(results.succeeded("correctness"))
    yield "## Correctness"
    yield ""
    passed = sum(record["passed"] for record in checked)
    worst = max((record["worst"] for record in checked), default=0.0)
    yield (
        f"{passed} of {len(records)} cases are within 1e-5 of a float64 softmax (normalised mean squared error of "
        f"every row); the worst row has {worst:.1e}."
    )
    yield ""
    yield from table(
        "case|worst row|its tokens|within",
        (
            [record["case"], "", "", record["error"]]
            if "error" in record
            else [
                record["case"],
                f"{record['worst']:.1e}",
                max(record["nmse"], key=record["nmse"].__getitem__),
                "yes" if record["passed"] else "no",
            ]
            for record in records
        ),
    )
    yield ""


def copy_section(results: Results) -> Iterator[str]:
    for record in results.succeeded("copy"):
        yield "## Memory bandwidth"
        yield ""
        yield (
            f"{record['bytes_per_second'] / 1e9:.0f} GB/s, read and written bytes together, of a copy of "
            f"{record['bytes'] / GIB:.2g} GiB."
        )
        yield ""


# Query heads, KV heads, head_dim; rows; tokens.
Key = tuple[tuple[int, ...], int, int]


def attention_times(results: Results) -> dict[Key, dict[str, Record]]:
    """Records by case and contestant, failures included."""
    cases: dict[Key, dict[str, Record]] = {}
    for record in results.of("attention"):
        key = tuple(record["shape"]), record["batch"], record["tokens"]
        cases.setdefault(key, {})[record["contestant"]] = record
    return dict(sorted(cases.items()))


def best_bf16(case: dict[str, Record]) -> Record | None:
    """The fastest contestant over an unquantized cache."""
    timed = [record for name, record in case.items() if name.startswith("bf16") and "milliseconds" in record]
    return min(timed, key=lambda record: record["milliseconds"], default=None)


def wins_from(
    results: Results, kind: str, rival: Callable[[dict[str, Record]], Record | None]
) -> dict[tuple[tuple[int, ...], int], int | None]:
    """For every shape and batch where they met, the least measured number of tokens from which on the kernel is the
    faster one, None if it is not at the most.
    """
    found: dict[tuple[tuple[int, ...], int], int | None] = {}
    for key, keys in itertools.groupby(attention_times(results).items(), lambda item: item[0][:2]):
        for (_, _, tokens), case in reversed(list(keys)):
            kernel, other = case.get(f"{kind} kernel", {}), rival(case) or {}
            if "milliseconds" not in kernel or "milliseconds" not in other:
                continue
            if kernel["milliseconds"] > other["milliseconds"]:
                found.setdefault(key, None)
                break
            found[key] = tokens
    return found


def attention_section(results: Results) -> Iterator[str]:
    cases = attention_times(results)
    if not cases:
        return
    bandwidth = next((record["bytes_per_second"] for record in results.succeeded("copy")), None)
    kinds = [kind for kind in KINDS if any(f"{kind} kernel" in case for case in cases.values())]
    yield "## Decode attention"
    yield ""
    yield (
        "One token in each of `rows` rows over `tokens` stored ones. GB/s are of the cache's bytes, of a quantized one "
        "those that are packed; × is how many times faster than the best bf16 it is."
    )
    yield ""
    columns = "".join(f"|{kind}: ms|GB/s|of a copy|×" for kind in kinds)
    header = f"heads|rows|tokens|best bf16|ms|GB/s{columns}"
    yield from table(header, _attention_rows(cases, kinds, bandwidth))
    yield ""
    yield "### Where the kernel wins"
    yield ""
    yield "The least measured number of tokens from which on it is the faster one."
    yield ""
    columns = "".join(f"|{kind}: than XLA on the same codes|than the best bf16" for kind in kinds)
    winning = [
        wins_from(results, kind, rival)
        for kind in kinds
        for rival in (lambda case, kind=kind: case.get(f"{kind} xla"), best_bf16)
    ]
    yield from table(
        f"heads|rows{columns}",
        (
            [
                _heads(key[0]),
                str(key[1]),
                *(str(found.get(key, "")).replace("None", "never") for found in winning),
            ]
            for key in dict.fromkeys(case[:2] for case in cases)
        ),
    )
    yield ""
    yield "### All contestants"
    yield ""
    yield "Milliseconds; – where it failed."
    yield ""
    for shape, keys in itertools.groupby(cases, lambda key: key[0]):
        yield from _contestants_table(shape, {key: cases[key] for key in keys})


def _attention_rows(
    cases: dict[Key, dict[str, Record]], kinds: Sequence[str], bandwidth: float | None
) -> Iterator[list[str]]:
    for (shape, batch, tokens), case in cases.items():
        best = best_bf16(case)
        row = [_heads(shape), str(batch), str(tokens)]
        row += (
            ["", "", ""]
            if best is None
            else [best["contestant"].removeprefix("bf16 "), *_time_and_rate(best)]
        )
        for kind in kinds:
            record = case.get(f"{kind} kernel")
            if record is None or "error" in record:
                row += ["–" if record else "", "", "", ""]
                continue
            rate = 1e3 * record["bytes"] / record["milliseconds"]
            row += _time_and_rate(record)
            row.append(f"{rate / bandwidth:.0%}" if bandwidth else "")
            row.append(f"{best['milliseconds'] / record['milliseconds']:.2f}" if best else "")
        yield row


def _contestants_table(shape: Sequence[int], cases: dict[Key, dict[str, Record]]) -> Iterator[str]:
    names = sorted({name for case in cases.values() for name in case})
    ran = [name for name in names if any("milliseconds" in case.get(name, {}) for case in cases.values())]
    yield f"{_heads(shape)}:"
    yield ""
    yield from table(
        "contestant|" + "|".join(f"{batch} × {tokens}" for _, batch, tokens in cases),
        (
            [
                name,
                *(
                    f"{case[name]['milliseconds']:.4f}"
                    if "milliseconds" in case.get(name, {})
                    else "–" * (name in case)
                    for case in cases.values()
                ),
            ]
            for name in ran
        ),
    )
    yield ""
    failures: dict[str, list[str]] = {}
    for case in cases.values():
        for name, record in case.items():
            if "error" in record and name not in failures.setdefault(record["error"], []):
                failures[record["error"]].append(name)
    for error, failed in failures.items():
        yield f"- {', '.join(failed)}: {error}"
    if failures:
        yield ""


def _heads(shape: Sequence[int]) -> str:
    query_heads, kv_heads, head_dim = shape
    return f"{query_heads}/{kv_heads} × {head_dim}"


def _time_and_rate(record: Record) -> list[str]:
    rate = 1e3 * record["bytes"] / record["milliseconds"]
    return [f"{record['milliseconds']:.4f}", f"{rate / 1e9:.0f}"]


def chunks_section(results: Results) -> Iterator[str]:
    records = results.of("chunks")
    if not records:
        return
    yield "## Attention of chunks"
    yield ""
    yield "`new` tokens of one row over `stored` ones and each other."
    yield ""
    yield from table(
        "heads|new|stored|contestant|ms",
        (
            [
                _heads(record["shape"]),
                str(record["new"]),
                str(record["tokens"]),
                record["contestant"],
                record.get("error") or f"{record['milliseconds']:.3f}",
            ]
            for record in records
        ),
    )
    yield ""


def throughput_section(results: Results) -> Iterator[str]:
    records = results.of("throughput")
    if not records:
        return
    yield "## Generation"
    yield ""
    models = sorted({record["model"] for record in records if "model" in record})
    yield (
        f"Random bfloat16 weights of {', '.join(models)}. Tokens a second are generated ones by the time of prefill "
        "and decoding together; × is relative to bf16 at its own largest batch, which is also the common batch."
    )
    yield ""
    header = (
        "prompt + new|kv|batch|rows|prefill tokens/s|decode tokens/s|tokens/s|×|peak GiB|bf16's peak is ×"
    )
    yield from table(header, (_throughput_row(results, record) for record in sorted(records, key=_by_load)))
    yield ""


def _by_load(record: Record) -> tuple[Any, ...]:
    return record["prompt"], record["new"], record["role"] != "largest", record["kv"]


def _throughput_row(results: Results, record: Record) -> list[str]:
    load = {"prompt": record["prompt"], "new": record["new"]}
    row = [
        f"{record['prompt']} + {record['new']}",
        record["kv"],
        record["role"],
        str(record.get("batch", "")),
    ]
    if "error" in record:
        return [*row, record["error"]]
    # The common batch is bf16's largest.
    exact = next(results.succeeded("throughput", **load, kv="bf16", role="largest"), None)
    row += [f"{record[f'{phase}tokens_per_second']:.0f}" for phase in ("prefill_", "decode_", "")]
    row.append(f"{record['tokens_per_second'] / exact['tokens_per_second']:.2f}" if exact else "")
    peak = record["peak_bytes"]
    row.append(f"{peak / GIB:.1f}" if peak else "")
    compared = peak and exact and exact["peak_bytes"] and exact["batch"] == record["batch"]
    row.append(f"{exact['peak_bytes'] / peak:.2f}" if compared else "")
    return row
