"""Measures a GPU: the decode kernel's correctness, its speed beside the best 16-bit attention, and generation.

    PYTHONPATH=. python scripts/gpu_benchmark.py --minutes 9
    PYTHONPATH=. python scripts/gpu_benchmark.py --parts throughput --minutes 9
    PYTHONPATH=. python scripts/gpu_benchmark.py --smoke --out /tmp/smoke

Needs a JAX with its GPU plugin, and no network; PyTorch takes part if it is installed. Results go to a JSON file of the
device's name under benchmarks/ as they come, and a page in Markdown is written from it. What that file has is not
measured again, so after a run that was cut off, or left something out for want of time, the same command goes on.
`--smoke` runs everything on a CPU, in tiny shapes and with XLA in place of the kernel.
"""

import dataclasses
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gpu_results import Results, this_run
from gpu_tables import page
from gpu_worker import SCRIPTS, Record, WorkerError, work

PARTS = ("correctness", "copy", "attention", "throughput")
BENCHMARKS = SCRIPTS.parent / "benchmarks"
BF16 = "bf16"
LARGEST, COMMON = "largest", "common"  # batches: of each kv, and the one that bf16 fits at most
RETRIES = 3  # of a batch that ran out of memory, each with fewer rows
FEWER = 0.96
STARTING = 30  # seconds that a worker needs to do anything at all
TRY_SECONDS = 300  # most of one that generates


Shape = tuple[int, int, int]  # query heads, KV heads, head_dim
Sizes = tuple[tuple[int, int], ...]  # rows and tokens of attention, or tokens of prompts and new ones


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is measured before anything of the next stage.

    Attributes:
        grid: of correctness, one of `gpu_correctness.GRIDS`.
        attention: shapes, the most important first, and how many rows and tokens each is timed with.
        kvs: what is generated with, bf16 first.
        loads: tokens of prompts, and new ones.
    """

    grid: str
    attention: tuple[tuple[Shape, Sizes], ...]
    kvs: tuple[str, ...]
    loads: Sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prefix: of the files' names.
        kernel: the implementation of decode attention that is measured.
        stages: the most important first.
        small: whether the model is the small one.
        copy_bytes: of the copy.
        most_caches: that attention goes around; each is one more attention in a program.
        kvs: bits and residual length by name.
        limit: bytes that generation may use, None for the device's.
        torch_device: where PyTorch computes.
        environment: of all workers.
        generation: of those that generate.
    """

    prefix: str
    kernel: str
    stages: tuple[Stage, ...]
    small: bool
    copy_bytes: int
    most_caches: int
    kvs: Mapping[str, tuple[int, int]]
    limit: int | None
    torch_device: str
    environment: Mapping[str, str]
    generation: Mapping[str, str]


