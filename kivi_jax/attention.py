"""Attention of a whole prompt, of a chunk and of one new token; each picks an implementation for the device."""

from kivi_jax.pallas_kernels.decode_attention.api import chunk_attention, decode_attention
from kivi_jax.pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["chunk_attention", "decode_attention", "prefill_attention"]
