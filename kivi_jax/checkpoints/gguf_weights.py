"""Which parameters the tensors of a GGUF file hold.

The names are in gguf.constants, and what llama.cpp does to tensors is in its convert_hf_to_gguf.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kivi_jax.checkpoints.gguf_config import ROPE_FACTORS
from kivi_jax.checkpoints.gguf_file import GGUFModel, GGUFTensor
from kivi_jax.models.registry import WeightRow


def _unpermuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Hugging Face's order, the halves of each head one after the other.

    llama.cpp rotates channels 2i and 2i + 1 of Llama's heads, and stores their rows side by side. It rotates those of
    other architectures as Hugging Face does.
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _unpermuted_q(config: Any, tensor: np.ndarray) -> tuple[np.ndarray]:
    return (_unpermuted(tensor, config.num_heads),)


def _unpermuted_k(config: Any, tensor: np.ndarray) -> tuple[np.ndarray]:
    return (_unpermuted(tensor, config.num_kv_heads),)


def _split_qkv(config: Any, fused: np.ndarray) -> tuple[np.ndarray, ...]:
    """All queries, all keys, all values."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return tuple(np.split(fused, [queries, queries + keys]))


_LAYER = r"blk\.(\d+)\."
_ENDS: tuple[WeightRow, ...] = (
    (r"token_embd\.weight", r"embed.embedding"),
    (r"output_norm\.weight", r"norm.scale"),
    (r"output\.weight", r"head.kernel"),
)
_DECODER: tuple[WeightRow, ...] = (
    *_ENDS,
    (_LAYER + r"attn_norm\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"ffn_norm\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"attn_([qkv])\.weight", r"layers.\1.attention.\2_proj.kernel"),
    (_LAYER + r"attn_([qkv])\.bias", r"layers.\1.attention.\2_proj.bias"),
    (_LAYER + r"attn_([qk])_norm\.weight", r"layers.\1.attention.\2_norm.scale"),
    (_LAYER + r"attn_output\.weight", r"layers.\1.attention.o_proj.kernel"),
    (_LAYER + r"attn_output\.bias", r"layers.\1.attention.o_proj.bias"),
    (_LAYER + r"ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2_proj.kernel"),
    (_LAYER + r"ffn_(gate|up|down)\.bias", r"layers.\1.mlp.\2_proj.bias"),
)
_LLAMA: tuple[WeightRow, ...] = (
    (_LAYER + r"attn_q\.weight", (r"layers.\1.attention.q_proj.kernel",), _unpermuted_q),
    (_LAYER + r"attn_q\.bias", (r"layers.\1.attention.q_proj.bias",), _unpermuted_q),
    (_LAYER + r"attn_k\.weight", (r"layers.\1.attention.k_proj.kernel",), _unpermuted_k),
    (_LAYER + r"attn_k\.bias", (r"layers.\1.attention.k_proj.bias",), _unpermuted_k),
    *_DECODER,
)
_QKV = tuple(rf"layers.\1.attention.{part}_proj." for part in "qkv")
_FALCON: tuple[WeightRow, ...] = (
    *_ENDS,
    (r"output_norm\.bias", r"norm.bias"),
    (_LAYER + r"attn_qkv\.weight", tuple(path + "kernel" for path in _QKV), _split_qkv),
    (_LAYER + r"attn_qkv\.bias", tuple(path + "bias" for path in _QKV), _split_qkv),
    (_LAYER + r"attn_output\.weight", r"layers.\1.attention.o_proj.kernel"),
    (_LAYER + r"attn_output\.bias", r"layers.\1.attention.o_proj.bias"),
    (_LAYER + r"ffn_(up|down)\.weight", r"layers.\1.mlp.\2_proj.kernel"),
    (_LAYER + r"ffn_(up|down)\.bias", r"layers.\1.mlp.\2_proj.bias"),
)
# Falcon's norm is called attn_norm where there is one. Where there are two, that is the feed-forward layer's.
_FALCON_ONE_NORM: tuple[WeightRow, ...] = (
    *_FALCON,
    (_LAYER + r"attn_norm\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"attn_norm\.bias", r"layers.\1.input_norm.bias"),
)
_FALCON_TWO_NORMS: tuple[WeightRow, ...] = (
    *_FALCON,
    (_LAYER + r"attn_norm\.weight", r"layers.\1.mlp_norm.scale"),
    (_LAYER + r"attn_norm\.bias", r"layers.\1.mlp_norm.bias"),
    (_LAYER + r"attn_norm_2\.weight", r"layers.\1.input_norm.scale"),
    (_LAYER + r"attn_norm_2\.bias", r"layers.\1.input_norm.bias"),
)
_GEMMA3: tuple[WeightRow, ...] = (
    *_DECODER,
    (_LAYER + r"post_attention_norm\.weight", r"layers.\1.post_attention_norm.scale"),
    (_LAYER + r"post_ffw_norm\.weight", r"layers.\1.post_mlp_norm.scale"),
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Where the tensors of an architecture go.

    Attributes:
        rows: as in a family's table of weights.
        norm_offset: is added to the weights of norms: -1 where the file has 1 + w, and the family's norms add the 1.
    """

    rows: tuple[WeightRow, ...]
    norm_offset: float = 0.0


# A row for each architecture, as in `FIELDS` of gguf_config.py.
WEIGHTS: Mapping[str, Architecture] = {
    "llama": Architecture(_LLAMA),
    "qwen2": Architecture(_DECODER),
    "qwen3": Architecture(_DECODER),
    "falcon": Architecture(_FALCON_ONE_NORM),
    "gemma3": Architecture(_GEMMA3, norm_offset=-1.0),
}


def weight_rows(model: GGUFModel, config: Any) -> tuple[WeightRow, ...]:
    """Where each of the model's tensors goes."""
    if model.architecture == "falcon" and config.num_norms == 2:
        return _FALCON_TWO_NORMS
    return WEIGHTS[model.architecture or ""].rows


def weight_tensors(model: GGUFModel) -> list[GGUFTensor]:
    """The tensors that are parameters."""
    offset = WEIGHTS[model.architecture or ""].norm_offset
    return [
        dataclasses.replace(tensor, offset=offset) if tensor.name.endswith("norm.weight") else tensor
        for tensor in model.tensors
        if tensor.name != ROPE_FACTORS
    ]
