"""What quantizing a layer's keys or values changes: in themselves, in the attention to them and in its output."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kivi_jax.pallas_kernels.alibi import Slopes, alibi_bias
from tools.kv_study.groups import Grouping, quantized
from tools.kv_study.passes import Attended

NEGLIGIBLE = 0.01  # of a query's largest probability


class Errors(NamedTuple):
    """Relative errors ‖x̂ - x‖ / ‖x‖ (Frobenius), over all tokens of a head, of one way to quantize.

    Attributes:
        keys, values: of what is quantized itself.
        attended_values: of the values, the square of each token weighted by the attention that it receives.
        probabilities: of softmax(q·k), keys quantized.
        output_of_keys: of attention's output, keys quantized and values exact.
        output_of_values: of attention's output, values quantized and keys exact.
    """

    keys: Float[Array, " H"]
    values: Float[Array, " H"]
    attended_values: Float[Array, " Hq"]
    probabilities: Float[Array, " Hq"]
    output_of_keys: Float[Array, " Hq"]
    output_of_values: Float[Array, " Hq"]


LABELS = {
    "keys": "keys",
    "values": "values",
    "attended_values": "values, weighted by their attention",
    "probabilities": "attention probabilities",
    "output_of_keys": "attention output, keys quantized",
    "output_of_values": "attention output, values quantized",
}


class Attention(NamedTuple):
    """How a layer's exact attention is spread.

    Attributes:
        sparsity: share of the tokens that queries see with a probability below `NEGLIGIBLE` of the query's largest.
        most_attended: share of all attention that the most attended token receives.
    """

    sparsity: Float[Array, " Hq"]
    most_attended: Float[Array, " Hq"]


@functools.partial(jax.jit, static_argnames=("grouping", "bits", "group_size", "sliding_window"))
def layer_errors(
    layer: Attended,
    grouping: Grouping,
    bits: int,
    group_size: int,
    sliding_window: int | None = None,
    alibi_slopes: Slopes | None = None,
) -> Errors:
    """The errors of keys and of values quantized with the same `grouping`, each for the other one exact."""
    stored = [quantized(x, grouping, bits, group_size).astype(jnp.float32) for x in (layer.k, layer.v)]
    layer = _in_float32(layer)

    def of_kv_head(inputs: tuple[Array, ...]) -> Errors:
        q, bias, k, v, stored_k, stored_v = inputs
        exact = _probabilities(q, k, bias, sliding_window)
        found = _probabilities(q, stored_k, bias, sliding_window)
        weights = jnp.sqrt(exact.sum(-2))[..., None]
        return Errors(
            keys=relative_error(stored_k, k),
            values=relative_error(stored_v, v),
            attended_values=relative_error(weights * stored_v, weights * v),
            probabilities=relative_error(found, exact),
            output_of_keys=relative_error(found @ v, exact @ v),
            output_of_values=relative_error(exact @ stored_v, exact @ v),
        )

    q, bias = _by_kv_head(layer, alibi_slopes)
    # One head at a time, whose probabilities are T x T for each of its queries' heads.
    errors = jax.lax.map(of_kv_head, (q, bias, layer.k, layer.v, *stored))
    return Errors(*(error.reshape(-1) for error in errors))


@functools.partial(jax.jit, static_argnames="sliding_window")
def layer_attention(
    layer: Attended, sliding_window: int | None = None, alibi_slopes: Slopes | None = None
) -> Attention:
    layer, length = _in_float32(layer), layer.q.shape[1]
    seen = _seen(length, sliding_window)

    def of_kv_head(inputs: tuple[Array, ...]) -> Attention:
        found = _probabilities(*inputs, sliding_window)
        negligible = seen & (found < NEGLIGIBLE * found.max(-1, keepdims=True))
        return Attention(negligible.sum((-2, -1)) / seen.sum(), found.sum(-2).max(-1) / length)

    q, bias = _by_kv_head(layer, alibi_slopes)
    found = jax.lax.map(of_kv_head, (q, layer.k, bias))
    return Attention(*(array.reshape(-1) for array in found))


def relative_error(
    found: Float[Array, "*batch T D"], exact: Float[Array, "*batch T D"]
) -> Float[Array, "*batch"]:
    """‖found - exact‖ / ‖exact‖ over the last two axes."""
    return jnp.linalg.norm(found - exact, axis=(-2, -1)) / jnp.linalg.norm(exact, axis=(-2, -1))


def _in_float32(layer: Attended) -> Attended:
    return Attended(*(x.astype(jnp.float32) for x in layer))


def _by_kv_head(
    layer: Attended, alibi_slopes: Slopes | None
) -> tuple[Float[Array, "H shared T D"], Float[Array, "H shared 1 T"]]:
    """Queries, and the biases of their scores, by the KV head that they read."""
    (heads, length, head_dim), kv_heads = layer.q.shape, layer.k.shape[0]
    bias = jnp.zeros((heads, length))
    if alibi_slopes is not None:
        bias = alibi_bias(alibi_slopes, jnp.arange(length), head_dim)
    return layer.q.reshape(kv_heads, -1, length, head_dim), bias.reshape(kv_heads, -1, 1, length)


def _probabilities(
    q: Float[Array, "shared T D"],
    k: Float[Array, "T D"],
    bias: Float[Array, "shared 1 T"],
    sliding_window: int | None,
) -> Float[Array, "shared T T"]:
    scores = (q @ k.T) * q.shape[-1] ** -0.5 + bias
    return jax.nn.softmax(jnp.where(_seen(k.shape[0], sliding_window), scores, -jnp.inf))


def _seen(length: int, sliding_window: int | None) -> Bool[Array, "T T"]:
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    return (distance >= 0) & (distance < (length if sliding_window is None else sliding_window))
