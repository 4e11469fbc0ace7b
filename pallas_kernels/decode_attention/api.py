"""Decode attention: one new token a row against a layer's stored keys and values."""

from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.kv.state import DenseLayer, Layer
from kivi_jax.pallas_kernels.decode_attention import xla

Implementation = Literal["auto", "xla"]


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    config: KVConfig,
    implementation: Implementation = "auto",
) -> Float[Array, "B Hq D"]:
    """Attends the `lengths` tokens that `layer` holds and the new token (k, v), which it does not hold yet.

    One softmax over everything, in float32. The dequantized cache is never materialised, and the work over packed
    tokens grows with the longest row, not with capacity.

    Raises:
        NotImplementedError: `implementation` is unknown.
    """
    if implementation not in ("auto", "xla"):
        raise NotImplementedError(f"decode attention has no implementation {implementation!r}, only 'xla'")
    if isinstance(layer, DenseLayer):
        return xla.dense_decode_attention(q, k, v, layer, lengths)
    return xla.quantized_decode_attention(q, k, v, layer, lengths, config)
