"""Converts models to Orbax checkpoints, from which the devices of any mesh read their own parts."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from kivi_jax.checkpoints.gguf_config import read_fields
from kivi_jax.checkpoints.gguf_file import is_gguf, read_gguf
from kivi_jax.checkpoints.hf_files import INDEX_FILE
from kivi_jax.checkpoints.load import SIDE_FILES, find_model, load
from kivi_jax.checkpoints.orbax_files import SHAPES_FILE, save_weights
from kivi_jax.checkpoints.weights import flatten_paths
from kivi_jax.text import load_tokenizer


def convert(
    name: str | Path, out: str | Path, dtype: str = "bfloat16", *, revision: str | None = None
) -> None:
    """Writes the model `name` to the new folder `out`: its weights as an Orbax checkpoint, and its configuration,
    tokenizer and chat templates unchanged. `load(out)` then reads it, with any `mesh`. What a GGUF file has of these is
    written in the files of a Hugging Face checkpoint.

    The folder is written under a hidden name beside `out` and renamed once it is complete. An interrupted conversion
    leaves nothing; a killed one may leave the hidden folder, which `load` refuses.

    Args:
        name: as for `load`.
        out: the folder to write.
        dtype: of the stored weights, as for `load`.
        revision: as for `load`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError, CheckpointError, ValueError: as `load`; or a GGUF file's tokenizer is damaged.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already; name a new folder, or remove this one first")
    source = find_model(name, revision)
    with jax.default_device(_host()):  # a model may be too large for the first accelerator
        params = load(source, dtype)
    weights = flatten_paths(params.weights)
    tokenizer = load_tokenizer(params.tokenizer) if is_gguf(source) and params.tokenizer else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(out) as parent:
        folder = parent / out.name
        folder.mkdir()
        save_weights(folder, weights)
        # In both cases config.json comes last: without it the folder is not yet a model.
        if is_gguf(source):
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            fields = json.dumps(read_fields(read_gguf(source)), indent=2)
            (folder / "config.json").write_text(fields + "\n", encoding="utf-8")
        else:
            _copy_side_files(source, folder)
        folder.rename(out)


def _copy_side_files(source: Path, folder: Path) -> None:
    files = {str(file.relative_to(source)): file for pattern in SIDE_FILES for file in source.glob(pattern)}
    for name in (INDEX_FILE, SHAPES_FILE):  # they describe the weights in their old form
        files.pop(name, None)
    for name in sorted(files, key="config.json".__eq__):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(files[name], folder / name)


@contextlib.contextmanager
def _hidden_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".incomplete", dir=out.parent))
    try:
        yield folder
    finally:
        # Threads of a write that failed may still add files: the folder is then not empty once it was emptied.
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def _host() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return None
