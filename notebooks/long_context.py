# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Long contexts and memory
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kivi-jax/kivi-jax/blob/main/notebooks/long_context.ipynb)
#
# How a cache grows with its tokens, how many rows fit a device, and whether a number far back in a long text is still
# found when the text is stored in 2 bits.

# %% tags=["skip-execution"]
# Colab: installs kivi-jax from its repository, with JAX for the device of this runtime.
# !git clone --quiet --depth 1 https://github.com/kivi-jax/kivi-jax ~/kivi-jax
# %cd -q ~/kivi-jax/notebooks
# !bash install.sh

# %%
import os
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import kivi_jax
from kivi_jax.evaluation.needle import find_needles, make_cases
from kivi_jax.kv import PRESETS
from kivi_jax.kv.state import empty_state

sys.path.append("..")  # where this notebook is opened in its own folder of a checkout
from tools.prose import PROSE

KVS = ("bf16", "kivi4", "kivi-k4v2", "kivi2")

# %% [markdown]
# ## How a cache grows
#
# The shapes of Llama 3.1 8B: 32 layers, 8 KV heads of 128 channels, 131,072 positions. JAX knows the shapes of a state
# without allocating it, so this runs anywhere.

# %%
LENGTHS = [2**power for power in range(10, 18)]


def row_bytes(kv, length):
    """Bytes of one row of `length` tokens, with all scales, zeros and exact windows."""
    state = jax.eval_shape(lambda: empty_state(32, 1, 8, length, 128, PRESETS[kv], jnp.bfloat16))
    return kivi_jax.kv_bytes(state)


rows = {kv: [row_bytes(kv, length) for length in LENGTHS] for kv in KVS}
WEIGHTS = 8.03e9 * 2  # bytes in bfloat16
figure, axes = plt.subplots(figsize=(7, 4))
for kv in KVS:
    axes.loglog(LENGTHS, [size / 2**30 for size in rows[kv]], marker="o", label=kv, base=2)
axes.axhline(WEIGHTS / 2**30, color="gray", linestyle="--", linewidth=1)
axes.text(LENGTHS[0], WEIGHTS / 2**30 * 1.1, "all weights", color="gray")
axes.set(xlabel="tokens of a row", ylabel="GiB", title="One row's cache, Llama 3.1 8B")
axes.legend()
plt.show()

# %% [markdown]
# ## Rows that fit
#
# Beside the weights on a device of 80 GiB, for rows of 8,192 tokens and of 131,072. Programs need some memory, too; the
# engine measures it and prints the sum before it allocates anything.

# %%
MEMORY = 80 * 2**30
fitting = {
    length: {kv: int((MEMORY - WEIGHTS) // row_bytes(kv, length)) for kv in KVS} for length in (8192, 131072)
}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.5))
for axes, (length, counts) in zip(panels, fitting.items(), strict=True):
    axes.bar(list(counts), list(counts.values()), color="tab:blue")
    axes.bar_label(axes.containers[0])
    axes.margins(y=0.1)
    axes.set(title=f"rows of {length:,} tokens in 80 GiB", ylabel="rows")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A needle far back
#
# A real model, and a text with a number long before the window of exact tokens. SmolLM2 has 135 M parameters and loses
# such numbers more often the fewer bits its keys have;
# [the evaluation](https://github.com/kivi-jax/kivi-jax/blob/main/docs/evaluation.md) counts that.

# %%
MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
params = kivi_jax.load(MODEL)
cases = make_cases(params, PROSE.read_text(), lengths=[1500], depths=[0.25, 0.75], each=1)
text = cases[0].prompt if isinstance(cases[0].prompt, str) else cases[0].prompt[-1]["content"]
print(f"{text[:300]} …\n… {text[-300:]}")

# %% [markdown]
# The prompt attends itself exactly and is run once for all caches; each then answers from what it stored.

# %%
caches = ("bf16", "kivi4", "kivi2")
found = dict.fromkeys(caches, 0)
for case, answers in find_needles(params, cases, [PRESETS[kv] for kv in caches]):
    for kv, right in zip(caches, answers, strict=True):
        found[kv] += right
        print(
            f"{case.number} at {case.depth:.0%} of {case.length} tokens, {kv:10} {'found' if right else 'lost'}"
        )

# %% [markdown]
# ## In pieces
#
# `prefill_chunk` runs a long prompt a piece at a time, in the memory that the activations of one piece take. Later
# pieces attend earlier ones as the cache stores them.

# %%
in_pieces = kivi_jax.generate(params, cases[0].prompt, kv="kivi4", max_new_tokens=16, prefill_chunk=256)
print(cases[0].number, repr(in_pieces.text))

# %%
# What this notebook showed.
assert rows["bf16"][-1] / rows["kivi2"][-1] > 5, (
    "2 bits with scales and zeros are 3 of 16, and the window is short"
)
assert fitting[131072]["kivi2"] >= 5 * fitting[131072]["bf16"] > 0
if MODEL != "demo":  # which never learned to be asked this
    assert found["bf16"] == len(cases), "stored exactly, the numbers are found"
assert in_pieces.finish_reason in ("stop", "length")
