"""Meshes by their shape as text, for commands and for processes that are started elsewhere."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from kivi_jax.models.sharding import DATA_AXIS, MODEL_AXIS


def read_mesh_shape(text: str) -> tuple[int, int]:
    """The two numbers of "DATAxMODEL": the parts that batches are split into, and the parts of the model.

    Raises:
        ValueError: it isn't of this form.
    """
    if isinstance(text, str) and (found := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)):
        return int(found[1]), int(found[2])
    raise ValueError(f"mesh must be DATAxMODEL, as '4x1' or '1x4' of four devices, got {text!r}")


def lay_out(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """`devices`, laid out as `text` says.

    Raises:
        ValueError: it isn't DATAxMODEL, or is a mesh of another number of devices.
    """
    data, model = read_mesh_shape(text)
    if data * model != len(devices):
        raise ValueError(
            f"mesh {text} is of {data * model} devices, and there are {len(devices)}; "
            "their product must be the number of devices"
        )
    return Mesh(np.array(devices).reshape(data, model), (DATA_AXIS, MODEL_AXIS))


def local_mesh(text: str) -> Mesh:
    """The devices of this process, laid out as `text` says.

    Raises:
        ValueError: it isn't DATAxMODEL, or is a mesh of another number of devices.
    """
    return lay_out(text, jax.local_devices())
