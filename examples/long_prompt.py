"""A long prompt in chunks, which bound the memory of activations; later chunks read earlier ones from the cache.

python examples/long_prompt.py [MODEL]
"""

import sys

import kivi_jax

params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
filler = "".join(f"def value_{i}():\n    return {i}\n\n\n" for i in range(30))
prompt = f"{filler}\nThe pass key is 52861. Remember it.\n{filler}\nWhat is the pass key? The pass key is"
for chunk in (None, 256):
    completion = kivi_jax.generate(
        params, prompt, "kivi2-sinks", max_new_tokens=8, prefill_chunk=chunk, stop="."
    )
    print("whole" if chunk is None else f"{chunk} tokens at a time", repr(completion.text))
