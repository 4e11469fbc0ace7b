"""What kind of device this process runs on."""

import re

import jax


def nvidia_capability() -> float | None:
    """Compute capability of the default device, such as 8.0 for an A100; None if it is not an NVIDIA GPU."""
    device = jax.devices()[0]
    # For AMD's GPUs it is a name.
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", device.compute_capability):
        return None
    return float(device.compute_capability)
