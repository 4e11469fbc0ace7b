"""What the options of a KV cache recover where low-bit keys do harm, on synthetic models: nothing is downloaded.

    python -m scripts.quality_guards

Every scenario is a Qwen2 of random weights (4 layers, 4 query and 2 KV heads of 64 channels, RoPE's base 1e6, scores
with a standard deviation of 1.5), the same but for what it is named after:

- plain: all biases are zero.
- key biases: in the first and the last layer every KV head has key biases of ±30 to ±100 in four pairs of channels, two
  of them among the fastest that RoPE turns; weights alone give a key's channel a standard deviation of 1.7. Queries are
  a third as large there as elsewhere, and yet the standard deviation of these layers' scores becomes 7.
- sinks: the embeddings of the four tokens that begin every text have a large part in common. In every layer the key
  weights turn it into outliers of about 40 in three channels that RoPE hardly turns, query biases look for them (four
  fifths of all attention goes there), and the value weights ignore it.

What follows the first tokens is drawn at random; after a prefill it is fed token by token through `decode_step`, in
float32. The table has, for every kv choice, the KL divergence from the distribution of next tokens with a bf16 cache
(mean, in nats), and how often both find the same token likeliest. Bytes are those of the state of a Qwen2.5-1.5B at
4,096 tokens and 16 bits, relative to bf16; they follow from its shape alone, and nothing is measured on that model.
"""

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Float, Int
from safetensors.numpy import save_file
from tqdm import tqdm

import kivi_jax
from kivi_jax import KVConfig
from kivi_jax.evaluation.text_quality import BASELINE
from kivi_jax.kv.config import resolve_kv
from kivi_jax.kv.state import empty_state
from tools.teacher_forcing import teacher_forced_logits

SCENARIOS = ("plain", "key biases", "sinks")
EDGES = {0: BASELINE, -1: BASELINE}
OPTIONS: dict[str, str | KVConfig] = {
    "kivi4": "kivi4",
    "kivi-k4v2": "kivi-k4v2",
    "kivi2": "kivi2",
    "kivi2, residual_length=32": KVConfig(2, 2, residual_length=32),
    "kivi2, group_size=16": KVConfig(2, 2, group_size=16),
    "kivi2-sinks": "kivi2-sinks",
    "kivi2-edges": "kivi2-edges",
    "kivi2, sinks and edges": KVConfig(2, 2, sink_tokens=32, overrides=EDGES),
    "kivi-k4v2, sinks and edges": KVConfig(4, 2, sink_tokens=32, overrides=EDGES),
    "kivi4, edges": KVConfig(4, 4, overrides=EDGES),
}

VOCAB = 512
SINK_TOKENS = 4  # tokens 0 to 3 of the vocabulary, in front of every text
BIASED_PAIRS = (0, 2, 6, 12)  # of 32; RoPE turns them by 1, 0.42, 0.075 and 0.0056 radians a token
BIASED_QUERIES = 1 / 3  # of what the other channels' queries are
SINK_CHANNELS = (28, 30, 31)
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
}


