"""The original's rules, token by token in NumPy: lists of quantized and exact keys and values, and a Llama over them.

Written from the paper's reference behaviour, and shares nothing with the library.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import scipy.linalg

Tensors = dict[str, np.ndarray]


def fake_quantize(x: np.ndarray, bits: int, group_size: int, axis: int, nudge: float = 0.0) -> np.ndarray:
    """What a quantized `x` decodes to, with groups of `group_size` along `axis`.

    `nudge` is added before rounding: values that lie half-way between two codes can fall on either side, as the last
    bit of whatever computed them decides.
    """
    moved = np.moveaxis(x, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], moved.shape[-1] // group_size, group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float32)
    steps = np.divide(groups - low, scale, out=np.zeros_like(groups), where=scale > 0)
    decoded = np.rint(np.clip(steps + np.float32(nudge), 0, 2**bits - 1)) * scale + low
    return np.moveaxis(decoded.reshape(moved.shape), -1, axis).astype(np.float32)


@dataclasses.dataclass
class KiviLists:
    """Keys and values `[H, T, D]` of one layer of one sequence, the quantized ones as they decode.

    The first `sink_tokens` tokens decode to themselves and are no part of their groups: for the keys' range, the first
    token after them stands in. A token attends the newest `sliding_window` ones, itself included. Of each head's
    channels those have 4 bits whose keys' ranges in the first block, times the norm of its queries, are the largest.
    """

    key_bits: int
    value_bits: int
    group_size: int
    residual_length: int
    sink_tokens: int = 0
    sliding_window: int | None = None
    boosted_channels: float = 0.0
    rotated_values: bool = False
    nudge: float = 0.0

    def __post_init__(self) -> None:
        self.boosted: np.ndarray | None = None  # channels of each head
        self.first_q: list[np.ndarray] = []  # [Hq, D] of each token of the first block
        self.k: list[np.ndarray] = []  # one [H, D] a token
        self.v: list[np.ndarray] = []
        self.quantized_keys = self.quantized_values = 0

    def extend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Attention of T new tokens, q `[Hq, T, D]`, k and v `[H, T, D]`, which are stored afterwards.

        Stored tokens are attended as they decode, the new ones exactly: a whole prompt, a chunk, or one token.
        """
        self.first_q += list(q.swapaxes(0, 1)[: max(self.residual_length - len(self.k), 0)])
        self.k += list(k.swapaxes(0, 1))
        self.v += list(v.swapaxes(0, 1))
        all_k, all_v = np.stack(self.k, axis=1), np.stack(self.v, axis=1)
        out = softmax_attention(q, all_k, all_v, sliding_window=self.sliding_window)
        length = len(self.k)
        while length - self.quantized_keys >= self.residual_length:
            start, end = self.quantized_keys, self.quantized_keys + self.residual_length
            ranged = np.stack(self.k[start:end], axis=1)
            exact = max(self.sink_tokens - start, 0)
            ranged[:, :exact] = ranged[:, min(exact, self.residual_length - 1), None]
            decoded = self.decoded_keys(ranged)
            self.k[start + exact : end] = list(decoded.swapaxes(0, 1))[exact:]
            self.quantized_keys = end
        while length - self.quantized_values > self.residual_length:
            token = self.quantized_values
            if token >= self.sink_tokens:
                self.v[token] = self.decoded_values(self.v[token])
            self.quantized_values += 1
        return out

    def decoded_keys(self, block: np.ndarray) -> np.ndarray:
        decoded = fake_quantize(block, self.key_bits, self.group_size, axis=1, nudge=self.nudge)
        count = round(self.boosted_channels * block.shape[2])
        if not count:
            return decoded
        if self.boosted is None:
            queries = np.stack(self.first_q, axis=1)
            norms = np.sqrt((queries**2).reshape(len(block), -1, block.shape[2]).sum(1))
            groups = block.reshape(len(block), -1, self.group_size, block.shape[2])
            losses = (groups.max(2) - groups.min(2)).mean(1) * norms
            self.boosted = np.argsort(-losses, axis=1)[:, :count]
        finer = fake_quantize(block, 4, self.group_size, axis=1, nudge=self.nudge)
        for head, channels in enumerate(self.boosted):
            decoded[head, :, channels] = finer[head, :, channels]
        return decoded

    def decoded_values(self, v: np.ndarray) -> np.ndarray:
        """Of one token, `[H, D]`."""
        if not self.rotated_values:
            return fake_quantize(v, self.value_bits, self.group_size, axis=1, nudge=self.nudge)
        matrix = hadamard(v.shape[1])
        groups = (v @ matrix).reshape(-1, self.group_size)
        decoded = fake_quantize(groups, self.value_bits, self.group_size, axis=1, nudge=self.nudge)
        largest = 2**self.value_bits - 1
        for group, first in zip(groups, decoded, strict=True):
            step = np.ptp(first) / largest
            if step:
                scale, zero = np.polyfit(np.rint((first - first.min()) / step), group.astype(np.float64), 1)
                codes = np.rint(np.clip((group - zero) / scale + self.nudge, 0, largest))
                first[:] = codes * scale + zero
        return (decoded.reshape(v.shape) @ matrix).astype(np.float32)


