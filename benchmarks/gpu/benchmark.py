"""A run of a plan: measures what its results do not have yet, as far as time allows."""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.plan import BF16, Plan, Shape, Sizes, Stage
from benchmarks.gpu.results import Results
from benchmarks.gpu.worker import Record, WorkerError, work

PARTS = ("correctness", "copy", "attention", "chunks", "throughput")
LARGEST, COMMON = "largest", "common"  # batches: of each kv, and the one that bf16 fits at most
RETRIES = 3  # of a batch that ran out of memory, each with fewer rows
FEWER = 0.96
STARTING = 30  # seconds that a worker needs to do anything at all
TRY_SECONDS = 300  # most of one that generates


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

    def work(self, measurement: str, job: Mapping[str, Any], generation: bool = False) -> Iterator[Record]:
        seconds = max(min(self.left, TRY_SECONDS) if generation else self.left, 1)
        yield from work(measurement, job, seconds, environment(self.plan, generation, self.compilations))

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
        self.collect("correctness", job)

    def copy(self, stage: Stage) -> None:
        if self.due("copy", "copy"):
            self.collect("device", {"copy_bytes": self.plan.copy_bytes})

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
            self.collect("attention", job)

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
            self.collect("pytorch", job)

    def due_sizes(self, shape: Shape, sizes: Sizes, torch: bool) -> list[tuple[int, int]]:
        """The sizes to measure now. The times of one size come together, and are worth nothing if the kernel failed."""
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

    def chunks(self, stage: Stage) -> None:
        for shape, sizes in stage.chunks:
            cases = [
                (new, tokens)
                for new, tokens in sizes
                if self.due(
                    f"chunks {shape}, {new} over {tokens}",
                    "chunks",
                    shape=list(shape),
                    new=new,
                    tokens=tokens,
                )
            ]
            if cases:
                self.collect("chunks", {"shape": shape, "cases": cases, "kernel": self.plan.kernel})

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
        job = {
            "kv": kv,
            "prompt": load[0],
            "new": load[1],
            "small": self.plan.small,
            "limit": self.plan.limit,
        }
        too_many: list[int] = []
        for _ in range(1 + RETRIES):
            record = self.collect("throughput", job | {"batch": batch}, fields, {"too_many": [*too_many]})
            if record is None or "out_of_memory" not in record or role == COMMON:
                return
            too_many.append(record["batch"])
            batch = int(FEWER * record["batch"])

    def collect(
        self,
        measurement: str,
        job: Mapping[str, Any],
        generated: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Record | None:
        """Adds a worker's records to the results and returns the last. `generated` is what a try of generation is of,
        whose failure is a result too.
        """
        record = None
        try:
            for record in self.work(measurement, job, generation=generated is not None):
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
    """A worker's environment variables; those that the caller has set stay."""
    wanted = {**plan.environment}
    if generation:
        # Tries share what they compile, and what XLA tuned.
        wanted |= {**plan.generation, "JAX_COMPILATION_CACHE_DIR": compilations}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def say(text: str) -> None:
    print(text, flush=True)
