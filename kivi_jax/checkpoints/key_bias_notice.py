"""Warns about a model whose key biases are too large for 2-bit keys."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# A layer's key biases are large if one exceeds this many standard deviations of the keys without their biases.
#
# Rotary positions turn a bias b into values between -b and b within a group, so a 2-bit step is at least 2b/3. What
# distinguishes tokens, some ±2 deviations, then lies within one step if b is 6 deviations or more, and the channel's
# codes carry no information. Ordinary biases are about one deviation, and those of Qwen2 and Qwen2.5 dozens; 10 lies
# between, with room for the outliers of small models.
LARGE = 10.0
# The most layers that the notice proposes to keep exact: with many more, little would be left to quantize.
MOST_EXACT = 4


def warn_of_large_key_biases(weights: Mapping[str, Array], config: Any) -> None:
    """Warns once if low-bit keys would lose this model's attention, naming the layers and what to do.

    Args:
        weights: parameters by path.
        config: the family's configuration.
    """
    if config.alibi_slopes is not None or getattr(config, "qk_norm", False):
        # An unrotated bias is a constant, which the groups' zeros absorb; with qk_norm, a norm follows the bias.
        return
    ratios = {}
    for path, bias in weights.items():
        if match := re.fullmatch(r"layers\.(\d+)\.attention\.k_proj\.bias", path):
            layer = int(match[1])
            kernel = weights[f"layers.{layer}.attention.k_proj.kernel"]
            scale = weights.get(f"layers.{layer}.input_norm.scale", jnp.ones(kernel.shape[-1], kernel.dtype))
            ratios[layer] = float(_bias_in_deviations(bias, kernel, scale))
    layers = sorted(layer for layer, ratio in ratios.items() if ratio > LARGE)
    if not layers:
        return
    worst = sorted(layers, key=ratios.__getitem__, reverse=True)[:MOST_EXACT]
    names = f"layers {', '.join(map(str, layers))}" if len(layers) > 1 else f"layer {layers[0]}"
    kept = ", ".join(f'{layer}: "bf16"' for layer in sorted(worst))
    warnings.warn(
        f"key biases of {names} are up to {ratios[worst[0]]:.0f} times what the weights make of an input; 2-bit keys "
        f"lose attention there. Keep the worst layers exact with KVConfig(..., overrides={{{kept}}}), or use 4-bit "
        f'keys, best kv="kivi4"; both together recover most',
        stacklevel=3,
    )


@jax.jit
def _bias_in_deviations(
    bias: Float[Array, " outputs"], kernel: Float[Array, "outputs inputs"], scale: Float[Array, " inputs"]
) -> Float[Array, ""]:
    """The greatest bias, in standard deviations of the keys without bias, for independent normalized inputs.

    The deviation is the root mean square over the layer's channels: a channel that hardly varies needs no precision.
    """
    gains = kernel.astype(jnp.float32) * scale.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(gains), axis=1)))
    return jnp.max(jnp.abs(bias.astype(jnp.float32))) / jnp.maximum(deviation, 1e-30)
