"""What a model predicts of a text that it does not choose, through its cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import kivi_jax


@functools.partial(jax.jit, static_argnames=("prompt", "kv"))
def teacher_forced_logits(
    params: kivi_jax.Params, tokens: Int[Array, "B T"], prompt: int, kv: str | kivi_jax.KVConfig
) -> Float[Array, "steps B vocab"]:
    """Logits after every token from the prompt's last on, all but the first from decode steps over the cache."""
    batch, length = tokens.shape
    state = kivi_jax.init_state(params, batch, length, kv)
    first, state = kivi_jax.prefill(params, tokens[:, :prompt], jnp.full(batch, prompt), state)

    def step(state: kivi_jax.KVState, column: Int[Array, " B"]) -> tuple[kivi_jax.KVState, Array]:
        logits, state = kivi_jax.decode_step(params, column, state)
        return state, logits

    _, rest = jax.lax.scan(step, state, tokens[:, prompt:-1].T)
    return jnp.concatenate([first[None], rest])
