"""What a GGUF file's metadata say, as the fields of a config.json.

The families then read and check these fields as those of any other checkpoint. The keys are explained at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, where `[llm]` is the architecture's name.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from kivi_jax.checkpoints.gguf_file import GGUFModel
from kivi_jax.checkpoints.hf_files import CheckpointError
from kivi_jax.models.fields import is_size
from kivi_jax.models.gemma import SLIDING_PATTERN

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
SIZES = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
# Keys that would change the arithmetic, and the values that leave it unchanged.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (),
    "attention.sliding_window_pattern": (SLIDING_PATTERN,),  # Gemma 3's, and it alone has one
    "attn_logit_softcapping": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "residual_scale": (1,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
GEMMA3_27B_LAYERS = 62
# Tokens that end a turn. Files name one or two end tokens, and chat models have more; llama.cpp ends at these, too.
TURN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
CONTROL = 3  # the type of tokens that are in no text


def read_fields(model: GGUFModel) -> dict[str, Any]:
    """The fields of the model's config.json.

    Raises:
        CheckpointError: the architecture is not supported, or metadata are missing, of another kind than they should
            be, or ask for something that is not computed here.
    """
    architecture = model.architecture or ""
    if architecture not in FIELDS:
        raise CheckpointError(
            f"{model.path}: general.architecture {reprlib.repr(architecture)} is not supported, only "
            f"{', '.join(FIELDS)}"
        )
    embedding = model.tensor(EMBEDDING)
    if embedding is None:
        raise CheckpointError(f"{model.path} lacks the tensor {EMBEDDING}")
    sizes = {name: _size(model, name) for name in SIZES}
    heads = sizes["attention.head_count"]
    head_dim = model.hyperparameter("attention.key_length", int) or sizes["embedding_length"] / heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := model.hyperparameter(name, int)) not in (None, head_dim):
            _refuse(model, name, size, f"only {head_dim}, the size of a head")
    for name, neutral in NEUTRAL.items():
        value = model.metadata.get(f"{architecture}.{name}")
        if value is not None and (isinstance(value, list | np.ndarray) or value not in neutral):
            _refuse(model, name, value, "as it would change what the model computes")
    fields = {
        "vocab_size": embedding.shape[0],
        "hidden_size": sizes["embedding_length"],
        "num_hidden_layers": sizes["block_count"],
        "num_attention_heads": heads,
        "head_dim": int(head_dim) if head_dim == int(head_dim) else head_dim,
        "max_position_embeddings": sizes["context_length"],
        "rope_theta": model.hyperparameter("rope.freq_base", float),
        "rope_scaling": _read_rope(model),
        "tie_word_embeddings": model.tensor(HEAD) is None,
        "bos_token_id": model.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": read_end_tokens(model, embedding.shape[0]) or None,
        **FIELDS[architecture](model, sizes),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _size(model: GGUFModel, name: str) -> int:
    size = model.hyperparameter(name, int)
    if size is None or not is_size(size):
        what = "lacks" if size is None else f"has {size} for"
        raise CheckpointError(
            f"{model.path} {what} {model.architecture}.{name}, which must be a positive whole number below 2^31"
        )
    return size


def _refuse(model: GGUFModel, name: str, value: Any, why: str) -> NoReturn:
    raise CheckpointError(
        f"{model.path}: {model.architecture}.{name} {reprlib.repr(value)} is not supported, {why}"
    )


def _in_first_layer(model: GGUFModel, name: str) -> bool:
    return model.tensor(f"blk.0.{name}") is not None


def read_end_tokens(model: GGUFModel, vocab_size: int) -> list[int]:
    """The ids that end a completion: those that the file names, and those of control tokens that are known to.

    Some files name a token that they don't have where there is none.
    """
    ends = [model.get(f"tokenizer.ggml.{key}", int) for key in END_KEYS]
    tokens = model.get("tokenizer.ggml.tokens", list) or []
    kinds = model.get("tokenizer.ggml.token_type", np.ndarray)
    if kinds is not None and len(kinds) == len(tokens):
        ends += [int(token) for token in np.flatnonzero(kinds == CONTROL) if tokens[token] in TURN_ENDS]
    return list(dict.fromkeys(end for end in ends if end is not None and 0 <= end < vocab_size))


def _read_rope(model: GGUFModel) -> dict[str, Any] | None:
    """What stretches the rotary frequencies."""
    factor = model.hyperparameter("rope.scaling.factor", float)
    if factor is None:
        factor = model.hyperparameter("rope.scale_linear", float)  # in old files
    kind = model.hyperparameter("rope.scaling.type", str) or ("linear" if factor else "none")
    tensor = model.tensor(ROPE_FACTORS)
    if tensor is not None:
        if kind != "none" or len(tensor.shape) != 1:
            raise CheckpointError(
                f"{model.path}: {ROPE_FACTORS} of shape {tensor.shape} with rope.scaling.type {kind!r} is not supported"
            )
        factors = tensor.read((slice(None),), np.float32).tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": factor}
        case "yarn":
            scaling = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": model.hyperparameter(
                    "rope.scaling.original_context_length", int
                ),
                "beta_fast": model.hyperparameter("rope.scaling.yarn_beta_fast", float),
                "beta_slow": model.hyperparameter("rope.scaling.yarn_beta_slow", float),
            }
            return {name: value for name, value in scaling.items() if value is not None}
    _refuse(model, "rope.scaling.type", kind, "only none, linear, yarn")


def _llama_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Llama, and Mistral where there is a window."""
    window = model.hyperparameter("attention.sliding_window", int)
    return {
        "model_type": "mistral" if window else "llama",
        **_decoder_fields(model, sizes),
        "sliding_window": window or None,
        "attention_bias": _in_first_layer(model, "attn_q.bias"),
        "mlp_bias": _in_first_layer(model, "ffn_up.bias"),
    }


