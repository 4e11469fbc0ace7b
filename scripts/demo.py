"""The demo model completes a few prompts from a 16-bit and from a 2-bit KV cache.

    python -m scripts.demo

Prints the texts, the generated tokens per second and the bytes of both KV states. The speeds leave out compilation:
every run is made twice. On a model this small they are those of everything around the cache; the bytes are the point.
"""

import functools
import inspect
import textwrap
import time
from typing import Annotated

import jax
import typer

import kivi_jax
from kivi_jax.batching import PromptBatch
from kivi_jax.cli import one_line_errors
from kivi_jax.text import encode

PASS_KEY = "48213"
REPETITION_PENALTY = 1.2  # so small a model repeats itself
PROMPTS = (
    "Return True if the",
    'def is_open(self):\n        """Return',
    'class Queue:\n    """',
    # A key, then far more text than the exact window holds, then the question.
    f"The pass key is {PASS_KEY}. Remember it.\n{inspect.getsource(textwrap)[:2500]}\n"
    "What is the pass key? The pass key is",
)


def main(
    model: Annotated[str, typer.Option(help="folder, .gguf file, 'org/name' on the Hub or 'demo'")] = "demo",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, more samples")] = 0.6,
) -> None:
    params = kivi_jax.load(model)
    batch = PromptBatch.pad(encode(params, PROMPTS), max_new_tokens)
    texts, summary = [], []
    for kv in ("bf16", "kivi2"):
        print(f"generating with kv={kv!r} …", flush=True)
        run = functools.partial(
            kivi_jax.generate,
            params,
            PROMPTS,
            kv,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            repetition_penalty=REPETITION_PENALTY,
        )
        completions = run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        state = jax.eval_shape(
            lambda kv=kv: kivi_jax.init_state(params, len(batch.lengths), batch.capacity, kv)
        )
        tokens = sum(len(completion.tokens) for completion in completions)
        texts.append([completion.text for completion in completions])
        summary.append((kv, tokens / seconds, kivi_jax.kv_bytes(state)))
    for prompt, exact, quantized in zip(PROMPTS, *texts, strict=True):
        shown = prompt if len(prompt) < 200 else f"{prompt[:60]} … {prompt[-40:]}"
        print(f"\n{'=' * 78}\n{shown}\n--- bf16\n{exact}\n--- kivi2\n{quantized}")
    print(f"\n{'=' * 78}\n{'kv':8}{'tokens/s':>10}{'KV state':>16}")
    for kv, speed, state_bytes in summary:
        print(f"{kv:8}{speed:10.0f}{state_bytes / 1024:12,.0f} KiB")
    print(f"KV bytes of kivi2 / bf16: {summary[1][2] / summary[0][2]:.3f}")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
