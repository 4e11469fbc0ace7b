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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prefix: of the files' names.
        kernel: the implementation of decode attention that is measured.
        small: whether the correctness grid and the model are the small ones.
        copy_bytes: of the copy.
        shapes: query heads, KV heads and head_dim.
        cases: rows and tokens of attention, the most important first.
        most_caches: that attention goes around; each is one more attention in a program.
        kvs: what is generated with: bits and residual length by name, bf16 and then the most important first.
        loads: tokens of prompts, and new ones.
        limit: bytes that generation may use, None for the device's.
        torch_device: where PyTorch computes.
        environment: of all workers.
        generation: of those that generate.
    """

    prefix: str
    kernel: str
    small: bool
    copy_bytes: int
    shapes: tuple[tuple[int, int, int], ...]
    cases: tuple[tuple[int, int], ...]
    most_caches: int
    kvs: Mapping[str, tuple[int, int]]
    loads: tuple[tuple[int, int], ...]
    limit: int | None
    torch_device: str
    environment: Mapping[str, str]
    generation: Mapping[str, str]


FULL = Plan(
    prefix="gpu",
    kernel="pallas_gpu",
    small=False,
    copy_bytes=2 * 2**30,
    shapes=((32, 8, 128), (32, 32, 128), (71, 1, 64)),
    cases=(
        *((16, 32768), (1, 32768), (16, 4096), (64, 4096), (1, 4096), (1, 131072)),
        *((rows, tokens) for rows in (1, 16) for tokens in (512, 1024, 2048)),
    ),
    most_caches=32,  # as many as a model has layers
    kvs={
        BF16: (16, 128),
        "kivi2 R=32": (2, 32),
        "kivi4 R=32": (4, 32),
        "kivi2 R=128": (2, 128),
        "kivi4 R=128": (4, 128),
    },
    loads=((161, 338), (4096, 256)),
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
    small=True,
    copy_bytes=2**20,
    shapes=((4, 2, 64),),
    cases=((1, 256), (2, 160)),
    most_caches=2,
    kvs={BF16: (16, 128), "kivi2 R=32": (2, 32)},
    loads=((40, 24),),
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

    def due(self, what: str, part: str, **fields: Any) -> bool:
        """Whether something is to be measured: not if it was, or if there is no time for it, which is said."""
        if not self.again and any(self.results.succeeded(part, **fields)):
            return False
        if self.left < STARTING:
            say(f"{what}: left out, no time")
            return False
        say(f"{what} …")
        return True

    def correctness(self) -> None:
        plan = self.plan
        done = [] if self.again else [record["case"] for record in self.results.succeeded("correctness")]
        if self.left < STARTING:
            say("correctness: left out, no time")
            return
        say("correctness …")
        job = {"kernel": plan.kernel, "small": plan.small, "threads": self.threads, "skip": done}
        self.collect("gpu_correctness.py", job)

    def copy(self) -> None:
        if self.due("copy", "copy"):
            self.collect("gpu_device.py", {"copy_bytes": self.plan.copy_bytes})

    def attention(self) -> None:
        for shape in self.plan.shapes:
            self.jax_attention(shape)
            self.torch_attention(shape)

    def jax_attention(self, shape: tuple[int, int, int]) -> None:
        cases = self.attention_cases(shape, torch=False)
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

    def torch_attention(self, shape: tuple[int, int, int]) -> None:
        if importlib.util.find_spec("torch") is None:
            say("PyTorch is not installed and takes no part")
            return
        cases = self.attention_cases(shape, torch=True)
        if cases:
            job = {
                "shape": shape,
                "cases": cases,
                "device": self.plan.torch_device,
                "most_caches": self.plan.most_caches,
                "skip": self.skip,
            }
            self.collect("gpu_torch.py", job)

    def attention_cases(self, shape: tuple[int, int, int], torch: bool) -> list[tuple[int, int]]:
        """Those that are due. A case's times come together, but it was for nothing if the kernel failed."""
        if self.left < STARTING:
            say(f"attention {shape}: left out, no time")
            return []
        measured = {
            (record["batch"], record["tokens"])
            for record in self.results.succeeded("attention", shape=list(shape))
            if ("torch" in record["contestant"] if torch else record["contestant"].endswith("kernel"))
        }
        cases = [case for case in self.plan.cases if self.again or case not in measured]
        if cases:
            say(f"attention {shape}{' in PyTorch' if torch else ''}: {len(cases)} cases …")
        return cases

    def throughput(self) -> None:
        names = list(self.plan.kvs)
        for kvs in (names[:2], names[2:]):
            for load in self.plan.loads:
                for kv in kvs:
                    self.generation(load, kv, LARGEST, batch=None)
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
        for part in PARTS:
            if part in chosen:
                getattr(benchmark, part)()
                render(results.path)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
