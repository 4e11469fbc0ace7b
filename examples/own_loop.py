"""A decode loop of one's own: the state is a value, which `prefill` and `decode_step` take and return.

python examples/own_loop.py [MODEL]
"""

import sys

import jax
import jax.numpy as jnp

import kivi_jax
from kivi_jax.text import load_tokenizer

params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
tokenizer = load_tokenizer(params.tokenizer)
ids = tokenizer.encode("def read_file(path):")

state = kivi_jax.init_state(params, batch=1, capacity=256, kv="kivi2")
logits, state = kivi_jax.prefill(params, jnp.asarray([ids]), jnp.asarray([len(ids)]), state)
step = jax.jit(kivi_jax.decode_step, donate_argnums=2)  # the donated state is updated in place
for _ in range(24):
    token = jnp.argmax(logits, -1)
    ids.append(int(token[0]))
    logits, state = step(params, token, state)
print(tokenizer.decode(ids, skip_special_tokens=True))
print(f"{state.lengths[0]} tokens in {kivi_jax.kv_bytes(state):,} bytes")
