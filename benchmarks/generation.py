"""Times prefill and decoding of a whole model, by each cache and by transformers, in turn in one run.

    python -m benchmarks.generation smollm2 --transformers
    python -m benchmarks.generation smollm2 --rows 1 --tokens 60 --dtype float32

For each dtype, tables of seconds of a prefill and of milliseconds of a step: medians of rounds in which all take turns,
so that what else the machine does hits each alike; and of seconds of compilation, of both programs together, with
nothing kept from before. `--transformers` needs PyTorch, optimum-quanto for the quantized cache, and accelerate for a
GGUF file. All sizes together take hours on a small CPU.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Int

import kivi_jax
from kivi_jax.batching import bucket
from kivi_jax.checkpoints.load import find_model
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.kv.config import resolve_kv
from kivi_jax.rows import greedy_rows
from kivi_jax.text import encode
from tools.prose import PROSE
from tools.report_page import table

PREFILLS = 3  # of short prompts; long ones once
LONG_SECONDS = 5
ROUNDS = 8
STEPS = 4  # in a round
NEW_TOKENS = 64  # room for them

Tokens = Int[np.ndarray, "B T"]


class Contestant(Protocol):
    """Prompts, which are prefilled anew each time, and then continued by as many steps as one likes."""

    compile_seconds: float

    def prefill(self) -> None: ...

    def step(self, count: int) -> None: ...


class Cache:
    """The library, with one of its caches: the programs that `generate` runs, in the sizes that it gives them."""

    def __init__(self, params: kivi_jax.Params, kv: str, tokens: Tokens) -> None:
        batch, length = tokens.shape
        padded = np.zeros((batch, bucket(length, least=16)), np.int32)
        padded[:, :length] = tokens
        self.params = params
        self.prompts = jnp.asarray(padded), jnp.full(batch, length, jnp.int32), greedy_rows(batch, NEW_TOKENS)
        lowered = functools.partial(start_decoding.lower, params, *self.prompts, max_new_tokens=NEW_TOKENS)
        most = params.config.max_positions or length + NEW_TOKENS
        config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
        began = time.perf_counter()
        first = lowered(capacity=min(bucket(length + NEW_TOKENS, least=16), most), kv=config)
        self.decoding: Any = first.out_info
        self.first = first.compile()
        self.loop = continue_decoding.lower(params, self.decoding, jnp.int32(1)).compile()
        self.compile_seconds = time.perf_counter() - began

    def prefill(self) -> None:
        self.decoding = None  # there may be no room for two
        self.decoding = jax.block_until_ready(self.first(self.params, *self.prompts))

    def step(self, count: int) -> None:
        self.decoding = jax.block_until_ready(self.loop(self.params, self.decoding, jnp.int32(count)))


class Transformers:
    """The same model in PyTorch, with one of transformers' caches."""

    compile_seconds = 0.0

    def __init__(self, model: Any, make_cache: Callable[[], Any], tokens: Tokens) -> None:
        import torch

        self.model = model
        self.make_cache = make_cache
        self.prompts = torch.from_numpy(tokens.astype(np.int64))
        self.cache: Any = None
        self.last: Any = None

    def prefill(self) -> None:
        self.cache = None
        self.cache, self.last = self.make_cache(), self.prompts
        self.step(1)

    def step(self, count: int) -> None:
        import torch

        with torch.inference_mode():
            for _ in range(count):
                out = self.model(self.last, past_key_values=self.cache, logits_to_keep=1)
                self.last = out.logits[:, -1:].argmax(-1)


Make = Callable[[Tokens], Contestant]


def of_transformers(name: str, dtype: str) -> Iterator[tuple[str, Make]]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

    path = find_model(name)
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype)).eval()
    caches = {
        "DynamicCache": functools.partial(DynamicCache, config=model.config),
        "QuantizedCache, 2 bits": functools.partial(QuantizedCache, "quanto", model.config, nbits=2),
    }
    for cache, make in caches.items():
        yield f"transformers, {cache}", functools.partial(Transformers, model, make)


def measure(contestants: dict[str, Make], tokens: Tokens) -> dict[str, tuple[float, float, float]]:
    """By name: seconds of a prefill, milliseconds of a step, and seconds of compilation."""
    entered = {name: make(tokens) for name, make in contestants.items()}
    prefills: dict[str, list[float]] = {name: [] for name in entered}
    for _ in range(PREFILLS):
        for name, contestant in entered.items():
            if not prefills[name] or prefills[name][0] < LONG_SECONDS:
                prefills[name].append(_seconds(contestant.prefill))
    steps: dict[str, list[float]] = {name: [] for name in entered}
    for contestant in entered.values():
        contestant.step(1)  # what is only done once is done
    for _ in range(ROUNDS):
        for name, contestant in entered.items():
            steps[name].append(_seconds(lambda c=contestant: c.step(STEPS)) / STEPS)
    return {
        name: (
            statistics.median(prefills[name]),
            1e3 * statistics.median(steps[name]),
            contestant.compile_seconds,
        )
        for name, contestant in entered.items()
    }


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _tables(dtype: str, measured: dict[str, dict[str, tuple[float, float, float]]]) -> Iterator[str]:
    names = list(next(iter(measured.values())))
    for place, (title, digits) in enumerate(
        (("prefill, s", 2), ("a step, ms", 1), ("compilation of both, s", 0))
    ):
        yield from table(
            f"{dtype}: {title}|" + "|".join(measured),
            ([name, *(f"{case[name][place]:.{digits}f}" for case in measured.values())] for name in names),
        )
        yield ""


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main(
    model: Annotated[str, typer.Argument(help="its name, folder or GGUF file")] = "smollm2",
    rows: Annotated[str, typer.Option(help="that run at a time")] = "1,8",
    tokens: Annotated[str, typer.Option(help="of the prompts")] = "60,2000,8000",
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "float32,bfloat16",
    kv: Annotated[str, typer.Option(help="caches")] = "bf16,kivi2-plus,kivi2,kivi4",
    transformers: Annotated[bool, typer.Option(help="PyTorch takes part")] = False,
) -> None:
    for name in dtype.split(","):
        params = kivi_jax.load(model, name)
        contestants: dict[str, Make] = {
            kind: functools.partial(Cache, params, kind) for kind in kv.split(",")
        }
        if transformers:
            contestants |= of_transformers(model, name)
        ids = np.asarray(encode(params, [PROSE.read_text(encoding="utf-8")])[0], np.int32)
        measured = {}
        for length in _sizes(tokens):
            for batch in _sizes(rows):
                # Rows begin at different places of the text, which is repeated as often as it takes.
                prompts = np.stack([np.resize(np.roll(ids, -row * 100), length) for row in range(batch)])
                measured[f"{batch} × {length}"] = measure(contestants, prompts)
                typer.echo(f"{name}, {batch} × {length} done", err=True)
        for line in _tables(name, measured):
            typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