def write_model(folder: Path, scenario: str, layers: int = 4, seed: int = 0) -> Path:
    """Writes the checkpoint of one of `SCENARIOS`."""
    rng = np.random.default_rng(seed)
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    query_heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    head_dim = hidden // query_heads

    def normal(*shape: int, gain: float) -> Float[np.ndarray, "*outputs inputs"]:
        """For inputs of standard deviation 1, outputs of standard deviation `gain`."""
        return (gain * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def zeros(heads: int) -> Float[np.ndarray, "heads head_dim"]:
        return np.zeros((heads, head_dim), np.float32)

    outlier = normal(hidden, gain=1.0)
    outlier /= np.linalg.norm(outlier)
    embeddings = normal(VOCAB, hidden, gain=np.sqrt(hidden))
    if scenario == "sinks":
        embeddings[:SINK_TOKENS] += np.linspace(20, 80, SINK_TOKENS, dtype=np.float32)[:, None] * outlier
    tensors = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(VOCAB, hidden, gain=2.0),
    }
    for layer in range(layers):
        q_weight = normal(query_heads, head_dim, hidden, gain=1.0)
        k_weight = normal(kv_heads, head_dim, hidden, gain=1.7)
        v_weight = normal(kv_heads, head_dim, hidden, gain=1.0)
        q_bias, k_bias = zeros(query_heads), zeros(kv_heads)
        signs, sizes = rng.choice([-1, 1], (kv_heads, 8)), rng.uniform(30, 100, (kv_heads, 8))
        if scenario == "key biases" and layer in (0, layers - 1):
            channels = [pair + half for pair in BIASED_PAIRS for half in (0, head_dim // 2)]
            k_bias[:, channels] = signs * sizes
            q_weight[:, channels] *= BIASED_QUERIES
        if scenario == "sinks":
            k_weight[:, SINK_CHANNELS] += 2.5 * outlier
            v_weight -= (v_weight @ outlier)[..., None] * outlier
            q_bias[:, SINK_CHANNELS] = 1.0
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": q_weight.reshape(-1, hidden),
            prefix + "self_attn.q_proj.bias": q_bias.ravel(),
            prefix + "self_attn.k_proj.weight": k_weight.reshape(-1, hidden),
            prefix + "self_attn.k_proj.bias": k_bias.ravel(),
            prefix + "self_attn.v_proj.weight": v_weight.reshape(-1, hidden),
            prefix + "self_attn.v_proj.bias": zeros(kv_heads).ravel(),
            prefix + "self_attn.o_proj.weight": normal(hidden, query_heads * head_dim, gain=0.5),
            prefix + "mlp.gate_proj.weight": normal(intermediate, hidden, gain=1.0),
            prefix + "mlp.up_proj.weight": normal(intermediate, hidden, gain=1.0),
            prefix + "mlp.down_proj.weight": normal(hidden, intermediate, gain=0.5),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_texts(rows: int, length: int) -> Int[np.ndarray, "rows length"]:
    texts = np.random.default_rng(1).integers(SINK_TOKENS, VOCAB, (rows, length), dtype=np.int32)
    texts[:, :SINK_TOKENS] = np.arange(SINK_TOKENS)
    return texts


@dataclasses.dataclass(frozen=True)
class Damage:
    """KL divergence from the unquantized cache in nats, and the share of steps with the same likeliest token."""

    divergence: float
    agreement: float


def damages(
    params: kivi_jax.Params,
    tokens: Int[np.ndarray, "rows T"],
    prompt: int,
    options: Mapping[str, str | KVConfig],
) -> dict[str, Damage]:
    """Means over all rows and decode steps; the prefill's own logits, which no cache changes, are left out."""

    def log_probabilities(kv: str | KVConfig) -> jax.Array:
        return jax.nn.log_softmax(teacher_forced_logits(params, jnp.asarray(tokens), prompt, kv)[1:])

    exact = log_probabilities(BASELINE)
    found = {}
    for name, kv in options.items():
        stored = log_probabilities(kv)
        found[name] = Damage(
            divergence=float((jnp.exp(exact) * (exact - stored)).sum(-1).mean()),
            agreement=float((exact.argmax(-1) == stored.argmax(-1)).mean()),
        )
    return found


def qwen_bytes(kv: str | KVConfig, tokens: int = 4096) -> int:
    """Bytes of the KV state of one row of a Qwen2.5-1.5B: 28 layers of 2 KV heads of 128 channels."""
    layers, heads, head_dim = 28, 2, 128
    config = resolve_kv(kv, head_dim, layers)
    return kivi_jax.kv_bytes(
        jax.eval_shape(lambda: empty_state(layers, 1, heads, tokens, head_dim, config, jnp.bfloat16))
    )


def main(
    rows: Annotated[int, typer.Option(help="texts")] = 2,
    prompt: Annotated[int, typer.Option(help="tokens of a text that are prefilled")] = 512,
    steps: Annotated[int, typer.Option(help="tokens of a text that are decoded")] = 128,
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    tokens = random_texts(rows, prompt + steps + 1)
    found, notices = {}, []
    for scenario in tqdm(SCENARIOS, leave=False, disable=None):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            params = kivi_jax.load(write_model(Path(folder), scenario, seed=seed), dtype="float32")
        notices += [f"{scenario}: {warning.message}" for warning in caught]
        found[scenario] = damages(params, tokens, prompt, OPTIONS)
    print(f"| kv | bytes | {' | '.join(f'{scenario}: KL | same token' for scenario in SCENARIOS)} |")
    print(f"| :-- |{' ---: |' * (1 + 2 * len(SCENARIOS))}")
    for name, kv in OPTIONS.items():
        cells = [f"{qwen_bytes(kv) / qwen_bytes(BASELINE):.1%}"]
        for scenario in SCENARIOS:
            damage = found[scenario][name]
            cells += [f"{damage.divergence:.4f}", f"{damage.agreement:.1%}"]
        print(f"| {name} | {' | '.join(cells)} |")
    for notice in notices:
        print(notice)


if __name__ == "__main__":
    typer.run(main)
