"""Tiny random GGUF files, of every architecture and of many types of tensors."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from tools.tiny_gguf import write_gguf

# Blocks of the K types are 256 wide.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
DECODER = COMMON | {
    "intermediate_size": 256,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A file.

    Attributes:
        config: fields of config.json.
        types: as for `write_gguf`.
        metadata: as for `write_gguf`.
    """

    config: Mapping[str, Any]
    types: Mapping[str, Type]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "llama": Variant(
        DECODER | {"model_type": "llama"},
        {
            "token_embd": Type.Q8_0,
            "output": Type.Q6_K,
            "attn_q": Type.Q4_1,
            "attn_k": Type.Q4_K,
            "attn_v": Type.F16,
            "ffn": Type.BF16,
        },
    ),
    # To files and llama.cpp a Mistral is a llama.
    "mistral": Variant(
        DECODER | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
        {"token_embd": Type.F16, "attn": Type.Q5_0, "ffn_up": Type.Q5_1, "ffn": Type.Q4_0},
        {"general.name": "Mistral"},
    ),
    "qwen2": Variant(
        DECODER | {"model_type": "qwen2"},
        {"token_embd": Type.Q6_K, "attn": Type.Q4_K, "ffn_down": Type.Q6_K, "ffn": Type.Q5_K},
    ),
    "qwen3": Variant(
        DECODER
        | {"model_type": "qwen3", "num_attention_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
        {"token_embd": Type.Q8_0, "attn": Type.Q3_K, "ffn_down": Type.Q4_1, "ffn": Type.Q2_K},
    ),
    # Files don't say how scores are scaled. transformers takes 256 for any, llama.cpp the size of a head.
    "gemma3": Variant(
        DECODER
        | {"model_type": "gemma3_text", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
        | {"sliding_window": 16, "tie_word_embeddings": True},
        {
            "token_embd": Type.Q8_0,
            "attn_q": Type.Q4_K,
            "attn": Type.Q5_0,
            "ffn_down": Type.Q6_K,
            "ffn": Type.Q4_0,
        },
    ),
    "falcon": Variant(
        COMMON | {"model_type": "falcon", "ffn_hidden_size": 1024, "multi_query": True},
        {"token_embd": Type.Q8_0, "attn_qkv": Type.Q5_K, "ffn": Type.Q8_0},
        {"falcon.attention.layer_norm_rms_epsilon": 1e-5},  # where transformers looks for it
    ),
}


def write_variant(name: str, path: Path) -> Path:
    """Writes the file of a variant; it is always the same."""
    variant = VARIANTS[name]
    tensors = random_tensors(variant.config)
    return write_gguf(path, variant.config, tensors, variant.types, variant.metadata)


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face's names, with which neither attention nor logits are near-uniform."""
    random = np.random.default_rng(seed)
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return (gain / math.sqrt(columns) * random.standard_normal((rows, columns))).astype(np.float32)

    def vector(size: int, mean: float) -> np.ndarray:
        return (mean + 0.3 * random.standard_normal(size)).astype(np.float32)

    if config["model_type"] == "falcon":
        tensors = {"transformer.word_embeddings.weight": matrix(vocab, hidden, 2.5)}
        tensors |= {
            f"transformer.ln_f.{part}": vector(hidden, part == "weight") for part in ("weight", "bias")
        }
        head_dim = hidden // heads
        for layer in range(config["num_hidden_layers"]):
            prefix = f"transformer.h.{layer}."
            tensors |= {
                f"{prefix}input_layernorm.{part}": vector(hidden, part == "weight")
                for part in ("weight", "bias")
            }
            tensors |= {
                prefix + "self_attention.query_key_value.weight": matrix(hidden + 2 * head_dim, hidden, 1.4),
                prefix + "self_attention.dense.weight": matrix(hidden, hidden, 3.0),
                prefix + "mlp.dense_h_to_4h.weight": matrix(config["ffn_hidden_size"], hidden, 1.0),
                prefix + "mlp.dense_4h_to_h.weight": matrix(hidden, config["ffn_hidden_size"], 4.0),
            }
        return tensors
    head_dim, kv_heads, wide = config["head_dim"], config["num_key_value_heads"], config["intermediate_size"]
    gemma3 = config["model_type"] == "gemma3_text"
    mean = 0.0 if gemma3 else 1.0  # of norms' weights, to which Gemma adds 1
    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden, 2.5),
        "model.norm.weight": vector(hidden, mean),
    }
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(vocab, hidden, 2.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        tensors |= {
            prefix + "input_layernorm.weight": vector(hidden, mean),
            prefix + "post_attention_layernorm.weight": vector(hidden, mean),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 4.0),
            prefix + "mlp.gate_proj.weight": matrix(wide, hidden, 1.0),
            prefix + "mlp.up_proj.weight": matrix(wide, hidden, 1.0),
            prefix + "mlp.down_proj.weight": matrix(hidden, wide, 4.0),
        }
        for part, size in sizes.items():
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = matrix(size, hidden, 1.4)
            if config["model_type"] == "qwen2":
                tensors[f"{prefix}self_attn.{part}_proj.bias"] = vector(size, 0.0)
            if (gemma3 or config["model_type"] == "qwen3") and part != "v":
                tensors[f"{prefix}self_attn.{part}_norm.weight"] = vector(head_dim, mean)
        if gemma3:
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = vector(hidden, mean)
    return tensors
