"""Reads named tensors into a model's parameters, one at a time, each onto the devices where it belongs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from kivi_jax.checkpoints.gguf_file import GGUFTensor, is_gguf, read_gguf
from kivi_jax.checkpoints.gguf_weights import weight_rows, weight_tensors
from kivi_jax.checkpoints.hf_files import (
    PIECE_BYTES,
    CheckpointError,
    StoredTensor,
    first_few,
    stored_tensors,
)
from kivi_jax.checkpoints.orbax_files import ORBAX_FOLDER, restore_weights, stored_shapes
from kivi_jax.models.registry import FAMILIES, Split, WeightRow, abstract_model
from kivi_jax.models.sharding import parameter_sharding
from kivi_jax.progress import progress_disabled

# Tensors of older checkpoints that only repeat what config.json says.
IGNORED = re.compile(r".*rotary_emb\.inv_freq")

# Parameters by path, such as "layers.0.attention.k_proj.kernel".
Expected = Mapping[str, jax.ShapeDtypeStruct]


def read_weights(path: Path, model_type: str, config: Any, dtype: Any, mesh: Mesh | None) -> dict[str, Array]:
    """Reads every parameter of a model, by path, after checking all names, shapes and dtypes.

    Raises:
        CheckpointError: as `load`.
    """
    expected = abstract_weights(model_type, config, dtype, mesh)
    if (path / ORBAX_FOLDER).is_dir():
        arrays = _read_orbax(path, expected)
    elif is_gguf(path):
        model = read_gguf(path)
        sources = _match(path, weight_tensors(model), weight_rows(model, config), expected)
        arrays = _read_tensors(sources, config, expected)
    else:
        sources = _match(path, stored_tensors(path), FAMILIES[model_type].weights, expected)
        arrays = _read_tensors(sources, config, expected)
    weights: dict[str, Array] = {}
    with tqdm(
        total=sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values()),
        desc="loading",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        disable=progress_disabled(),
    ) as progress:
        for parameter, array in arrays:
            weights[parameter] = array.block_until_ready()  # else the host might hold many transfers at once
            progress.update(array.nbytes)
    return weights


def abstract_weights(
    model_type: str, config: Any, dtype: Any, mesh: Mesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape, dtype and, on a mesh, sharding of every parameter of a model, by path."""
    _, shapes = abstract_model(model_type, config, dtype)
    weights = {}
    for path, leaf in flatten_paths(shapes).items():
        sharding = None if mesh is None else parameter_sharding(path, leaf.shape, config, mesh)
        weights[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return weights


def _read_orbax(folder: Path, expected: Expected) -> Iterator[tuple[str, Array]]:
    stored = stored_shapes(folder)
    problems = [f"unexpected {path!r}" for path in stored if path not in expected]
    problems += [
        f"{path} has shape {stored[path]}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if stored.get(path, leaf.shape) != leaf.shape
    ]
    _refuse(folder, problems, [path for path in expected if path not in stored])
    return restore_weights(folder, expected)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's tensor, the paths of the parameters in it, and how it is split if there are several."""

    tensor: StoredTensor | GGUFTensor
    paths: tuple[str, ...]
    split: Split | None


def _match(
    path: Path, tensors: Sequence[StoredTensor | GGUFTensor], table: tuple[WeightRow, ...], expected: Expected
) -> list[Source]:
    """Finds the tensors that hold the parameters.

    Raises:
        CheckpointError: tensors and parameters don't match.
    """
    sources: dict[str, Source] = {}
    problems = []
    repeated = []
    for tensor in tensors:
        source = _source(tensor, table)
        if source is not None and not source.paths:
            continue
        if source is None or not all(path in expected for path in source.paths):
            # A tied head is sometimes saved a second time under its own name.
            if source is not None and source.paths == ("head.kernel",):
                repeated.append(tensor)
            elif not IGNORED.fullmatch(tensor.name):
                problems.append(f"unexpected {tensor.name!r}")
            continue
        shapes = [expected[path].shape for path in source.paths]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        if tensor.shape != shape:
            problems.append(f"{tensor.name} has shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in tensor.readable:
            problems.append(f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(tensor.readable)}")
        for parameter in source.paths:
            if (other := sources.setdefault(parameter, source)) is not source:
                problems.append(f"{other.tensor.name} and {tensor.name} are both {parameter}")
    _refuse(path, problems, [parameter for parameter in expected if parameter not in sources])
    for head in repeated:
        _check_tied(head, sources["embed.embedding"].tensor)
    return list(dict.fromkeys(sources.values()))


def _check_tied(head: StoredTensor | GGUFTensor, embedding: StoredTensor | GGUFTensor) -> None:
    """Checks that a head which is stored although it is tied equals the embedding.

    Raises:
        CheckpointError: it differs.
    """
    rows = max(1, PIECE_BYTES // (4 * max(1, math.prod(embedding.shape[1:]))))
    pieces = [(slice(start, start + rows), slice(None)) for start in range(0, embedding.shape[0], rows)]
    equal = head.shape == embedding.shape and all(
        np.array_equal(head.read(piece, np.float32), embedding.read(piece, np.float32)) for piece in pieces
    )
    if not equal:
        raise CheckpointError(
            f"{head.file}: {head.name} differs from {embedding.name}, though config.json ties them; "
            f"set tie_word_embeddings to false there to use it"
        )


def _source(tensor: StoredTensor | GGUFTensor, table: tuple[WeightRow, ...]) -> Source | None:
    for pattern, templates, *split in table:
        if match := re.fullmatch(pattern, tensor.name):
            several = (templates,) if isinstance(templates, str) else templates
            return Source(tensor, tuple(map(match.expand, several)), split[0] if split else None)
    return None


def _read_tensors(sources: list[Source], config: Any, expected: Expected) -> Iterator[tuple[str, Array]]:
    for source in sources:
        leaves = [expected[path] for path in source.paths]
        read = functools.partial(source.tensor.read, dtype=leaves[0].dtype)
        if source.split is None:
            yield source.paths[0], _place(leaves[0], read)
            continue
        parts = source.split(config, read((slice(None),) * len(source.tensor.shape)))
        for path, leaf, part in zip(source.paths, leaves, parts, strict=True):
            yield path, _place(leaf, part.__getitem__)


def _place(leaf: jax.ShapeDtypeStruct, read: Callable[..., np.ndarray]) -> Array:
    """An array on the device or devices of `leaf`; `read` returns the part at an index."""
    if leaf.sharding is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def _refuse(model: Path, problems: list[str], missing: list[str]) -> None:
    problems = problems + [f"missing the tensor for {path}" for path in missing]
    if problems:
        configuration = "its metadata" if is_gguf(model) else "config.json"
        listed = "\n  ".join(first_few(problems))
        raise CheckpointError(f"{model}: the weights don't fit {configuration}:\n  {listed}")


def flatten_paths(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """The leaves of nested dictionaries by their paths, such as "layers.0.mlp.up_proj.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in keys): leaf for keys, leaf in leaves}


def nest_paths(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """The nested dictionaries whose leaves have these paths: the inverse of `flatten_paths`."""
    root: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        branch = root
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return root
