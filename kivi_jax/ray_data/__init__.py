"""Batch inference on a Ray cluster, by way of Ray Data. `docs/ray.md` tells when and how."""

try:
    import ray.data  # noqa: F401 # before the modules here that use it
except ImportError as error:
    raise ImportError('kivi_jax.ray_data needs Ray Data: pip install "kivi-jax[ray]"') from error

from kivi_jax.ray_data.mapping import map_prompts
from kivi_jax.ray_data.predictor import KiviPredictor

__all__ = ["KiviPredictor", "map_prompts"]
