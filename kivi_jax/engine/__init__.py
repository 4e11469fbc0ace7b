"""Continuous batching: requests that come and go share one batch that stays full."""

from kivi_jax.engine.engine import Engine, Output

__all__ = ["Engine", "Output"]
