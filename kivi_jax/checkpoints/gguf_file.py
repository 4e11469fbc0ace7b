"""GGUF files, the checkpoints of llama.cpp: their metadata, and tensors that are dequantized piece by piece.

The format is at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, because the gguf
package's reader takes sizes on trust (a length of 2^40 would keep it busy for ever) and makes arrays of every string in
the vocabulary, which takes seconds. The types of tensors, and what their blocks mean, are the package's.
"""

import collections
import dataclasses
import functools
import math
import os
import re
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from kivi_jax.checkpoints.hf_files import CheckpointError, read_in_pieces, shifted

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_AXES = 4
# Large models come in parts, which are named by their numbers; the first has the metadata.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# The types of metadata values, by their numbers in files.
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
UINT32, UINT64 = SCALARS[4], SCALARS[10]
FLOAT32, STRING, ARRAY = 6, 8, 9

Value = bool | int | float | str | list[str] | np.ndarray
Kind = TypeVar("Kind")
# What errors call them.
KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}


def is_gguf(path: Path) -> bool:
    """Whether a model's path is a GGUF file, and not a folder."""
    return path.suffix == SUFFIX and not path.is_dir()


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file, as the file's header describes it.

    Attributes:
        file: the GGUF file.
        name: the tensor's name in the file.
        shape: the whole tensor's shape. In the file it is reversed.
        dtype: the gguf package's name of its type, such as "Q4_1".
        start: the position of its first byte in the file.
        row_bytes: the size of a row, which is the last axis, in the file.
        offset: is added to its elements.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    row_bytes: int
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    @property
    def readable(self) -> tuple[str, ...]:
        """The types that can be dequantized."""
        return _readable_types()

    def read(self, index: tuple[slice, ...], dtype: Any) -> Float[np.ndarray, "..."]:
        """Reads the part at `index`, a slice for each axis, of a tensor with one or two axes, as `dtype`.

        Whole rows are dequantized, a few at a time, also where only some of their columns are wanted.

        Raises:
            CheckpointError: the file can't be read, or the part holds NaN, infinity or a number beyond `dtype`'s range.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        columns = slice(*bounds[-1])
        label = f"{self.file}: {self.name}"
        if len(shape) == 1:
            row = self._dequantized(slice(0, 1))[0, columns]
            return read_in_pieces(shape, dtype, row.__getitem__, row.itemsize, label)
        first, _ = bounds[0]
        return read_in_pieces(
            shape,
            dtype,
            lambda rows: self._dequantized(shifted(rows, first))[:, columns],
            np.dtype(np.float32).itemsize * self.shape[-1],
            label,
        )

    def _dequantized(self, rows: slice) -> Float[np.ndarray, "rows columns"]:
        wanted = (rows.stop - rows.start) * self.row_bytes
        try:
            stored = np.fromfile(self.file, np.uint8, wanted, offset=self.start + rows.start * self.row_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.file} can't be read: {error}") from None
        if stored.size < wanted:
            raise CheckpointError(f"{self.file} is cut short: {self.name} is not all there")
        with np.errstate(all="ignore"):  # a damaged scale overflows, which is found later
            numbers = _dequantize(stored.reshape(-1, self.row_bytes), self.dtype)
            return numbers + np.float32(self.offset) if self.offset else numbers


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file, or the parts of one.

    Attributes:
        path: the file, or the first part.
        metadata: what the file says of the model, by key.
        tensors: those of all parts.
        parts: how many bytes each file's metadata and descriptions of tensors have.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[GGUFTensor, ...]
    parts: Mapping[Path, int]

    def get(self, key: str, kind: type[Kind]) -> Kind | None:
        """The value of `key`, None if there is none. A whole number will do where a number is asked for.

        Raises:
            CheckpointError: it is not of that kind.
        """
        value: Any = self.metadata.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            what = KINDS[type(value)] if isinstance(value, list | np.ndarray) else reprlib.repr(value)
            raise CheckpointError(f"{self.path}: {key} must be {KINDS[kind]}, got {what}")
        return value

    @property
    def architecture(self) -> str | None:
        return self.get("general.architecture", str)

    def hyperparameter(self, name: str, kind: type[Kind]) -> Kind | None:
        """The value of a key that begins with the architecture's name, as `get`."""
        return self.get(f"{self.architecture}.{name}", kind)

    def tensor(self, name: str) -> GGUFTensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_gguf(path: Path) -> GGUFModel:
    """Reads what a GGUF file, and the further parts of one that comes in parts, say of themselves.

    Raises:
        CheckpointError: a file is damaged, cut short or of an unknown version; a part is missing, or the file is not
            the first one; or the gguf package is not installed.
    """
    first = _read_part(path)
    count = first.get("split.count", int) or 1
    if count <= 1:
        return first
    named = PART.fullmatch(path.name)
    if named is None or named[2] != "00001" or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts; name the first one, as ...-00001-of-{count:05}{SUFFIX}, with the others "
            "beside it"
        )
    paths = [
        path.with_name(f"{named[1]}-{number:05}-of-{count:05}{SUFFIX}") for number in range(2, count + 1)
    ]
    if missing := [other.name for other in paths if not other.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, and {missing[0]} is not beside it")
    parts = [first, *map(_read_part, paths)]
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    _refuse_repeated(path, [tensor.name for tensor in tensors])
    if len(tensors) != (total := first.get("split.tensors.count", int) or len(tensors)):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors, expected {total}")
    sizes = {file: size for part in parts for file, size in part.parts.items()}
    return dataclasses.replace(first, tensors=tensors, parts=sizes)


def _read_part(path: Path) -> GGUFModel:
    _package()  # rather now than after the vocabulary
    try:
        with path.open("rb") as file:
            return _read_header(path, _Reader(path, file))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None


class _Reader:
    """Reads a file from its beginning, and never asks for more than is left of it."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def bytes(self, count: int) -> bytes:
        read = self._file.read(count) if count <= self.size - self.position else b""
        if len(read) < count:
            raise CheckpointError(
                f"{self.path} is damaged or cut short: {count} bytes from byte {self.position} on would go beyond its "
                f"end at {self.size}"
            )
        self.position += count
        return read

    def number(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.bytes(kind.size))[0]

    def text(self) -> str:
        stored = self.bytes(self.number(UINT64))
        try:
            return stored.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} is damaged: {stored[:40]!r} is not UTF-8") from None

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        if kind == FLOAT32:
            return float(
                str(np.float32(self.number(SCALARS[kind])))
            )  # 1e-5, as config.json has it, not 9.999999747e-6
        if kind != ARRAY:
            return self.number(self._scalar(kind))
        kind, count = self.number(UINT32), self.number(UINT64)
        if kind == STRING:
            return [self.text() for _ in range(count)]  # ends at the end of the file, whatever the count
        scalar = self._scalar(kind)
        return np.frombuffer(self.bytes(count * scalar.size), scalar.format)

    def _scalar(self, kind: int) -> struct.Struct:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path} is damaged: there are no values of type {kind} in GGUF")
        return SCALARS[kind]


def _read_header(path: Path, reader: _Reader) -> GGUFModel:
    if (magic := reader.bytes(len(MAGIC))) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}")
    if (version := reader.number(UINT32)) not in VERSIONS:
        order = ", or its bytes are in big-endian order" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path} has version {version} of GGUF, only {VERSIONS[0]} and {VERSIONS[-1]} are supported{order}"
        )
    tensor_count, field_count = reader.number(UINT64), reader.number(UINT64)
    metadata: dict[str, Value] = {}
    for _ in range(field_count):
        key = reader.text()
        if key in metadata:
            raise CheckpointError(f"{path} is damaged: it has {key} twice")
        metadata[key] = reader.value(reader.number(UINT32))
    tensors = [_read_tensor(path, reader) for _ in range(tensor_count)]
    header = reader.position
    model = GGUFModel(path, metadata, (), {path: header})
    alignment = model.get("general.alignment", int)
    alignment = DEFAULT_ALIGNMENT if alignment is None else alignment
    if alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of two, got {alignment}")
    start = header + -header % alignment
    tensors = [dataclasses.replace(tensor, start=start + tensor.start) for tensor in tensors]
    _check_places(path, tensors, start, alignment, reader.size)
    return dataclasses.replace(model, tensors=tuple(tensors))


def _read_tensor(path: Path, reader: _Reader) -> GGUFTensor:
    """A tensor whose `start` still counts from the first tensor."""
    name = reader.text()
    axes = reader.number(UINT32)
    if not 1 <= axes <= MOST_AXES:
        raise CheckpointError(f"{path} is damaged: {name!r} has {axes} axes, expected 1 to {MOST_AXES}")
    shape = tuple(reversed([reader.number(UINT64) for _ in range(axes)]))
    number, start = reader.number(UINT32), reader.number(UINT64)
    if number not in (types := _types()):
        raise CheckpointError(
            f"{path}: {name!r} is of type {number}, which this version of the gguf package doesn't know"
        )
    dtype, block, block_bytes = types[number]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(
            f"{path} is damaged: {name!r} has shape {shape}, and rows of {dtype} must be whole blocks of {block}"
        )
    return GGUFTensor(path, name, shape, dtype, start, shape[-1] // block * block_bytes)


def _check_places(path: Path, tensors: list[GGUFTensor], start: int, alignment: int, size: int) -> None:
    _refuse_repeated(path, [tensor.name for tensor in tensors])
    end = start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end or (tensor.start - start) % alignment:
            raise CheckpointError(
                f"{path} is damaged: {tensor.name!r} begins within another tensor or its padding"
            )
        end = tensor.start + tensor.nbytes
        if end > size:
            raise CheckpointError(
                f"{path} is damaged or cut short: {tensor.name!r} ends at byte {end}, and the file at {size}"
            )


def _refuse_repeated(path: Path, names: list[str]) -> None:
    name, count = collections.Counter(names).most_common(1)[0] if names else ("", 1)
    if count > 1:
        raise CheckpointError(f"{path} is damaged: it has the tensor {name!r} {count} times")


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "GGUF files are read with the package gguf, which is not installed; pip install gguf, or kivi-jax[gguf]"
        ) from None
    return gguf


@functools.cache
def _types() -> dict[int, tuple[str, int, int]]:
    """The types of tensors by their numbers in files: name, and elements and bytes of a block."""
    sizes = _package().GGML_QUANT_SIZES
    return {int(kind): (kind.name, *size) for kind, size in sizes.items()}


@functools.cache
def _readable_types() -> tuple[str, ...]:
    """Names of the types that the package can dequantize, which it only says by doing it."""
    readable = []
    for name, _, block_bytes in _types().values():
        try:
            _dequantize(np.zeros((1, block_bytes), np.uint8), name)
        except NotImplementedError:
            continue
        readable.append(name)
    return tuple(readable)


def _dequantize(stored: UInt8[np.ndarray, "rows bytes"], dtype: str) -> Float[np.ndarray, "rows columns"]:
    package = _package()
    return package.dequantize(stored, package.GGMLQuantizationType[dtype])
