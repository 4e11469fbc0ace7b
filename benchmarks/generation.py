"""Times prefill and decoding of a whole model, by each cache and by transformers, in turn in one run.

    python -m benchmarks.generation smollm2 --transformers
    python -m benchmarks.generation smollm2 --rows 1 --tokens 60 --dtype float32

For each dtype, tables of seconds of a prefill of one prompt, and of milliseconds of a step of rows that go on from it:
medians of rounds in which all take turns, so that what else the machine does hits each alike; and of seconds of
compilation, of both programs together, with nothing kept from before. `--transformers` needs PyTorch, optimum-quanto
for the quantized cache, and accelerate for a GGUF file. Prompts of 60 and 2,000 tokens take a quarter of an hour on two
cores, those of 8,000 much longer.
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

Prompt = Int[np.ndarray, " T"]


class Contestant(Protocol):
    """A prompt, which is prefilled anew each time, and then continued in several rows by as many steps as one likes."""

    compile_seconds: float

    def prefill(self) -> None: ...

    def step(self, count: int) -> None: ...


class Cache:
    """The library, with one of its caches: the programs that `generate` runs, in the sizes that it gives them."""

    def __init__(self, params: kivi_jax.Params, kv: str, prompt: Prompt, rows: int) -> None:
        padded = np.zeros((1, bucket(prompt.size, least=16)), np.int32)
        padded[0, : prompt.size] = prompt
        self.params = params
        self.arguments = padded, jnp.full(1, prompt.size, jnp.int32), greedy_rows(rows, NEW_TOKENS)
        self.prompt_rows = None if rows == 1 else jnp.zeros(rows, jnp.int32)
        most = params.config.max_positions or prompt.size + NEW_TOKENS
        began = time.perf_counter()
        first = start_decoding.lower(
            params,
            *self.arguments,
            prompt_rows=self.prompt_rows,
            capacity=min(bucket(prompt.size + NEW_TOKENS, least=16), most),
            kv=resolve_kv(kv, params.config.head_dim, params.config.num_layers),
            max_new_tokens=NEW_TOKENS,
        )
        self.decoding: Any = first.out_info
        self.first = first.compile()
        self.loop = continue_decoding.lower(params, self.decoding, jnp.int32(1)).compile()
        self.compile_seconds = time.perf_counter() - began

    def prefill(self) -> None:
        self.decoding = None  # there may be no room for two
        self.decoding = jax.block_until_ready(
            self.first(self.params, *self.arguments, prompt_rows=self.prompt_rows)
        )

    def step(self, count: int) -> None:
        self.decoding = jax.block_until_ready(self.loop(self.params, self.decoding, jnp.int32(count)))


class Transformers:
    """The same model in PyTorch, with one of transformers' caches."""

    compile_seconds = 0.0

    def __init__(self, model: Any, make_cache: Callable[[], Any], prompt: Prompt, rows: int) -> None:
        import torch

        self.model = model
        self.make_cache = make_cache
        self.prompt = torch.from_numpy(prompt.astype(np.int64))[None]
        self.rows = rows
        self.cache: Any = None
        self.last: Any = None

    def prefill(self) -> None:
        self.cache = None
        self.cache, self.last = self.make_cache(), self.prompt
        self.step(1)
        if self.rows > 1:
            self.last = self.last.repeat(self.rows, 1)
            repeat_rows(self.cache, self.rows)

    def step(self, count: int) -> None:
        import torch

        with torch.inference_mode():
            for _ in range(count):
                out = self.model(self.last, past_key_values=self.cache, logits_to_keep=1)
                self.last = out.logits[:, -1:].argmax(-1)


def repeat_rows(cache: Any, rows: int) -> None:
    """Several of the one row of a cache of transformers, whose own function leaves out what is quantized."""
    cache.batch_repeat_interleave(rows)
    for layer in cache.layers:
        for name in ("keys", "values"):
            if (packed := getattr(layer, f"_quantized_{name}", None)) is not None:
                whole = layer._dequantize(packed).repeat_interleave(rows, 0)
                axis = layer.axis_key if name == "keys" else layer.axis_value
                setattr(layer, f"_quantized_{name}", layer._quantize(whole, axis=axis))


Make = Callable[[Prompt, int], Contestant]


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


def measure(contestants: dict[str, Make], prompt: Prompt, rows: int) -> dict[str, tuple[float, float, float]]:
    """By name: seconds of a prefill, milliseconds of a step, and seconds of compilation."""
    entered = {name: make(prompt, rows) for name, make in contestants.items()}
    for contestant in entered.values():
        contestant.prefill()  # what is only done once, such as mapping memory, takes up to a quarter longer
    prefills: dict[str, list[float]] = {name: [] for name in entered}
    for _ in range(PREFILLS):
        for name, contestant in entered.items():
            if not prefills[name] or (rows == 1 and prefills[name][0] < LONG_SECONDS):
                prefills[name].append(_seconds(contestant.prefill))
    steps: dict[str, list[float]] = {name: [] for name in entered}
    for contestant in entered.values():
        contestant.step(1)  # the first, likewise
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


Measured = dict[tuple[int, int], dict[str, tuple[float, float, float]]]  # by rows and tokens, then by name


def _tables(dtype: str, measured: Measured) -> Iterator[str]:
    names = list(next(iter(measured.values())))
    of_fewest_rows = {case: times for case, times in measured.items() if case[0] == min(measured)[0]}
    for place, (title, digits, cases) in enumerate(
        (
            ("prefill of a prompt, s", 2, of_fewest_rows),
            ("a step, ms", 1, measured),
            ("compilation of both, s", 0, measured),
        )
    ):
        sizes = "|".join(f"{rows} × {tokens}" for rows, tokens in cases)
        yield from table(
            f"{dtype}: {title}|{sizes}",
            ([name, *(f"{case[name][place]:.{digits}f}" for case in cases.values())] for name in names),
        )
        yield ""


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main(
    model: Annotated[str, typer.Argument(help="its name, folder or GGUF file")] = "smollm2",
    rows: Annotated[str, typer.Option(help="that go on from a prompt")] = "1,8",
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
        measured: Measured = {}
        for length in _sizes(tokens):
            for batch in _sizes(rows):
                # The text is repeated as often as it takes.
                measured[batch, length] = measure(contestants, np.resize(ids, length), batch)
                typer.echo(f"{name}, {batch} × {length} done", err=True)
        for line in _tables(name, measured):
            typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