def hadamard(size: int) -> np.ndarray:
    """Orthogonal and symmetric: Hadamard matrices of the largest possible power of two, along the diagonal."""
    power = 2 ** max(i for i in range(size) if size % 2**i == 0)
    blocks = [scipy.linalg.hadamard(power)] * (size // power)
    return (scipy.linalg.block_diag(*blocks) / np.sqrt(power)).astype(np.float32)


def softmax_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sliding_window: int | None = None,
    alibi_slopes: Sequence[float] | None = None,
) -> np.ndarray:
    """Causal attention of the newest T of S tokens: q `[Hq, T, D]`, k and v `[H, S, D]`, heads grouped."""
    groups = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    scores = q @ k.swapaxes(1, 2)
    tokens = np.arange(k.shape[1])
    if alibi_slopes is not None:
        rounded = [np.asarray(x).astype(ml_dtypes.bfloat16) for x in (alibi_slopes, tokens)]
        scores = scores + (rounded[0][:, None] * rounded[1]).astype(np.float32)[:, None]
    scores = scores / np.sqrt(np.float32(q.shape[-1]))
    distances = tokens[-q.shape[1] :, None] - tokens
    seen = distances >= 0
    if sliding_window is not None:
        seen &= distances < sliding_window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


class NumpyLlama:
    """A Llama for one sequence whose layers store keys and values in `KiviLists`."""

    def __init__(self, tensors: Tensors, config: dict[str, Any], **kivi: Any):
        self.tensors, self.config = tensors, config
        self.lists = [KiviLists(**kivi) for _ in range(config["num_hidden_layers"])]
        self.length = 0

    def run(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after `tokens`: a whole prompt, a further chunk of one, or one token."""
        return self.logits(tokens)[-1]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """As `run`, after each of them."""
        x = self.tensors["model.embed_tokens.weight"][tokens]
        positions = self.length + np.arange(len(tokens))
        for layer, lists in enumerate(self.lists):
            prefix = f"model.layers.{layer}."
            h = self.norm(x, prefix + "input_layernorm.weight")
            q, k, v = (self.heads(h, f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            attended = lists.extend(q, k, v)
            merged = attended.swapaxes(0, 1).reshape(len(tokens), -1)
            x = x + merged @ self.tensors[prefix + "self_attn.o_proj.weight"].T
            h = self.norm(x, prefix + "post_attention_layernorm.weight")
            gate = h @ self.tensors[prefix + "mlp.gate_proj.weight"].T
            up = h @ self.tensors[prefix + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.tensors[prefix + "mlp.down_proj.weight"].T
        self.length += len(tokens)
        return self.norm(x, "model.norm.weight") @ self.tensors["lm_head.weight"].T

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
