"""Prompts of a Ray dataset, completed by actors that each have an engine (pip install "kivi-jax[ray]").

python examples/ray_dataset.py [MODEL]
"""

import sys

import ray

from kivi_jax.ray_data import map_prompts

ray.init(num_cpus=2)
prompts = ray.data.from_items([{"id": i, "prompt": f"def f{i}(x):\n    return"} for i in range(16)])
completed = map_prompts(
    prompts, sys.argv[1] if len(sys.argv) > 1 else "demo", concurrency=1, slots=4, max_new_tokens=8
)
for row in sorted(completed.take_all(), key=lambda row: row["id"]):
    print(row["id"], row["prompt"] + row["generated_text"])
