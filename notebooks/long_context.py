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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import kivi_jax
from kivi_jax.kv import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.text import load_tokenizer

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
    axes.set(title=f"rows of {length:,} tokens in 80 GiB", ylabel="rows")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A needle far back
#
# A real model, and a text with a number near its beginning, long before the window of exact tokens. SmolLM2 has 135 M
# parameters and loses such numbers more often the fewer bits its keys have;
# [the evaluation](https://github.com/kivi-jax/kivi-jax/blob/main/docs/evaluation.md) counts that.

# %%
MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
params = kivi_jax.load(MODEL)
filler = "".join(f"def value_{i}():\n    return {i}\n\n\n" for i in range(90))
if load_tokenizer(params.tokenizer).chat_template:
    text = f"The secret number of Bergen is 52861.\n\n{filler}"
    question = "What is the secret number of Bergen? Answer with the number only."
    prompt = [{"role": "user", "content": f"{text}\n\n{question}"}]
else:  # such as the little model "demo", which learned to repeat pass keys
    text = f"{filler[:300]}\nThe pass key is 52861. Remember it.\n{filler[300:1500]}"
    prompt = f"{text}\nWhat is the pass key? The pass key is"

found = {}
for kv in KVS:
    completion = kivi_jax.generate(params, prompt, kv=kv, max_new_tokens=16)
    found[kv] = "52861" in completion.text
    print(f"{kv:10} {'found' if found[kv] else 'lost':6} {completion.text!r}")

# %% [markdown]
# ## In pieces
#
# `prefill_chunk` runs a long prompt a piece at a time, in the memory that the activations of one piece take. Later
# pieces attend earlier ones as the cache stores them.

# %%
in_pieces = {
    kv: kivi_jax.generate(params, prompt, kv=kv, max_new_tokens=16, prefill_chunk=256).text
    for kv in ("bf16", "kivi4")
}
print(in_pieces)

# %%
# What this notebook showed.
assert rows["bf16"][-1] / rows["kivi2"][-1] > 5, (
    "2 bits with scales and zeros are 3 of 16, and the window is short"
)
assert fitting[131072]["kivi2"] >= 5 * fitting[131072]["bf16"] > 0
assert found["bf16"], "exactly stored, the number is found"
assert "52861" in in_pieces["bf16"], "in pieces, too"
