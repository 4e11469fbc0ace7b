"""Checkpoints written anew in a form that loads straight onto any mesh."""

import shutil
import tempfile
from pathlib import Path

import jax

from kivi_jax.checkpoints.hf_files import INDEX_FILE
from kivi_jax.checkpoints.load import SIDE_FILES, find_folder, load
from kivi_jax.checkpoints.orbax_files import SHAPES_FILE, save_weights
from kivi_jax.checkpoints.weights import flatten_paths


def convert(
    name: str | Path, out: str | Path, dtype: str = "bfloat16", *, revision: str | None = None
) -> None:
    """Writes the model `name` to the new folder `out`: weights as an Orbax checkpoint, and configuration, tokenizer
    and chat templates as they were. `load(out)` then reads it, with any `mesh`.

    The folder gets its name once all of it is there, so an interrupted conversion leaves no `out`; after a kill there
    may be a hidden folder beside it, which `load` refuses.

    Args:
        name: as for `load`.
        out: the folder to write.
        dtype: to store the weights in.
        revision: as for `load`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError, CheckpointError, ValueError: as `load`.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already; name a new folder, or remove this one first")
    source = find_folder(name, revision)
    with jax.default_device(_host()):  # a model may be too large for the first accelerator
        weights = flatten_paths(load(source, dtype).weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".incomplete", dir=out.parent) as parent:
        folder = Path(parent, out.name)
        folder.mkdir()
        save_weights(folder, weights)
        files = {
            str(file.relative_to(source)): file for pattern in SIDE_FILES for file in source.glob(pattern)
        }
        for name in (INDEX_FILE, SHAPES_FILE):  # of the weights as they were
            files.pop(name, None)
        # config.json, without which no folder is a model, comes last.
        for name in sorted(files, key="config.json".__eq__):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(files[name], folder / name)
        folder.rename(out)


def _host() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
