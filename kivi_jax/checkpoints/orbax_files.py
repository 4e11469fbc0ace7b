"""A model's weights in an Orbax checkpoint, from which every device reads its own part."""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kivi_jax.checkpoints.hf_files import CheckpointError, out_of_range, read_json

# Where a model's folder has the weights and their shapes. Orbax knows the shapes, too, but opens all parameters at once
# to read them, and prints an error for each if the folder is damaged.
ORBAX_FOLDER = "orbax"
SHAPES_FILE = "parameters.json"
# Parameters are stored in pieces of this size. A device reads and decompresses whole pieces, even for a smaller part.
STORED_PIECE_BYTES = 2**23


def save_weights(folder: Path, weights: Mapping[str, Array]) -> None:
    """Writes parameters, named by their paths, into a model's folder.

    Raises:
        OSError: the files can't be written, for example because the disk is full.
    """
    import orbax.checkpoint as ocp  # slow to import, and only converted checkpoints need it

    save_args = {path: ocp.SaveArgs(chunk_byte_size=STORED_PIECE_BYTES) for path in weights}
    target = (folder / ORBAX_FOLDER).absolute()
    size, free = sum(weight.nbytes for weight in weights.values()), shutil.disk_usage(folder).free
    problem = (
        f"the weights, up to {size >> 20} MiB, can't be written to {folder}, where {free >> 20} MiB are free"
    )
    if free < size / 2:  # compression saves less; better to fail now than after half an hour
        raise OSError(problem)
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(target, ocp.args.PyTreeSave(dict(weights), save_args=save_args))
    except Exception as error:  # for any failed write, Orbax raises a ValueError with pages of context
        raise OSError(f"{problem}: {_reason(error)}") from error
    shapes = {path: weight.shape for path, weight in weights.items()}
    (folder / SHAPES_FILE).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's threads, which print the traceback of an error that is raised as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _reason(error: Exception) -> str:
    """The operating system's message, whose number is in the pages that Orbax and TensorStore say."""
    found = re.search(r"\[os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else " ".join(str(error).split())[:200]


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in a model's folder, by path.

    Raises:
        CheckpointError: the file that lists them can't be read.
    """
    shapes = read_json(folder / SHAPES_FILE)
    if not all(isinstance(shape, list) for shape in shapes.values()):
        raise CheckpointError(f"{folder / SHAPES_FILE} must map parameters to shapes")
    return {path: tuple(shape) for path, shape in shapes.items()}


def restore_weights(
    folder: Path, expected: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, Array]]:
    """Reads parameters one at a time, each in the dtype and onto the devices that `expected` gives.

    One at a time is as fast where the disk is the bottleneck, needs the host's memory for one parameter only, and makes
    Orbax raise a single error.

    Raises:
        CheckpointError: a parameter is damaged, or holds NaN, infinity or a number beyond its dtype's range.
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
