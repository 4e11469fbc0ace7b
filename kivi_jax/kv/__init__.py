"""The key-value state: configuration, group quantization, packing and storage."""

from kivi_jax.kv.config import PRESETS, KVConfig
from kivi_jax.kv.quantize import (
    Quantized,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from kivi_jax.kv.state import KVState, kv_bytes

__all__ = [
    "PRESETS",
    "KVConfig",
    "KVState",
    "Quantized",
    "dequantize_keys",
    "dequantize_values",
    "kv_bytes",
    "quantize_keys",
    "quantize_values",
]
