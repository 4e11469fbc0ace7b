"""Qwen2 and Qwen3: Llama's decoder, with biases of queries, keys and values, or with norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from kivi_jax.models.fields import FULL, SLIDING, read_flag, read_sliding_windows
from kivi_jax.models.llama import WEIGHTS, LlamaConfig, read_decoder

__all__ = ["WEIGHTS", "Qwen2Config", "Qwen3Config"]

# transformers' defaults, for fields that are absent from config.json.
DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


class Qwen2Config(LlamaConfig):
    """The `config.json` of a Qwen2 or Qwen2.5."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Qwen2Config":
        """As `LlamaConfig.from_json`; there is a sliding window only where `use_sliding_window` is true."""
        fields = {**DEFAULTS, **fields}
        return cls(**read_decoder(fields), attention_bias=True, sliding_windows=_read_windows(fields))


class Qwen3Config(LlamaConfig):
    """The `config.json` of a dense Qwen3."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Qwen3Config":
        """As `LlamaConfig.from_json`; there is a sliding window only where `use_sliding_window` is true."""
        fields = {**DEFAULTS, "head_dim": 128, **fields}
        bias = read_flag(fields, "attention_bias")
        return cls(
            **read_decoder(fields),
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            sliding_windows=_read_windows(fields),
        )


def _read_windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window; by default, only the layers from `max_window_layers` on have one."""
    num_layers, first = fields["num_hidden_layers"], fields["max_window_layers"]
    window = fields["sliding_window"] if read_flag(fields, "use_sliding_window") else None
    if window is None:
        return read_sliding_windows(fields, None, [FULL] * num_layers)
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"config.json: max_window_layers must be a whole number, got {first!r}")
    return read_sliding_windows(
        fields, window, [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    )
