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
# # Under the hood
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/kivi-jax/kivi-jax/blob/main/notebooks/under_the_hood.ipynb)
#
# A decode loop of one's own, the packed words of one block read by hand, and the TPU's kernel compared with NumPy.

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
import numpy as np

import kivi_jax
from kivi_jax.kv import PRESETS, dequantize_keys, dequantize_values
from kivi_jax.kv.quantized import QuantizedLayer
from kivi_jax.pallas_kernels.decode_attention.api import decode_attention
from kivi_jax.text import load_tokenizer

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2")
# TPUs and GPUs decode float32 in XLA, and say so; their kernels take 16 bits.
params = kivi_jax.load(MODEL, dtype="float32")
tokenizer = load_tokenizer(params.tokenizer)

# %% [markdown]
# ## A decode loop of one's own
#
# The state is a pytree, which functions take and return. It is donated to the compiled step, so XLA updates it in
# place.

# %%
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 10
ids = tokenizer.encode(TEXT)
prompt_tokens, NEW = len(ids), 24
step = jax.jit(kivi_jax.decode_step, donate_argnums=2)


def decode(kv):
    state = kivi_jax.init_state(params, batch=1, capacity=512, kv=kv)
    logits, state = jax.jit(kivi_jax.prefill)(params, jnp.asarray([ids]), jnp.asarray([prompt_tokens]), state)
    tokens = []
    for _ in range(NEW):
        tokens.append(int(jnp.argmax(logits, -1)[0]))
        logits, state = step(params, jnp.asarray(tokens[-1:]), state)
    return tokens, state


tokens, state = decode("kivi2")
_, exact = decode("bf16")
print(repr(tokenizer.decode(tokens)))
print(f"{state.lengths[0]} tokens, {kivi_jax.kv_bytes(state):,} bytes; exactly {kivi_jax.kv_bytes(exact):,}")

# %% [markdown]
# ## The packed words of one block
#
# A layer holds a ring of its newest 128 tokens and packed blocks of 128 tokens. Whenever the ring is full, it is
# quantized into the next block. A word of 32 bits holds the codes of 16 consecutive tokens in one channel, the first
# token in the lowest bits, as code − 2 in two's complement. (At a `head_dim` of 64 two rows of words lie side by side.)

# %%
layer = state.layers[0]
_, heads, _, head_dim = layer.window_k.shape
# The first block of the first head.
words = np.asarray(layer.k_codes[0, 0]).reshape(-1, head_dim)[: 128 // 16]
print("words", words.shape, words.dtype, "of", 128, "tokens; the first:", f"{np.uint32(words[0, 0]):032b}")

fields = (words[:, None, :] >> (2 * np.arange(16))[:, None]) & 3  # [8, 16, D]
codes = ((fields + 2) & 3).reshape(128, head_dim)
print("its tokens' codes:", codes[:16, 0])

# Keys are grouped per channel: 32 tokens of a channel share a scale and a zero.
scale, zero = (np.asarray(array[0, 0, : 128 // 32], np.float32) for array in (layer.k_scale, layer.k_zero))
keys_by_hand = codes * np.repeat(scale, 32, axis=0) + np.repeat(zero, 32, axis=0)
keys_by_library = np.asarray(dequantize_keys(layer.keys, 2, 32)[0, 0, :128])
print("largest difference from the library:", np.abs(keys_by_hand - keys_by_library).max())

# %% [markdown]
# The same block in the exact state, and one channel of both:

# %%
keys_exact = np.asarray(exact.layers[0].k[0, 0, :128], np.float32)
channel = int(np.abs(keys_exact).mean(0).argmax())
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(keys_exact[:, channel], label="exact")
axes.step(range(128), keys_by_hand[:, channel], where="mid", label="4 levels for each 32 tokens")
axes.set(xlabel="token", title=f"keys of layer 0, head 0, channel {channel}")
axes.legend()
plt.show()

# %% [markdown]
# ## The kernel against NumPy
#
# On a TPU its kernel runs compiled, elsewhere Pallas interprets it, slowly. Here it attends 300 random tokens of two
# heads, and NumPy attends what the packed words decode to.

# %%
D, H, T = 128, 2, 300
rng = np.random.default_rng(0)
k, v = (jnp.asarray(rng.normal(size=(1, T, H, D)), jnp.bfloat16) for _ in range(2))
q, new_k, new_v = (jnp.asarray(rng.normal(size=(1, 1, heads, D)), jnp.bfloat16) for heads in (2 * H, H, H))
lengths = jnp.asarray([T])
stored = QuantizedLayer.empty(1, H, 512, D, jnp.bfloat16, PRESETS["kivi2"]).store_prompt(k, v, lengths)
kernel = decode_attention(q, new_k, new_v, stored, lengths, implementation="pallas_tpu")

# %% [markdown]
# Keys are read from the packed blocks up to the last whole one, here 256 of 300; values until 128 tokens before the
# newest, here 172.

# %%
L = T - T % 128
all_k, all_v = (np.asarray(x, np.float32)[0].swapaxes(0, 1) for x in (k, v))  # [H, T, D]
all_k[:, :L] = np.asarray(dequantize_keys(stored.keys, 2, 32))[0, :, :L]
all_v[:, : T - 128] = np.asarray(dequantize_values(stored.values, 2, 32))[0, :, : T - 128]
all_k, all_v = (
    np.concatenate([old, np.asarray(new, np.float32)[0].swapaxes(0, 1)], axis=1)
    for old, new in ((all_k, new_k), (all_v, new_v))
)
expected = []
for head, query in enumerate(np.asarray(q, np.float32)[0, 0]):
    scores = all_k[head // 2] @ query / np.sqrt(D)
    weights = np.exp(scores - scores.max())
    expected.append(weights @ all_v[head // 2] / weights.sum())
expected = np.stack(expected)
error = np.square(np.asarray(kernel, np.float32)[0, 0] - expected).mean() / np.square(expected).mean()
print(f"mean squared error over mean square: {error:.1e}")

# %%
# What this notebook showed.
(generated,) = kivi_jax.generate(params, [ids], kv="kivi2", max_new_tokens=NEW, ignore_eos=True)
if jax.default_backend() == "cpu":  # others multiply float32 in fewer bits, which may turn a near tie
    assert tokens == generated.tokens, "the loop gives what generate gives"
np.testing.assert_allclose(keys_by_hand, keys_by_library, rtol=1e-6, atol=1e-6)
half_steps = np.repeat(scale, 32, axis=0) / 2
assert (np.abs(keys_by_hand - keys_exact) <= half_steps * 1.01 + 1e-4).all(), "off by half a step at most"
assert error < 1e-4
