"""One of two processes, of two CPU devices each, that run an engine together; prints what it got.

python -m tests.engine.process_of_two NUMBER PORT DATAxMODEL
"""

import json
import sys

import jax

import kivi_jax
from kivi_jax import GenerationSettings
from kivi_jax.mesh import lay_out
from kivi_jax.processes import join_processes

PROMPTS = [f"def f{i}(x" + " x" * count for i, count in enumerate((20, 21, 22, 90, 91))]
SETTINGS = [
    GenerationSettings(10 + 7 * i, temperature=float(i % 2), seed=i, n=2 if i % 2 else None)
    for i in range(len(PROMPTS))
]


def main(shape: str) -> None:
    join_processes()
    params = kivi_jax.load("demo", dtype="float32", mesh=lay_out(shape, jax.devices()))
    engine = kivi_jax.Engine(params, slots=4, capacity=512, window=16, prefill_tokens=32)
    found = dict(engine.generate(zip(PROMPTS, SETTINGS, strict=True)))
    print(json.dumps([tokens(found[place]) for place in range(len(PROMPTS))]))


def tokens(completions: kivi_jax.Completion | list[kivi_jax.Completion]) -> list[list[int]]:
    listed = completions if isinstance(completions, list) else [completions]
    return [completion.tokens for completion in listed]


if __name__ == "__main__":
    main(*sys.argv[1:])
