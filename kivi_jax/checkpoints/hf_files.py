"""Hugging Face checkpoints on disk: JSON files, and tensors in safetensors files that are read piece by piece."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
# The dtypes that weights may be stored in, by safetensors' names. Dtypes of 8 bits or fewer would need scales.
STORED_DTYPES = ("BF16", "F16", "F32", "F64")
# At most this many problems are listed in an error.
LISTED_PROBLEMS = 20
# Bytes of a tensor that are read and converted at a time.
PIECE_BYTES = 2**24


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or of a kind that isn't supported."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it.

    Attributes:
        file: the safetensors file.
        name: the tensor's name in the file.
        shape: the whole tensor's shape.
        dtype: safetensors' name of its dtype, such as "BF16".
        readable: the dtypes that can be read.
    """

    readable: ClassVar = STORED_DTYPES

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: tuple[slice, ...], dtype: Any) -> Float[np.ndarray, "..."]:
        """Reads the part of the tensor at `index`, a slice for each axis, as `dtype`.

        The file is mapped only while it is read, and memory holds the part only once.

        Raises:
            CheckpointError: the file can't be read, or the part holds NaN, infinity or a number beyond `dtype`'s range.
        """
        (first, last), *others = (cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True))
        shape = (last - first, *(stop - start for start, stop in others))
        with _open(self.file) as tensors:
            stored = tensors.get_slice(self.name)
            return read_in_pieces(
                shape,
                dtype,
                lambda rows: stored[(shifted(rows, first), *(slice(*bounds) for bounds in others))],
                np.dtype(dtype).itemsize * math.prod(shape[1:]),
                f"{self.file}: {self.name}",
            )


def read_in_pieces(
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[slice], Float[np.ndarray, "rows ..."]],
    row_bytes: int,
    label: str,
) -> Float[np.ndarray, "..."]:
    """A tensor, or a part of one, that `read` returns some rows of, each `row_bytes` large until it is converted.

    Raises:
        CheckpointError: it holds NaN, infinity or a number beyond `dtype`'s range. The error begins with `label`.
    """
    part = _aligned_empty(shape, np.dtype(dtype))
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, len(part), step):
        rows = slice(start, min(start + step, len(part)))
        piece = read(rows)
        with np.errstate(over="ignore"):
            converted = piece.astype(dtype, copy=False)
        if not np.isfinite(converted).all():
            raise CheckpointError(f"{label} {_what_is_wrong(piece, part.dtype)}")
        part[rows] = converted
    return part


def shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> Float[np.ndarray, "..."]:
    """An uninitialized array, aligned so that JAX on a CPU uses its memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _what_is_wrong(piece: Float[np.ndarray, "..."], dtype: np.dtype) -> str:
    if not np.isfinite(piece).all():
        return "holds NaN or infinity"
    return out_of_range(dtype)


def out_of_range(dtype: Any) -> str:
    """Says in an error that a weight overflows in `dtype`."""
    advice = "; load it as bfloat16 or float32" if dtype == jnp.float16 else ""
    return f"holds numbers beyond {dtype}'s range{advice}"


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, from the headers of its files.

    Raises:
        CheckpointError: files are missing, damaged, pickled, outside the folder, or two of them hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for tensor in _header(file):
            if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
                raise CheckpointError(
                    f"{folder}: {other.file.name} and {file.name} both hold {tensor.name!r}; which counts is unknown"
                )
    return list(tensors.values())


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those that its index names."""
    if (folder / INDEX_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        listed = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not listed or not all(isinstance(name, str) for name in listed):
            raise CheckpointError(f"{folder / INDEX_FILE}: weight_map must map tensors to files")
        names = set(listed)
        if outside := [
            name for name in names if Path(name).name != name or not name.endswith(".safetensors")
        ]:
            raise CheckpointError(
                f"{folder / INDEX_FILE} names files outside the folder, or not safetensors: "
                + ", ".join(first_few(sorted(map(repr, outside))))
            )
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / WEIGHTS_FILE]
    if missing := [file.name for file in files if not file.exists()]:
        advice = ""
        if any(file for pattern in PICKLED for file in folder.glob(pattern)):
            advice = (
                "; pickled weights (.bin, .pt, .pth) are never loaded, as loading them can run code: take a revision "
                "with safetensors, or save them again as safetensors"
            )
        elif missing == [WEIGHTS_FILE]:
            advice = (
                f"; weights are read from it or from the shards that {INDEX_FILE} names, with the tensors' names of "
                "transformers, and from no other kind of file"
            )
        raise CheckpointError(f"{folder} lacks {', '.join(first_few(missing))}{advice}")
    return files


def first_few(lines: list[str]) -> list[str]:
    """The first lines of a list, as many as an error may have, and how many more there are."""
    rest = len(lines) - LISTED_PROBLEMS
    return [*lines[:LISTED_PROBLEMS], f"and {rest} more"] if rest > 0 else lines


def _header(file: Path) -> list[StoredTensor]:
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118, not a dictionary
        return [
            StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        ]


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
