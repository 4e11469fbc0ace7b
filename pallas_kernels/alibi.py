"""Linear position biases of attention scores (ALiBi, Press et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

Slopes = Float[Array | np.ndarray, " Hq"]


def alibi_bias(slopes: Slopes, tokens: Int[Array, "*batch T"], head_dim: int) -> Float[Array, "*batch Hq T"]:
    """The bias to add to scaled attention scores, for keys at positions `tokens` and each query head's slope, float32.

    As in Falcon's training, slope, position and product are rounded to bfloat16, and the product is scaled by 1/√D like
    q·k. Because of the rounding, positions have to count from the row's first token and not from the query.
    """

    def round_to_bfloat16(x: Array) -> Array:  # a cast there and back may be optimised away
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slope = round_to_bfloat16(jnp.asarray(slopes, jnp.float32))
    position = round_to_bfloat16(tokens.astype(jnp.float32))
    return round_to_bfloat16(slope[:, None] * position[..., None, :]) * head_dim**-0.5
