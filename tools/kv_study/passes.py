"""Forward passes over a whole text, with attention that shows keys and values, or quantizes them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.model import Params, jit_of_params
from kivi_jax.models.layers import Attend
from kivi_jax.pallas_kernels.heads import Heads
from kivi_jax.pallas_kernels.prefill_attention.api import prefill_attention
from tools.kv_study.groups import Pairing, quantized

LOGITS_AT_ONCE = 128  # a large vocabulary's logits of a whole text would be gigabytes


class Attended(NamedTuple):
    """What a layer's attention is given; keys as they are cached, after RoPE."""

    q: Float[Array, "Hq T D"]
    k: Float[Array, "H T D"]
    v: Float[Array, "H T D"]


@jit_of_params
def attended_layers(params: Params, tokens: Int[Array, " T"]) -> tuple[Attended, ...]:
    """Queries, keys and values of every layer in an exact pass."""

    def attend(q: Array, k: Array, v: Array, window: int | None) -> tuple[Array, Attended]:
        out = prefill_attention(q, k, v, window, Heads(params.config.alibi_slopes))
        return out, Attended(*(x[0].swapaxes(0, 1) for x in (q, k, v)))

    return _forward(params, tokens, attend)[1]


def _loss(params: Params, tokens: Int[Array, " T"], pairing: Pairing | None) -> Float[Array, ""]:
    def attend(q: Array, k: Array, v: Array, window: int | None) -> tuple[Array, None]:
        if pairing is not None:
            k = quantized(k.swapaxes(1, 2), pairing.keys, pairing.bits, pairing.group_size).swapaxes(1, 2)
            v = quantized(v.swapaxes(1, 2), pairing.values, pairing.bits, pairing.group_size).swapaxes(1, 2)
        return prefill_attention(q, k, v, window, Heads(params.config.alibi_slopes)), None

    hidden, _ = _forward(params, tokens, attend)
    model = params.model()

    def token_loss(inputs: tuple[Array, Array]) -> Array:
        hidden, following = inputs
        return -jax.nn.log_softmax(model.logits(hidden))[following]

    return jax.lax.map(token_loss, (hidden[:-1], tokens[1:]), batch_size=LOGITS_AT_ONCE).mean()


_compiled_loss = jit_of_params(_loss, static_argnames="pairing")


def mean_loss(params: Params, tokens: Int[Array, " T"], pairing: Pairing | None = None) -> float:
    """Mean loss in nats of every token but the first, in one pass that attends all keys and values quantized.

    A token sees itself and its neighbours quantized, too, and a channel's group holds up to `group_size` - 1 newer
    tokens, which its scale depends on. Without a `pairing` the pass is exact.
    """
    return float(_compiled_loss(params, tokens, pairing=pairing))


def _forward(
    params: Params, tokens: Int[Array, " T"], attend: Attend
) -> tuple[Float[Array, "T hidden"], tuple[Any, ...]]:
    """Final hidden states, and what `attend` returns of every layer; for its KV it is given the sliding window."""
    positions = jnp.arange(tokens.size)[None]
    hidden, layers = params.model()(tokens[None], positions, params.config.sliding_windows, attend)
    return hidden[0], layers