def _qwen2_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    _refuse_window(model, sizes)
    return {"model_type": "qwen2", **_decoder_fields(model, sizes)}


def _qwen3_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    _refuse_window(model, sizes)
    bias = _in_first_layer(model, "attn_q.bias")
    return {"model_type": "qwen3", **_decoder_fields(model, sizes), "attention_bias": bias}


def _decoder_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What Llama, Mistral and the Qwens have in common."""
    return {
        "intermediate_size": sizes["feed_forward_length"],
        "num_key_value_heads": _kv_heads(model, sizes),
        "rms_norm_eps": _epsilon(model, "attention.layer_norm_rms_epsilon"),
    }


def _falcon_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    _refuse_window(model, sizes)
    head_dim = model.hyperparameter("attention.key_length", int)
    if head_dim and head_dim * sizes["attention.head_count"] != sizes["embedding_length"]:
        _refuse(model, "attention.key_length", head_dim, "only embedding_length over attention.head_count")
    return {
        "model_type": "falcon",
        "ffn_hidden_size": sizes["feed_forward_length"],
        # Files don't say which of Falcon's architectures it is. The newer one computes the same as the older.
        "new_decoder_architecture": True,
        "num_kv_heads": _kv_heads(model, sizes),
        "num_ln_in_parallel_attn": 2 if _in_first_layer(model, "attn_norm_2.weight") else 1,
        "layer_norm_epsilon": _epsilon(model, "attention.layer_norm_epsilon"),
        "bias": _in_first_layer(model, "attn_qkv.bias"),
    }


def _gemma3_fields(model: GGUFModel, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Files don't say how scores are scaled. As in llama.cpp, the 27B model is known by its layers."""
    heads, width = sizes["attention.head_count"], sizes["embedding_length"]
    head_dim = model.hyperparameter("attention.key_length", int) or width // heads
    is_27b = sizes["block_count"] == GEMMA3_27B_LAYERS
    return {
        "model_type": "gemma3_text",
        **_decoder_fields(model, sizes),
        "sliding_window": model.hyperparameter("attention.sliding_window", int),
        "rope_local_base_freq": model.hyperparameter("rope.freq_base_swa", float),
        "query_pre_attn_scalar": width / heads if is_27b else head_dim,
    }


def _kv_heads(model: GGUFModel, sizes: Mapping[str, int]) -> int:
    return model.hyperparameter("attention.head_count_kv", int) or sizes["attention.head_count"]


def _epsilon(model: GGUFModel, name: str) -> float:
    epsilon = model.hyperparameter(name, float)
    if epsilon is None:
        raise CheckpointError(f"{model.path} lacks {model.architecture}.{name}")
    return epsilon


def _refuse_window(model: GGUFModel, sizes: Mapping[str, int]) -> None:
    window = model.hyperparameter("attention.sliding_window", int)
    if window and window < sizes["context_length"]:
        _refuse(model, "attention.sliding_window", window, "only in a llama")


# A row for each architecture, as in `WEIGHTS` of gguf_weights.py.
FIELDS: Mapping[str, Callable[[GGUFModel, Mapping[str, int]], dict[str, Any]]] = {
    "llama": _llama_fields,
    "qwen2": _qwen2_fields,
    "qwen3": _qwen3_fields,
    "falcon": _falcon_fields,
    "gemma3": _gemma3_fields,
}
