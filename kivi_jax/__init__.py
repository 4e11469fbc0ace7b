"""LLM inference in JAX with a 2-bit key-value cache (KIVI)."""

from kivi_jax import kv
from kivi_jax.checkpoint import CheckpointError
from kivi_jax.completions import Completion
from kivi_jax.conversion import convert
from kivi_jax.generation import generate, stream
from kivi_jax.kv import KVConfig, KVState, kv_bytes
from kivi_jax.loading import load
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.steps import decode_step, extend, init_state, prefill

__all__ = [
    "CheckpointError",
    "Completion",
    "GenerationSettings",
    "KVConfig",
    "KVState",
    "Params",
    "convert",
    "decode_step",
    "extend",
    "generate",
    "init_state",
    "kv",
    "kv_bytes",
    "load",
    "prefill",
    "stream",
]
