"""Mistral: Llama's decoder, with a sliding window in 7B v0.1."""

from collections.abc import Mapping
from typing import Any

from kivi_jax.models.fields import FULL, SLIDING, read_sliding_windows
from kivi_jax.models.llama import WEIGHTS, LlamaConfig, read_decoder

__all__ = ["WEIGHTS", "MistralConfig"]

# transformers' defaults, for fields that are absent from config.json.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


class MistralConfig(LlamaConfig):
    """A Mistral's `config.json`."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "MistralConfig":
        """As `LlamaConfig.from_json`; `sliding_window` holds for all layers, and null means none."""
        fields = {**DEFAULTS, **fields}
        shared = read_decoder(fields)
        window = fields["sliding_window"]
        default = [FULL if window is None else SLIDING] * shared["num_layers"]
        windows = read_sliding_windows(fields, window, default)
        if len(set(windows)) > 1 or windows[0] != window:
            raise ValueError(
                f"config.json: layer_types {fields['layer_types']} are not supported in a mistral; "
                f"with sliding_window {window} all are {default[0]}"
            )
        return cls(**shared, sliding_windows=windows)
