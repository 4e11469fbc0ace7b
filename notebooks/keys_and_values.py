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
# # What quantization does to keys and values
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kivi-jax/kivi-jax/blob/main/notebooks/keys_and_values.ipynb)
#
# KIVI quantizes keys per channel and values per token. This notebook looks at a model's keys and values, quantizes them
# both ways, and shows what either does to attention and to the predicted text: Figure 2 and Table 2 of
# [the paper](https://arxiv.org/abs/2402.02750), on a model of your choice.

# %% tags=["skip-execution"]
# Colab: installs kivi-jax from its repository, with JAX for the device of this runtime.
# !git clone --quiet --depth 1 https://github.com/kivi-jax/kivi-jax ~/kivi-jax
# %cd -q ~/kivi-jax/notebooks
# !bash install.sh

# %%
import os
import sys

import jax.numpy as jnp
import numpy as np
from IPython.display import Image, display

import kivi_jax
from kivi_jax.kv import dequantize_keys, dequantize_values, quantize_keys, quantize_values
from kivi_jax.text import encode

sys.path.append("..")  # where this notebook is opened in its own folder of a checkout
from tools.kv_study.passes import attended_layers
from tools.kv_study.pictures import channels, errors, png, surfaces
from tools.kv_study.study import run_study
from tools.prose import PROSE

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
params = kivi_jax.load(MODEL, dtype="float32")
tokens = np.asarray(encode(params, [PROSE.read_text()[:1500]])[0][:256])
print(len(tokens), "tokens of a novel,", params.config.num_layers, "layers")

# %% [markdown]
# ## One head by hand
#
# An exact pass shows the keys and values of every layer, as they are cached. `quantize_keys` groups 32 tokens of a
# channel, `quantize_values` 32 channels of a token; each group gets a scale and a zero of its own. Either function can
# be used on either tensor, so that one head shows what the grouping does to it. What counts is further down: what
# attention makes of the errors.

# %%
layer = attended_layers(params, jnp.asarray(tokens))[-1]
k, v = layer.k[0], layer.v[0]  # [T, D], of the first KV head
ways = {
    "per channel": lambda x: dequantize_keys(quantize_keys(x, 2, 32), 2, 32),
    "per token": lambda x: dequantize_values(quantize_values(x, 2, 32), 2, 32),
}
relative = {}
for way, there_and_back in ways.items():
    for name, x in (("keys", k), ("values", v)):
        relative[name, way] = float(jnp.linalg.norm(there_and_back(x) - x) / jnp.linalg.norm(x))
        print(f"{name:6} {way:11}  relative error {relative[name, way]:.3f}")

# %% [markdown]
# ## Magnitudes
#
# Keys have a few channels that are large in most tokens, so a group within such a channel has a smaller range than a
# group across channels. Values have some, too, in fewer layers.

# %%
study = run_study(params, MODEL, tokens, window=False)
display(Image(png(surfaces(study))))
display(Image(png(channels(study))))

# %% [markdown]
# ## What attention makes of it
#
# Errors of attention's output by layer, with keys or values quantized either way. Values' own error can be smaller per
# channel and that of the output larger: attention goes to few tokens, often with small values, which per channel share
# the step of 31 others and get their error, and per token have a step of their own.

# %%
display(Image(png(errors(study))))

# %% [markdown]
# ## Perplexity of the four pairings
#
# With all keys and values quantized, and no window of exact tokens.

# %%
exact = study.losses[None]
perplexities = {}
print(f"exact: {np.exp(exact):.2f}")
for pairing, loss in study.losses.items():
    if pairing is not None:
        perplexities[pairing.bits, pairing.keys, pairing.values] = float(np.exp(loss))
        print(f"{pairing.bits} bits, keys {pairing.keys}, values {pairing.values}: {np.exp(loss):.2f}")

# %%
# What this notebook showed.
assert relative["keys", "per channel"] < relative["keys", "per token"]
of_keys, of_values = (
    {way: getattr(study.errors[way, 2], output).mean() for way in ways}
    for output in ("output_of_keys", "output_of_values")
)
assert of_keys["per channel"] < of_keys["per token"], "keys belong in channels"
if MODEL != "demo":  # whose values lose about as much either way
    assert of_values["per token"] < of_values["per channel"], "and values in tokens"
    at_2_bits = {pairing[1:]: found for pairing, found in perplexities.items() if pairing[0] == 2}
    assert min(at_2_bits, key=at_2_bits.get) == ("per channel", "per token"), "which is KIVI's pairing"
