"""Where parameters lie on a mesh: tensor parallelism over its axis "model" (Shoeybi et al. 2019).

Projections into heads and into the feed-forward layer are split by outputs, the projections back by inputs, embeddings
and output head by vocabulary. Other parameters are copied to every device. Other axes of the mesh hold copies of all.
"""

import re
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

MODEL_AXIS = "model"
DATA_AXIS = "data"  # splits batches, if the mesh has it
_OUTPUTS, _INPUTS = PartitionSpec(MODEL_AXIS), PartitionSpec(None, MODEL_AXIS)
# Parameter path, how it is split, and the configuration's field that counts the pieces which must stay whole, such as
# heads. With None, it may be split anywhere.
SPLITS = (
    (r".*\.q_proj\.(kernel|bias)", _OUTPUTS, "num_heads"),
    (r".*\.[kv]_proj\.(kernel|bias)", _OUTPUTS, "num_kv_heads"),
    (r".*\.o_proj\.kernel", _INPUTS, "num_heads"),
    (r".*\.(gate|up)_proj\.(kernel|bias)", _OUTPUTS, None),
    (r".*\.down_proj\.kernel", _INPUTS, None),
    (r"embed\.embedding|head\.kernel", _OUTPUTS, None),
)


def parameter_sharding(path: str, shape: tuple[int, ...], config: Any, mesh: Mesh) -> NamedSharding:
    """The sharding of the parameter at `path`; one that does not divide evenly is copied to every device."""
    for pattern, split, unit in SPLITS:
        if re.fullmatch(pattern, path):
            pieces = getattr(config, unit) if unit else shape[split.index(MODEL_AXIS)]
            if pieces % mesh.shape[MODEL_AXIS] == 0:
                return NamedSharding(mesh, split)
    return NamedSharding(mesh, PartitionSpec())


def tensor_parallel_mesh(mesh: Mesh) -> Mesh:
    """`mesh` with axes that the compiler partitions over; with explicit ones, each operation would need a sharding.

    Raises:
        ValueError: there is no axis "model".
    """
    if MODEL_AXIS not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis named {MODEL_AXIS!r}, got {mesh.axis_names}")
    return Mesh(mesh.devices, mesh.axis_names)
