"""Tiny random checkpoints in Hugging Face format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

TINY = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights large enough that attention is far from uniform."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> np.ndarray:
        return (std * generator.standard_normal(shape)).astype(np.float32)

    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=1.0),
        "model.norm.weight": 1 + normal(hidden, std=0.1),
        "lm_head.weight": normal(config["vocab_size"], hidden, std=0.2),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": 1 + normal(hidden, std=0.1),
            prefix + "post_attention_layernorm.weight": 1 + normal(hidden, std=0.1),
            prefix + "self_attn.q_proj.weight": normal(q_size, hidden, std=0.25),
            prefix + "self_attn.k_proj.weight": normal(kv_size, hidden, std=0.25),
            prefix + "self_attn.v_proj.weight": normal(kv_size, hidden, std=0.15),
            prefix + "self_attn.o_proj.weight": normal(hidden, q_size, std=0.1),
            prefix + "mlp.gate_proj.weight": normal(intermediate, hidden, std=0.15),
            prefix + "mlp.up_proj.weight": normal(intermediate, hidden, std=0.15),
            prefix + "mlp.down_proj.weight": normal(hidden, intermediate, std=0.1),
        }
    return tensors


def write_checkpoint(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    """Writes config.json and model.safetensors; `changes` replace fields of `TINY`."""
    config = TINY | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, tensors: Tensors, shards: int = 3) -> None:
    """Shards in place of the single file, which would win over their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
