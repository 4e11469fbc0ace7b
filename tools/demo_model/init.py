"""First weights of the demo model: random, with a rough induction circuit."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kivi_jax.models.llama import Llama, LlamaConfig
from kivi_jax.models.rope import inverse_frequencies
from tools.demo_model.settings import Params


def initial_params(config: LlamaConfig, seed: int) -> Params:
    """Random weights, into which the first two layers' first heads are wired as an induction circuit.

    Recall of pass keys rests on induction heads, which otherwise take a long plateau to emerge. Here training starts
    from rough ones and has to sharpen them (in the spirit of mimetic initialisation, Trockman & Kolter 2023).

    Raises:
        ValueError: the model is too small to hold the circuit.
    """
    if config.num_layers < 2 or config.num_kv_heads < 2 or config.num_heads < 2 * config.num_kv_heads:
        raise ValueError("the induction circuit needs 2 layers, 2 key-value heads and 2 query heads of each")
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {".".join(map(str, path)): np.array(value[...]) for path, value in flat}
    for layer in range(config.num_layers):
        params[f"layers.{layer}.mlp.down_proj.kernel"][:] = 0
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0].T
    width = min(config.head_dim, (config.hidden_size - 1) // 4)
    # A direction that all tokens share, and disjoint subspaces: two for the token itself, one for each of those before.
    shared, (token, one_back, two_back, token_too) = basis[0], basis[1 : 1 + 4 * width].reshape(4, width, -1)
    # Rows of one length, so that the shared part of each is the same after normalisation.
    table = params["embed.embedding"]
    table -= np.outer(table @ shared, shared)
    table *= 0.02 * np.sqrt(config.hidden_size) / np.linalg.norm(table, axis=1, keepdims=True)
    table += 0.2 * shared
    wire_previous_token_heads(config, params, shared, token, (one_back, two_back))
    wire_induction_heads(config, params, rng, (token, token_too), (one_back, two_back))
    return {name: jnp.asarray(value) for name, value in params.items()}


def head_rows(
    config: LlamaConfig, params: dict[str, np.ndarray], layer: int, kind: str, head: int
) -> np.ndarray:
    """Writable part of a projection that belongs to one head, `[D, hidden]`."""
    kernel = params[f"layers.{layer}.attention.{kind}_proj.kernel"]
    rows = kernel.T if kind == "o" else kernel
    return rows[head * config.head_dim : (head + 1) * config.head_dim]


def wire_previous_token_heads(
    config: LlamaConfig,
    params: dict[str, np.ndarray],
    shared: np.ndarray,
    token: np.ndarray,
    back: tuple[np.ndarray, ...],
) -> None:
    """Layer 0: head h of the first group attends h + 1 tokens back and writes what is there into `back[h]`.

    Queries and keys are constant, so that only the rotary angles decide: a query turned back by h + 1 positions meets
    the key there in phase. The fast channels tell neighbours apart.
    """
    half, fast = config.head_dim // 2, 8
    angles = np.asarray(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))[:fast]
    key, value = (head_rows(config, params, 0, kind, 0) for kind in "kv")
    key[:], value[:] = 0, 0
    key[:fast] = 1.2 * shared
    value[: len(token)] = token
    for offset, subspace in enumerate(back, start=1):
        query, out = (head_rows(config, params, 0, kind, offset - 1) for kind in "qo")
        query[:], out[:] = 0, 0
        query[:fast] = 1.2 * np.cos(offset * angles)[:, None] * shared
        query[half : half + fast] = -1.2 * np.sin(offset * angles)[:, None] * shared
        out[: len(subspace)] = 0.1 * subspace


def wire_induction_heads(
    config: LlamaConfig,
    params: dict[str, np.ndarray],
    rng: np.random.Generator,
    token: tuple[np.ndarray, np.ndarray],
    back: tuple[np.ndarray, np.ndarray],
) -> None:
    """Layer 1: the first head of two groups looks for a token whose two predecessors are this token and the one before.

    It copies part of what it finds into the residual stream, which the tied head reads. The comparison is in the slow
    channels, whose angles hardly depend on the distance.
    """
    half = config.head_dim // 2
    slow = np.r_[half * 3 // 8 : half, half + half * 3 // 8 : config.head_dim]
    for group, copied in enumerate(token):
        first_head = group * (config.num_heads // config.num_kv_heads)
        mixes = rng.standard_normal((2, len(slow), len(copied))) / np.sqrt(len(copied))
        query, out = (head_rows(config, params, 1, kind, first_head) for kind in "qo")
        key, value = (head_rows(config, params, 1, kind, group) for kind in "kv")
        for rows in (query, key, value, out):
            rows[:] = 0
        query[slow] = 4 * mixes[0] @ token[0] + mixes[1] @ back[0]
        key[slow] = mixes[0] @ back[0] + mixes[1] @ back[1]
        value[: len(copied)] = 4 * copied
        out[: len(copied)] = 0.4 * copied
