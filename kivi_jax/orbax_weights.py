"""A model's weights as an Orbax checkpoint, of which every device reads its own part."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kivi_jax.checkpoint import CheckpointError, out_of_range, read_json

# In a model's folder: the weights, and their shapes. (Asking Orbax for the shapes opens all parameters at once, and
# prints an error for each where the folder is damaged.)
ORBAX_FOLDER = "orbax"
SHAPES_FILE = "parameters.json"
# Of a parameter, stored as one unit: what a device must read and decompress at once, though its own part be smaller.
CHUNK_BYTES = 2**23


def save_weights(folder: Path, weights: Mapping[str, Array]) -> None:
    """Writes parameters, named by their paths, into a model's folder."""
    import orbax.checkpoint as ocp  # here and below: only converted checkpoints need the time that this takes

    save_args = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in weights}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            (folder / ORBAX_FOLDER).absolute(), ocp.args.PyTreeSave(dict(weights), save_args=save_args)
        )
    shapes = {path: weight.shape for path, weight in weights.items()}
    (folder / SHAPES_FILE).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in a model's folder, by path.

    Raises:
        CheckpointError: they can't be read.
    """
    shapes = read_json(folder / SHAPES_FILE)
    if not all(isinstance(shape, list) for shape in shapes.values()):
        raise CheckpointError(f"{folder / SHAPES_FILE} must map parameters to shapes")
    return {path: tuple(shape) for path, shape in shapes.items()}


def restore_weights(
    folder: Path, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, Array]]:
    """Reads parameters one after the other, each in the dtype and onto the devices that `expected` says.

    One at a time takes no longer where the disk is the limit, bounds the host's memory by a parameter, and lets Orbax
    raise a single error.

    Raises:
        CheckpointError: one is damaged or holds what no weight may be.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path, leaf in expected.items():
            placed = ocp.ArrayRestoreArgs(
                dtype=leaf.dtype,
                global_shape=leaf.shape,
                sharding=leaf.sharding or jnp.zeros(()).sharding,  # the default device
            )
            try:
                restored = checkpointer.restore(
                    (folder / ORBAX_FOLDER).absolute(),
                    ocp.args.PyTreeRestore({path: leaf}, restore_args={path: placed}, partial_restore=True),
                )
            except jax.errors.JaxRuntimeError:  # out of memory
                raise
            except Exception as error:
                raise CheckpointError(
                    f"{folder / ORBAX_FOLDER}: {path} is damaged; convert the model again"
                ) from error
            if not _is_finite(restored[path]):
                raise CheckpointError(
                    f"{folder / ORBAX_FOLDER}: {path} holds NaN or infinity and is damaged, or it "
                    f"{out_of_range(leaf.dtype)}"
                )
            yield path, restored[path]


@jax.jit
def _is_finite(weight: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(weight).all()
