"""What Gemma 3 rounds, and where, in 16 bits; in float32 it is compared with transformers in `test_parity.py`."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kivi_jax.models.gemma import RMSNorm, ScaledEmbedding


def test_small_weights_of_norms_keep_their_digits():
    """The sum of 1 and a weight below 2^-9 would be 1 in bfloat16; and only the result is rounded."""
    size = 64
    norm = RMSNorm(size, 1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    weight = jnp.asarray(generator.uniform(0.001, 0.0019, size), jnp.bfloat16)
    norm.scale = nnx.Param(weight)
    x = jnp.asarray(generator.standard_normal((40, size)), jnp.bfloat16)
    out = norm(x)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + np.asarray(weight, np.float64))
    assert out.dtype == jnp.bfloat16
    assert (out == jnp.asarray(exact.astype(np.float32), jnp.bfloat16)).mean() > 0.99


def test_embeddings_are_scaled_by_a_rounded_root():
    """√3072 = 55.43 is 55.5 in bfloat16, as in transformers. By 55.43, the product would be 55.75."""
    embed = ScaledEmbedding(5, 3072, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    embed.embedding = nnx.Param(jnp.full((5, 3072), 1 + 2**-7, jnp.bfloat16))
    out = embed(jnp.asarray([[3, 1]]))
    assert (out.dtype, out.shape) == (jnp.bfloat16, (1, 2, 3072))
    assert (out == 56).all()
