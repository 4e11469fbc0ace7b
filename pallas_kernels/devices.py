"""What the device of this process is."""

import re

import jax


def nvidia_capability() -> float | None:
    """Compute capability of the default device, 8.0 for an A100; None if it is no NVIDIA GPU."""
    device = jax.devices()[0]
    # AMD's GPUs have a name there.
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", device.compute_capability):
        return None
    return float(device.compute_capability)
