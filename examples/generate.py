"""Completes prompts from several caches, and says how large they are.

python examples/generate.py [MODEL]
"""

import sys

import jax

import kivi_jax

params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
prompts = ["def read_file(path):", "class Stack:\n    def push(self, item):"]
for kv in ("bf16", "kivi4", "kivi2"):
    state = jax.eval_shape(lambda kv=kv: kivi_jax.init_state(params, len(prompts), 2048, kv))
    print(f"== {kv}: {kivi_jax.kv_bytes(state) / 2**20:.2f} MiB for {len(prompts)} rows of 2,048 tokens")
    for prompt, completion in zip(
        prompts, kivi_jax.generate(params, prompts, kv, max_new_tokens=24), strict=True
    ):
        print(prompt + (completion.text or ""))
