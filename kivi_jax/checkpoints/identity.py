"""Tells models apart without reading all of their weights."""

import hashlib
from pathlib import Path

from kivi_jax.checkpoints.load import SIDE_FILES
from kivi_jax.checkpoints.orbax_files import ORBAX_FOLDER

WEIGHT_FILES = ("model*.safetensors", f"{ORBAX_FOLDER}/**/*")
SAMPLES = 16  # of a file of weights, evenly spread; training changes nearly every number
SAMPLE_BYTES = 4096


def model_identity(folder: Path) -> str:
    """A hash of the model's small files, and of the names, sizes and some pieces of those with its weights.

    The same for copies of a model in other folders, and another for one that was trained further.
    """
    digest = hashlib.sha256()
    for patterns, read in ((SIDE_FILES, Path.read_bytes), (WEIGHT_FILES, _read_samples)):
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(read(path))
    return digest.hexdigest()[:16]


def _read_samples(path: Path) -> bytes:
    size, samples = path.stat().st_size, []
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)
