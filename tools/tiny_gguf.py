"""Writes GGUF files as llama.cpp's converter does, from the config.json and tensors of a Hugging Face checkpoint.

Names of tensors come from the gguf package's own tables.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

Tensors = Mapping[str, np.ndarray]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "falcon": gguf.MODEL_ARCH.FALCON,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
# Where blocks of types that the package can't quantize have their scales, which are float16: by the size of a block in
# bytes, positions of the scale and of the minimum, and the scale of weights with a standard deviation of about 1.
RANDOM_BLOCKS = {
    Type.Q2_K: (84, 80, 82, 1 / 20, 1.5),
    Type.Q3_K: (110, 108, None, 1 / 42, 0),
    Type.Q4_K: (144, 0, 2, 1 / 200, 7.5),
    Type.Q5_K: (176, 0, 2, 1 / 400, 15.5),
    Type.Q6_K: (210, 208, None, 1 / 1350, 0),
}


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    types: Mapping[str, Type] | None = None,
    metadata: Mapping[str, Any] | None = None,
    further: Tensors | None = None,
) -> Path:
    """Writes a model.

    Args:
        path: the file.
        config: the fields of config.json.
        tensors: by Hugging Face's names.
        types: of tensors, by parts of their names in GGUF files; the first one counts. Others, and all vectors, are
            float32. What the package can't quantize is made of random blocks instead.
        metadata: replaces and adds to what the configuration says; None leaves something out.
        further: tensors by their names in GGUF files.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    for key, value in (read_metadata(config) | dict(metadata or {})).items():
        if key != "general.architecture" and value is not None:
            _add_value(writer, key, value)
    random = np.random.default_rng(0)
    for hf_name, tensor in tensors.items():
        name = names.get_name(hf_name, (".weight", ".bias"))
        tensor = _as_llama_cpp(hf_name, np.asarray(tensor, np.float32), config)
        kind = next((kind for part, kind in (types or {}).items() if part in name), Type.F32)
        if tensor.ndim == 1 or kind == Type.F32:
            writer.add_tensor(name, tensor)
        elif kind in RANDOM_BLOCKS:
            writer.add_tensor(name, _random_blocks(tensor, kind, random), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    for name, tensor in (further or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in GGUF's keys."""
    name = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    falcon = config["model_type"] == "falcon"
    kv_heads = config.get("num_kv_heads") if falcon else config.get("num_key_value_heads")
    if falcon and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    values = {
        "general.architecture": name,
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config.get("ffn_hidden_size") if falcon else config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads or heads,
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "rope.dimension_count": config.get("head_dim") or hidden // heads,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "attention.sliding_window": config.get("sliding_window")
        if config["model_type"] in ("mistral", "gemma3_text")
        else None,
        "attention.layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5) if falcon else None,
        "attention.layer_norm_rms_epsilon": None if falcon else config.get("rms_norm_eps", 1e-6),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        values |= {
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        }
    return {key if key.startswith("general.") else f"{name}.{key}": value for key, value in values.items()}


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _as_llama_cpp(name: str, tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """What the converter does to some tensors."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return tensor + 1
    heads = config["num_attention_heads"]
    if config["model_type"] in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        rows = heads if ".q_proj." in name else config.get("num_key_value_heads") or heads
        halves = tensor.reshape(rows, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if "query_key_value" in name:
        groups = config["num_kv_heads"] if config.get("new_decoder_architecture") else 1
        grouped = tensor.reshape(groups, -1, config["hidden_size"] // heads, *tensor.shape[1:])
        parts: Sequence[np.ndarray] = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
        return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    return tensor


def _random_blocks(tensor: np.ndarray, kind: Type, random: np.random.Generator) -> np.ndarray:
    """Blocks of weights that are as large as those of `tensor`, and otherwise have nothing to do with them."""
    size, scale_at, minimum_at, scale, minimum = RANDOM_BLOCKS[kind]
    blocks = random.integers(256, size=(tensor.size // gguf.constants.QK_K, size), dtype=np.uint8)
    scales = np.float16(tensor.std() * scale * random.uniform(0.5, 1.5, len(blocks)))
    blocks[:, scale_at : scale_at + 2] = scales[:, None].view(np.uint8)
    if minimum_at is not None:
        blocks[:, minimum_at : minimum_at + 2] = np.float16(scales * minimum)[:, None].view(np.uint8)
    return blocks.reshape(len(tensor), -1)
