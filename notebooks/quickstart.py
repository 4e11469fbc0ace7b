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
# # Quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kivi-jax/kivi-jax/blob/main/notebooks/quickstart.ipynb)
#
# A small chat model answers from a 16-bit cache and from 2-bit ones, side by side. It runs on a CPU, a TPU or a GPU.

# %% tags=["skip-execution"]
# Colab: installs kivi-jax from its repository, with JAX for the device of this runtime.
# !git clone --quiet --depth 1 https://github.com/kivi-jax/kivi-jax ~/kivi-jax
# %cd -q ~/kivi-jax/notebooks
# !bash install.sh

# %%
import os

import jax
from IPython.display import Markdown, display

import kivi_jax

# SmolLM2-135M-Instruct, which a package brings. The id of a chat model on the Hub works as well, if it is one of the
# families in docs/models.md.
MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
params = kivi_jax.load(MODEL)
print(params.config)
print(jax.devices())

# %% [markdown]
# ## One answer
#
# A prompt is a text, token ids, or a conversation, which goes through the checkpoint's own chat template. `kv` says how
# keys and values are stored: `"bf16"` exactly, `"kivi2"` in 2 bits but for the last 128 tokens. This prompt is longer
# than that, so that the answer is read from 2-bit codes.

# %%
story = (
    "A fox lived at the edge of a wood. Every morning it crossed the field, drank from the brook and looked for "
    "berries below the hedge. One day it met a hare that had hurt its foot. The fox carried it home, gave it water "
    "and covered it with leaves. "
)
question = "What had the hare hurt?"
request = [{"role": "user", "content": f"{story * 4}\n\n{question}"}]
answer = kivi_jax.generate(params, request, kv="kivi2", max_new_tokens=32)
print(answer.text)

# %% [markdown]
# ## Several caches side by side
#
# Fewer bits move the answer of so small a model; what they cost in figures is in the notebook on keys and values, and
# in [the evaluation](https://github.com/kivi-jax/kivi-jax/blob/main/docs/evaluation.md).

# %%
CAPACITY = min(2048, params.config.max_positions)

sizes = {}
for kv in ("bf16", "kivi-k4v2", "kivi2"):
    text = kivi_jax.generate(params, request, kv=kv, max_new_tokens=32).text
    # The shapes of a state are known without allocating it.
    state = jax.eval_shape(lambda kv=kv: kivi_jax.init_state(params, batch=1, capacity=CAPACITY, kv=kv))
    sizes[kv] = kivi_jax.kv_bytes(state)
    print(f"{kv:10} {sizes[kv] / 2**20:6.2f} MiB  {text!r}")

# %% [markdown]
# ## Text as it grows

# %%
shown = display(Markdown(""), display_id=True)
for (streamed,) in kivi_jax.stream(params, request, kv="kivi2", max_new_tokens=32):
    shown.update(Markdown(streamed.text))

# %% [markdown]
# ## Samples
#
# `n` samples share the prefill of their prompt. The same seed gives the same samples, whatever else is in the batch.

# %%
samples = kivi_jax.generate(
    params, request, kv="kivi2", n=3, temperature=0.8, top_p=0.95, seed=7, max_new_tokens=24
)
for sample in samples:
    print("-", sample.text)

# %% [markdown]
# ## A conversation
#
# `Chat` keeps its state between the turns: a message costs only what is new in it.

# %%
chat = kivi_jax.Chat(params, "kivi-k4v2", max_new_tokens=32, capacity=min(1024, params.config.max_positions))
held = []
for message in ("What is the capital of France?", "And of Italy?"):
    *_, reply = chat.ask(message)
    held.append(chat.tokens)
    print(f"> {message}\n{reply.text}\n[{chat.tokens} tokens in {chat.kv_bytes / 2**20:.2f} MiB]")

# %%
# What this notebook showed.
assert streamed.tokens == answer.tokens, "a stream ends with what generate returns"
assert sizes["kivi2"] < sizes["kivi-k4v2"] < 0.6 * sizes["bf16"]
assert len({tuple(sample.tokens) for sample in samples}) > 1, "samples differ"
assert held[1] > held[0] > 0
assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
