"""Tells models apart without reading all of their weights."""

import hashlib
from pathlib import Path

from kivi_jax.checkpoints.gguf_file import is_gguf, read_gguf
from kivi_jax.checkpoints.load import SIDE_FILES
from kivi_jax.checkpoints.orbax_files import ORBAX_FOLDER

WEIGHT_FILES = ("model*.safetensors", f"{ORBAX_FOLDER}/**/*")
SAMPLES = 16  # of a file of weights, evenly spread; training changes nearly every number
SAMPLE_BYTES = 4096


def model_identity(path: Path) -> str:
    """A hash of the small files of a model's folder, and of the names, sizes and some pieces of those with its weights;
    or of a GGUF file's metadata, its size and some pieces of it.

    The same for copies of a model in other places, and another for one that was trained further.
    """
    digest = hashlib.sha256()
    if is_gguf(path):
        for part, header in read_gguf(path).parts.items():
            digest.update(f"{part.stat().st_size} ".encode())
            with part.open("rb") as opened:
                digest.update(opened.read(header))
            digest.update(_read_samples(part))
        return digest.hexdigest()[:16]
    for patterns, read in ((SIDE_FILES, Path.read_bytes), (WEIGHT_FILES, _read_samples)):
        for file in sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()}):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
            digest.update(read(file))
    return digest.hexdigest()[:16]


def _read_samples(path: Path) -> bytes:
    size, samples = path.stat().st_size, []
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)
