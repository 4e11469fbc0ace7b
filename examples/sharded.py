"""Four devices: weights and KV heads are split in two, and so are batches.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/sharded.py [MODEL]  # on a CPU
"""

import sys

import jax

import kivi_jax

mesh = jax.make_mesh((2, 2), ("data", "model"))  # (1, 4): all for the model; (4, 1): all for the batch
params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "demo", mesh=mesh)
prompts = ["def read_file(path):", "import os\n", "class Stack:\n", "for line in"]
for prompt, completion in zip(prompts, kivi_jax.generate(params, prompts, max_new_tokens=24), strict=True):
    print(prompt + (completion.text or ""), end="\n\n")

state = kivi_jax.init_state(params, batch=4, capacity=1024)
print(f"{kivi_jax.kv_bytes(state):,} bytes of cache, of which a device holds")
device = jax.devices()[0]
parts = [
    part.data.nbytes for x in jax.tree.leaves(state) for part in x.addressable_shards if part.device == device
]
print(f"{sum(parts):,}")