KVS = {
    BF16: (16, 128),
    "kivi2 R=32": (2, 32),
    "kivi4 R=32": (4, 32),
    "kivi2 R=128": (2, 128),
    "kivi4 R=128": (4, 128),
}
GROUPED, MULTI_HEAD, MULTI_QUERY = (32, 8, 128), (32, 32, 128), (71, 1, 64)
LONG: Sizes = ((16, 32768), (1, 32768), (64, 4096))
SHORT: Sizes = tuple((rows, tokens) for tokens in (4096, 2048, 1024, 512) for rows in (1, 16))
FULL = Plan(
    prefix="gpu",
    kernel="pallas_gpu",
    stages=(
        Stage(
            "first",
            ((GROUPED, LONG), (MULTI_HEAD, LONG[-1:]), (MULTI_QUERY, LONG[:1])),
            (BF16, "kivi2 R=32"),
            ((161, 338),),
        ),
        Stage(
            "whole",
            tuple((shape, (*SHORT, *LONG, (1, 131072))) for shape in (GROUPED, MULTI_HEAD, MULTI_QUERY)),
            tuple(KVS),
            ((161, 338), (4096, 256)),
        ),
    ),
    small=False,
    copy_bytes=2 * 2**30,
    most_caches=32,  # as many as a model has layers
    kvs=KVS,
    limit=None,
    torch_device="cuda",
    # So that workers' figures are what they use, and PyTorch has memory where JAX has had it.
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    # One piece has no gaps; the rest is for what is not in the allocator's hands.
    generation={"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"},
)
SMOKE = Plan(
    prefix="smoke",
    kernel="xla",
    stages=(
        Stage("small", (((4, 2, 64), ((1, 256),)),), (BF16, "kivi2 R=32"), ((40, 24),)),
        Stage("small", (((4, 2, 64), ((2, 160),)),), (), ()),
    ),
    small=True,
    copy_bytes=2**20,
    most_caches=2,
    kvs=KVS,
    limit=40_000_000,
    torch_device="cpu",
    environment={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
    generation={},
)


@dataclasses.dataclass
class Benchmark:
    """A run of a plan."""

    plan: Plan
    results: Results
    again: bool
    threads: int
    skip: list[str]
    deadline: float
    compilations: str

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def work(self, script: str, job: Mapping[str, Any], generation: bool = False) -> Iterator[Record]:
        seconds = max(min(self.left, TRY_SECONDS) if generation else self.left, 1)
        yield from work(script, job, seconds, environment(self.plan, generation, self.compilations))

    def measured(self, part: str, **fields: Any) -> list[Record]:
        """What need not be measured: with `again` only what this run has."""
        if self.again:
            fields["run"] = len(self.results.runs) - 1
        return list(self.results.succeeded(part, **fields))

    def due(self, what: str, part: str, **fields: Any) -> bool:
        """Whether something is to be measured: not if it was, or if there is no time for it, which is said."""
        if self.measured(part, **fields):
            return False
        if self.left < STARTING:
            say(f"{what}: left out, no time")
            return False
        say(f"{what} …")
        return True

    def correctness(self, stage: Stage) -> None:
        done = [record["case"] for record in self.measured("correctness")]
        if self.left < STARTING:
            say("correctness: left out, no time")
            return
        say(f"correctness, {stage.grid} grid …")
        job = {"kernel": self.plan.kernel, "grid": stage.grid, "threads": self.threads, "skip": done}
        self.collect("gpu_correctness.py", job)

    def copy(self, stage: Stage) -> None:
        if self.due("copy", "copy"):
            self.collect("gpu_device.py", {"copy_bytes": self.plan.copy_bytes})

    def attention(self, stage: Stage) -> None:
        for shape, sizes in stage.attention:
            self.jax_attention(shape, sizes)
            self.torch_attention(shape, sizes)

    def jax_attention(self, shape: Shape, sizes: Sizes) -> None:
        cases = self.due_sizes(shape, sizes, torch=False)
        if cases:
            job = {
                "shape": shape,
                "cases": cases,
                "kernel": self.plan.kernel,
                "most_caches": self.plan.most_caches,
                "threads": self.threads,
                "seconds": max(self.left - STARTING, 0),
                "skip": self.skip,
            }
            self.collect("gpu_attention.py", job)

    def torch_attention(self, shape: Shape, sizes: Sizes) -> None:
        if importlib.util.find_spec("torch") is None:
            say("PyTorch is not installed and takes no part")
            return
        cases = self.due_sizes(shape, sizes, torch=True)
        if cases:
            job = {
                "shape": shape,
                "cases": cases,
                "device": self.plan.torch_device,
                "most_caches": self.plan.most_caches,
                "skip": self.skip,
            }
            self.collect("gpu_torch.py", job)

    def due_sizes(self, shape: Shape, sizes: Sizes, torch: bool) -> list[tuple[int, int]]:
        """Those that are due. Times of one come together, but were for nothing if the kernel failed."""
        if self.left < STARTING:
            say(f"attention {shape}: left out, no time")
            return []
        measured = {
            (record["batch"], record["tokens"])
            for record in self.measured("attention", shape=list(shape))
            if ("torch" in record["contestant"] if torch else record["contestant"].endswith("kernel"))
        }
        cases = [size for size in sizes if size not in measured]
        if cases:
            say(f"attention {shape}{' in PyTorch' if torch else ''}: {len(cases)} cases …")
        return cases

    def throughput(self, stage: Stage) -> None:
        for load in stage.loads:
            for kv in stage.kvs:
                self.generation(load, kv, LARGEST, batch=None)
            for kv in stage.kvs:
                if kv != BF16:
                    self.common_batch(load, kv)

    def common_batch(self, load: tuple[int, int], kv: str) -> None:
        prompt, new = load
        exact = next(
            self.results.succeeded("throughput", prompt=prompt, new=new, kv=BF16, role=LARGEST), None
        )
        if exact is None:
            say(f"{load}: bf16's largest batch is not known")
            return
        self.generation(load, kv, COMMON, batch=exact["batch"])

    def generation(self, load: tuple[int, int], kv: str, role: str, batch: int | None) -> None:
        """Tries fewer rows if there was too little memory for as many as ought to fit."""
        fields = {"prompt": load[0], "new": load[1], "kv": kv, "role": role}
        if not self.due(f"{load[0]} + {load[1]} tokens, {kv}, {role} batch", "throughput", **fields):
            return
        bits, residual = self.plan.kvs[kv]
        job = {
            "bits": bits,
            "residual_length": residual,
            "prompt": load[0],
            "new": load[1],
            "small": self.plan.small,
            "limit": self.plan.limit,
        }
        too_many: list[int] = []
        for _ in range(1 + RETRIES):
            record = self.collect(
                "gpu_throughput.py", job | {"batch": batch}, fields, {"too_many": [*too_many]}
            )
            if record is None or "out_of_memory" not in record or role == COMMON:
                return
            too_many.append(record["batch"])
            batch = int(FEWER * record["batch"])

    def collect(
        self,
        script: str,
        job: Mapping[str, Any],
        generated: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Record | None:
        """Adds a worker's records to the results and returns the last. `generated` is what a try of generation is of,
        whose failure is a result too.
        """
        record = None
        try:
            for record in self.work(script, job, generation=generated is not None):
                if generated is not None:
                    record = {"part": "throughput", **generated, **record, **(more or {})}
                if "part" in record:
                    self.results.add(record)
        except WorkerError as error:
            say(str(error))
            if generated is not None:
                self.results.add({"part": "throughput", **generated, "error": str(error)})
        return record


def environment(plan: Plan, generation: bool, compilations: str) -> dict[str, str]:
    """Of a worker; what the caller has set stays."""
    wanted = {**plan.environment}
    if generation:
        # Tries share what they compile, and what XLA tuned.
        wanted |= {**plan.generation, "JAX_COMPILATION_CACHE_DIR": compilations}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def say(text: str) -> None:
    print(text, flush=True)


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
    (device,) = work("gpu_device.py", {"copy_bytes": None}, 60 * minutes, environment(plan, False, ""))
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
