"""The engine on a fixed workload of mixed lengths, beside fixed batches and an unquantized cache in the same memory.

    python -m benchmarks.engine --slots 64 --requests 512

Requests have lognormal lengths like those of chats: completions of 311 tokens on average, half of them of at most 178
and none of more than 2048, prompts of 220. Each generates just so many, as if it ended there. They run

- in fixed batches, each of which ends with its last row (kivi2);
- by the engine, with `kv="bf16"` and as many slots as take the memory of kivi2's;
- by the engine, with kivi2.

Prints decode steps as multiples of tokens / slots, tokens a second, slots in use, time to a request's first token (of
those that found a slot at once, and of all), and the part of the time in which the host kept the device waiting.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

import kivi_jax
from kivi_jax import Engine, GenerationSettings
from kivi_jax.batching import PromptBatch, bucket
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.kv.config import resolve_kv
from kivi_jax.rows import greedy_rows

MOST_TOKENS = 2048  # of a completion


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: list[int]
    tokens: int  # to generate


@dataclasses.dataclass(frozen=True)
class Measured:
    """One way through the workload; `first` are seconds to each request's first token, where they are known."""

    name: str
    slots: int
    tokens: int
    steps: int
    seconds: float
    in_use: float
    host_seconds: float | None = None
    first: Sequence[float] = ()

    def line(self) -> str:
        ideal = self.steps / (self.tokens / self.slots)
        columns = [
            f"{self.name:22}",
            f"{self.slots:5}",
            f"{ideal:9.2f}",
            f"{self.tokens / self.seconds:9.0f}",
        ]
        columns.append(f"{self.in_use:7.1f}")
        if self.first:
            columns.append(
                f"{statistics.median(self.first[: self.slots]):8.2f} {statistics.median(self.first):8.2f}"
            )
        if self.host_seconds is not None:
            columns.append(f"{self.host_seconds / self.seconds:7.1%}")
        return " ".join(columns)


HEADER = "                       slots  × ideal  tokens/s  in use  first s   of all    host"


def workload(requests: int, most: int, vocab_size: int, seed: int = 0) -> list[Request]:
    """`requests` of the lengths above, none of which has more than `most` tokens, prompt and completion together."""
    generator = np.random.default_rng(seed)

    def lengths(mean: float, median: float, cap: int) -> list[int]:
        sigma = np.sqrt(2 * np.log(mean / median))
        drawn = generator.lognormal(np.log(median), sigma, requests).astype(int)
        return np.clip(drawn, 1, cap).tolist()

    completions = lengths(311, 178, min(MOST_TOKENS, most - 1))
    prompts = lengths(220, 130, most)
    return [
        Request(generator.integers(0, vocab_size, min(prompt, most - tokens)).tolist(), tokens)
        for prompt, tokens in zip(prompts, completions, strict=True)
    ]


def in_fixed_batches(params: kivi_jax.Params, requests: list[Request], slots: int, kv: str) -> Measured:
    """As `generate` runs a batch, but that each row has a limit of its own."""
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    batches = [requests[start : start + slots] for start in range(0, len(requests), slots)]

    def run(batch: list[Request], steps: int | None = None) -> int:
        most = max(request.tokens for request in batch)
        padded = PromptBatch.pad([request.prompt for request in batch], most)
        limits = np.zeros(len(padded.lengths), np.int32)
        limits[: len(batch)] = [batch[place].tokens for place in padded.places[: len(batch)]]
        rows = dataclasses.replace(greedy_rows(len(limits), most), limits=jnp.asarray(limits))
        decoding = start_decoding(
            params,
            jnp.asarray(padded.tokens),
            jnp.asarray(padded.lengths),
            rows,
            capacity=padded.capacity,
            kv=config,
            max_new_tokens=bucket(most, least=16),
        )
        decoding = continue_decoding(params, decoding, jnp.int32(most if steps is None else steps))
        assert steps is not None or np.array_equal(np.asarray(decoding.counts), limits)
        return most - 1

    for batch in batches:
        run(batch, steps=1)  # so that all shapes are compiled
    began = time.perf_counter()
    steps = sum(map(run, batches))
    seconds = time.perf_counter() - began
    tokens = sum(request.tokens for request in requests)
    return Measured(f"fixed batches, {kv}", slots, tokens, steps, seconds, tokens / steps)


def by_engine(params: kivi_jax.Params, requests: list[Request], engine: Engine, kv: str) -> Measured:
    engine.warm_up()
    engine.submit([0], max_new_tokens=1)
    while engine.step() or engine.running:
        pass  # so that what is loaded once is
    before = dataclasses.replace(engine.stats)
    began = time.perf_counter()
    ids = [
        engine.submit(request.prompt, GenerationSettings(request.tokens, ignore_eos=True))
        for request in requests
    ]
    first: dict[int, float] = {}
    tokens = 0
    while engine.waiting or engine.running:
        for output in engine.step():
            first.setdefault(output.request, time.perf_counter() - began)
            tokens += output.finished and len(output.completions[0].tokens)
    seconds = time.perf_counter() - began
    assert tokens == sum(request.tokens for request in requests)
    stats = engine.stats
    steps = stats.steps - before.steps
    return Measured(
        f"engine, {kv}",
        engine.slots,
        tokens,
        steps,
        seconds,
        (stats.decoding - before.decoding) / steps,
        stats.host_seconds - before.host_seconds,
        [first[request] for request in ids],
    )


def main(
    model: Annotated[str, typer.Option(help="folder, name on the Hub, or demo")] = "demo",
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32",
    kv: Annotated[str, typer.Option(help="quantized storage to compare with bf16")] = "kivi2",
    slots: Annotated[int, typer.Option(help="rows of the batch with it")] = 64,
    requests: Annotated[int, typer.Option(help="of the workload")] = 512,
    capacity: Annotated[
        int | None, typer.Option(help="tokens of a row; at most the model's positions")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(help="of the model, where lengths alone matter")
    ] = None,
    window: Annotated[int, typer.Option(help="most steps of a window")] = 64,
    fixed: Annotated[bool, typer.Option(help="also run fixed batches")] = True,
) -> None:
    params = kivi_jax.load(model, dtype=dtype, max_positions=max_positions)
    capacity = min(capacity or 4096, params.config.max_positions)
    asked = workload(requests, capacity, params.config.vocab_size)
    tokens = sum(request.tokens for request in asked)
    row, unquantized = (
        kivi_jax.kv_bytes(jax.eval_shape(lambda kv=kv: kivi_jax.init_state(params, 1, capacity, kv)))
        for kv in (kv, "bf16")
    )
    fewer = max(slots * row // unquantized, 1)
    print(
        f"{requests} requests, {tokens} tokens, rows of {capacity}: {row / 2**20:.1f} MiB with {kv}, "
        f"{unquantized / 2**20:.1f} MiB with bf16"
    )
    steps = sum(
        max(request.tokens for request in asked[start : start + slots]) - 1
        for start in range(0, requests, slots)
    )
    print(f"fixed batches of {slots} take {steps} steps, {steps / (tokens / slots):.2f} × ideal\n{HEADER}")

    def engine(kv: str, slots: int) -> Engine:
        return Engine(params, kv, slots=slots, capacity=capacity, window=window)

    if fixed:
        print(in_fixed_batches(params, asked, slots, kv).line(), flush=True)
    print(by_engine(params, asked, engine("bf16", fewer), "bf16").line(), flush=True)
    print(by_engine(params, asked, engine(kv, slots), kv).line(), flush=True)


if __name__ == "__main__":
    typer.run(main)
