"""Attention of one new token a row, or of a chunk of them, over a layer's stored keys and values."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from kivi_jax.kv.state import Layer
from kivi_jax.pallas_kernels.decode_attention import xla

Implementation = Literal["auto", "xla"]


def decode_attention(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Sequence[float] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Hq D"]:
    """Attends the `lengths` tokens that `layer` stores and the new token (k, v), which it does not hold yet.

    One softmax over everything, in float32. The dequantized cache is never materialised, and the work over packed
    tokens grows with the longest row, not with capacity. `alibi_slopes`, one a query head, are those of `alibi_bias`.

    Raises:
        NotImplementedError: `implementation` is unknown.
    """
    if implementation not in ("auto", "xla"):
        raise NotImplementedError(f"decode attention has no implementation {implementation!r}, only 'xla'")
    return xla.stored_attention(q[:, None], k[:, None], v[:, None], layer, lengths, alibi_slopes)[:, 0]


def chunk_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    layer: Layer,
    lengths: Int[Array, " B"],
    alibi_slopes: Sequence[float] | None = None,
) -> Float[Array, "B T Hq D"]:
    """The same for T new tokens a row, each of which also attends those before it, exactly.

    No matrix of all scores exists: memory grows with T and not with T times the stored tokens.
    """
    return xla.stored_attention(q, k, v, layer, lengths, alibi_slopes)
