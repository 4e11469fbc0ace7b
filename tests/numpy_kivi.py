"""The original's rules, token by token in NumPy: lists of quantized and exact keys and values, and a Llama over them.

Written from the paper's reference behaviour, and shares nothing with the library.
"""

import dataclasses
from typing import Any

import numpy as np

from tests.checkpoints import Tensors


def fake_quantize(x: np.ndarray, bits: int, group_size: int, axis: int) -> np.ndarray:
    """What a quantized `x` decodes to, with groups of `group_size` along `axis`."""
    moved = np.moveaxis(x, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], moved.shape[-1] // group_size, group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    steps = np.divide(groups - low, scale, out=np.zeros_like(groups), where=scale > 0)
    decoded = np.rint(np.clip(steps, 0, 2**bits - 1)) * scale + low
    return np.moveaxis(decoded.reshape(moved.shape), -1, axis).astype(np.float32)


@dataclasses.dataclass
class KiviLists:
    """Keys and values `[H, T, D]` of one layer of one sequence, the quantized ones as they decode."""

    key_bits: int
    value_bits: int
    group_size: int
    residual_length: int

    def prefill(self, k: np.ndarray, v: np.ndarray) -> None:
        length = k.shape[1]
        keys, values = length - length % self.residual_length, max(length - self.residual_length, 0)
        self.quantized_k = fake_quantize(k[:, :keys], self.key_bits, self.group_size, axis=1)
        self.quantized_v = fake_quantize(v[:, :values], self.value_bits, self.group_size, axis=2)
        self.exact_k, self.exact_v = k[:, keys:], v[:, values:]

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention of one token, q `[Hq, D]`, k and v `[H, D]`, which is stored afterwards."""
        self.exact_k = np.concatenate([self.exact_k, k[:, None]], axis=1)
        self.exact_v = np.concatenate([self.exact_v, v[:, None]], axis=1)
        all_k = np.concatenate([self.quantized_k, self.exact_k], axis=1)
        all_v = np.concatenate([self.quantized_v, self.exact_v], axis=1)
        out = softmax_attention(q[:, None], all_k, all_v)[:, 0]
        if self.exact_k.shape[1] == self.residual_length:
            decoded = fake_quantize(self.exact_k, self.key_bits, self.group_size, axis=1)
            self.quantized_k = np.concatenate([self.quantized_k, decoded], axis=1)
            self.exact_k = self.exact_k[:, :0]
        if self.exact_v.shape[1] > self.residual_length:
            decoded = fake_quantize(self.exact_v[:, :1], self.value_bits, self.group_size, axis=2)
            self.quantized_v = np.concatenate([self.quantized_v, decoded], axis=1)
            self.exact_v = self.exact_v[:, 1:]
        return out


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = False) -> np.ndarray:
    """q `[Hq, T, D]`, k and v `[H, S, D]`; query heads share the KV head of their group."""
    groups = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(np.float32(q.shape[-1]))
    if causal:
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


class NumpyLlama:
    """A Llama for one sequence whose layers store keys and values in `KiviLists`."""

    def __init__(self, tensors: Tensors, config: dict[str, Any], *kivi: int):
        self.tensors, self.config = tensors, config
        self.lists = [KiviLists(*kivi) for _ in range(config["num_hidden_layers"])]
        self.length = 0

    def run(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after `tokens`: a whole prompt at first, then one token at a time."""
        prompt = self.length == 0
        x = self.tensors["model.embed_tokens.weight"][tokens]
        positions = self.length + np.arange(len(tokens))
        for layer, lists in enumerate(self.lists):
            prefix = f"model.layers.{layer}."
            h = self.norm(x, prefix + "input_layernorm.weight")
            q, k, v = (self.heads(h, f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if prompt:
                attended = softmax_attention(q, k, v, causal=True)
                lists.prefill(k, v)
            else:
                attended = lists.attend(q[:, 0], k[:, 0], v[:, 0])[:, None]
            merged = attended.swapaxes(0, 1).reshape(len(tokens), -1)
            x = x + merged @ self.tensors[prefix + "self_attn.o_proj.weight"].T
            h = self.norm(x, prefix + "post_attention_layernorm.weight")
            gate = h @ self.tensors[prefix + "mlp.gate_proj.weight"].T
            up = h @ self.tensors[prefix + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.tensors[prefix + "mlp.down_proj.weight"].T
        self.length += len(tokens)
        return self.norm(x[-1], "model.norm.weight") @ self.tensors["lm_head.weight"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.config["rms_norm_eps"]))
        return x * scale * self.tensors[name]

    def heads(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.tensors[name].T
        return y.reshape(len(x), -1, self.config["head_dim"]).swapaxes(0, 1)

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)
