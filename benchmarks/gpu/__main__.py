"""Measures a GPU: the decode kernel's correctness, its speed beside the best 16-bit attention, and generation.

    python -m benchmarks.gpu --minutes 9
    python -m benchmarks.gpu --parts throughput --minutes 9
    python -m benchmarks.gpu --smoke --out /tmp/smoke

Needs a JAX with its GPU plugin, and no network; PyTorch takes part if it is installed. Results go to a JSON file of the
device's name under benchmarks/ as they come, and a page in Markdown is written from it. What that file has is not
measured again, so after a run that was cut off, or left something out for want of time, the same command goes on.
`--smoke` runs everything on a CPU, in tiny shapes and with XLA in place of the kernel.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.benchmark import PARTS, Benchmark, environment
from benchmarks.gpu.plan import FULL, SMOKE
from benchmarks.gpu.results import Results, this_run
from benchmarks.gpu.tables import page
from benchmarks.gpu.worker import work

BENCHMARKS = Path(__file__).resolve().parents[1]


def render(path: Path) -> None:
    path.with_suffix(".md").write_text(page(Results.read(path)))


def main(
    parts: Annotated[str, typer.Option(help="which of them, with commas between")] = ",".join(PARTS),
    out: Annotated[Path, typer.Option(help="folder of the results")] = BENCHMARKS,
    minutes: Annotated[float, typer.Option(help="after which nothing more is begun, or goes on")] = 25,
    again: Annotated[bool, typer.Option(help="measure also what the file has already")] = False,
    skip: Annotated[
        str,
        typer.Option(
            help="words, with commas between; attention's contestants with one of them in their names take no part"
        ),
    ] = "",
    threads: Annotated[int, typer.Option(help="that compile at the same time")] = os.cpu_count() or 1,
    commit: Annotated[str | None, typer.Option(help="of the checkout, where git can't tell")] = None,
    only_render: Annotated[
        bool, typer.Option("--render", help="write pages anew and measure nothing")
    ] = False,
    smoke: Annotated[bool, typer.Option(help="tiny shapes on a CPU")] = False,
) -> None:
    if only_render:
        for path in sorted(out.glob("*.json")):
            render(path)
        return
    chosen = parts.split(",")
    if not set(chosen) <= set(PARTS):
        raise typer.BadParameter(f"--parts are of {', '.join(PARTS)}, got {parts}")
    deadline = time.monotonic() + 60 * minutes
    plan = SMOKE if smoke else FULL
    (device,) = work("device", {"copy_bytes": None}, 60 * minutes, environment(plan, False, ""))
    if device["platform"] != "gpu" and not smoke:
        raise SystemExit(f"{device['device']} is no GPU; --smoke runs without one")
    results = Results.begin(out, plan.prefix, device["device"], this_run(device["backend"], commit))
    with tempfile.TemporaryDirectory() as compilations:
        benchmark = Benchmark(
            plan, results, again, threads, [word for word in skip.split(",") if word], deadline, compilations
        )
        for stage in plan.stages:
            for part in PARTS:
                if part in chosen:
                    getattr(benchmark, part)(stage)
                    render(results.path)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
