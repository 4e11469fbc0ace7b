"""The demo model over whole rows, for training: its attention, losses and accuracies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

import kivi_jax
from kivi_jax.checkpoints.weights import nest_paths
from kivi_jax.models.llama import LlamaConfig
from tools.demo_model.data import Corpus, passkey_prompt
from tools.demo_model.settings import Params, Training

ATTENTION_BLOCK = 128


def two_bits(x: Array, axis: int) -> Array:
    """`x` as read back from 2-bit codes, one scale and zero per 32 elements of `axis`; its gradient passes by."""
    grouped = x.reshape(*x.shape[:axis], x.shape[axis] // 32, 32, *x.shape[axis + 1 :])
    low, high = grouped.min(axis + 1, keepdims=True), grouped.max(axis + 1, keepdims=True)
    scale = jnp.maximum((high - low) / 3, 1e-6)
    read = (jnp.round((grouped - low) / scale) * scale + low).reshape(x.shape)
    return x + jax.lax.stop_gradient(read - x)


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    _: None,
    *,
    quantized: bool,
) -> tuple[Float[Array, "B T Hq D"], None]:
    """Causal attention, a block of queries at a time over the keys up to it.

    `quantized` lets every block see the KV as a 2-bit cache returns it: keys exact in the block itself, values in the
    one before too.
    """
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, dim)
    outs = []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        keys, values = k[:, :end], v[:, :end]
        if quantized and start:
            exact = start - ATTENTION_BLOCK
            keys = jnp.concatenate([two_bits(keys[:, :start], 1), keys[:, start:]], axis=1)
            values = jnp.concatenate([two_bits(values[:, :exact], 3), values[:, exact:]], axis=1)
        scores = jnp.einsum("btgrd,bsgd->bgrts", q[:, start:end], keys) * dim**-0.5
        seen = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        outs.append(jnp.einsum("bgrts,bsgd->btgrd", weights, values))
    return jnp.concatenate(outs, axis=1).reshape(batch, length, heads, dim), None


def forward(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    quantized: bool,
) -> Float[Array, "B T vocab"]:
    model = kivi_jax.Params(nest_paths(params), "llama", config).model()
    attend = functools.partial(causal_attention, quantized=quantized)
    hidden, _ = model(tokens, positions, [None] * config.num_layers, attend)
    return model.logits(hidden)


def token_losses(logits: Float[Array, "B T vocab"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_rows(
    config: LlamaConfig, quantized: bool, params: Params, tokens: Int[Array, "B T+1"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Per-token loss of each row, and whether its token is the likeliest."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), (tokens.shape[0], tokens.shape[1] - 1))
    logits = forward(config, params, tokens[:, :-1], positions, quantized)
    return token_losses(logits, tokens[:, 1:]), logits.argmax(-1) == tokens[:, 1:]


def held_out_loss(
    config: LlamaConfig, params: Params, corpus: Corpus, windows: int, length: int
) -> dict[str, float]:
    """Nats per token of evenly spread windows of the held-out documents, by kind of text."""
    losses = {}
    for kind, stream in corpus.held_out.items():
        starts = np.linspace(0, len(stream) - length, windows).astype(int)
        rows = np.stack([np.append(np.int32(corpus.bos), stream[start : start + length]) for start in starts])
        batches = np.array_split(rows, max(1, windows * length // 8192))
        losses[kind] = float(
            np.mean([evaluate_rows(config, False, params, rows)[0].mean() for rows in batches])
        )
    return losses


def passkey_accuracy(
    config: LlamaConfig,
    params: Params,
    corpus: Corpus,
    context: int,
    prompts: int,
    *,
    quantized: bool = False,
) -> float:
    """Share of held-out prompts whose key greedy decoding gives back whole.

    Every token of the answer being the likeliest after the true ones before it is the same as greedy decoding
    giving the answer, and takes one forward pass.
    """
    found = 0
    for prompt in range(prompts):
        text, answer = passkey_prompt(corpus, context, (prompt + 0.5) / prompts, seed=prompt)
        ids = corpus.tokenizer.encode(text + answer).ids
        asked = len(corpus.tokenizer.encode(answer, add_special_tokens=False).ids)
        # Rows of one length for one compilation; what follows the answer cannot change it.
        row = np.pad(np.asarray(ids, np.int32), (0, context + 16 - len(ids)))
        right = evaluate_rows(config, quantized, params, row[None])[1][0]
        found += bool(right[len(ids) - 1 - asked : len(ids) - 1].all())
    return found / prompts


def measure(run: Training, params: Params, corpus: Corpus, prompts: int, contexts: list[int]) -> dict:
    """Held-out loss and pass key accuracies, of the weights as they are exported."""
    rounded = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in params.items()}
    length = min(512, run.model.max_positions)
    return {
        "held_out": held_out_loss(run.model, rounded, corpus, 24 if prompts >= 50 else 8, length),
        "passkey": {c: passkey_accuracy(run.model, rounded, corpus, c, prompts) for c in contexts},
        "passkey_2bit": {
            c: passkey_accuracy(run.model, rounded, corpus, c, prompts, quantized=True) for c in contexts
        },
        "prompts": prompts,
    }
