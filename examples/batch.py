"""Many prompts of mixed lengths through the engine, which fills a slot again as soon as its row has ended.

    python examples/batch.py [MODEL]

`kivi-jax batch IN OUT` does it for files, and goes on where it was stopped.
"""

import sys

import kivi_jax

params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
engine = kivi_jax.Engine(params, "kivi2", slots=8, capacity=256)  # without them, as many slots as fit
prompts = [
    f"def {name}({'x, ' * (number % 5)}y):" for number, name in enumerate("abcdefghijklmnopqrstuvwxyz")
]
settings = kivi_jax.GenerationSettings(max_new_tokens=32, stop="\n\n")
for place, completion in engine.generate(prompts, settings):
    print(f"{place:2} {completion.finish_reason:6} {prompts[place]}{completion.text!r}")
