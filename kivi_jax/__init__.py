"""LLM inference in JAX with a 2-bit key-value cache (KIVI)."""

from kivi_jax import kv
from kivi_jax.chat import Chat
from kivi_jax.checkpoints.convert import convert
from kivi_jax.checkpoints.hf_files import CheckpointError
from kivi_jax.checkpoints.load import load
from kivi_jax.completions import Completion
from kivi_jax.engine import Engine, Output
from kivi_jax.generation import generate, stream
from kivi_jax.kv import KVConfig, KVState, kv_bytes
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.scoring import Score, score
from kivi_jax.steps import decode_step, extend, init_state, prefill
from kivi_jax.version import __version__

__all__ = [
    "Chat",
    "CheckpointError",
    "Completion",
    "Engine",
    "GenerationSettings",
    "KVConfig",
    "KVState",
    "Output",
    "Params",
    "Score",
    "__version__",
    "convert",
    "decode_step",
    "extend",
    "generate",
    "init_state",
    "kv",
    "kv_bytes",
    "load",
    "prefill",
    "score",
    "stream",
]
