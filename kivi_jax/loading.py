"""Checkpoints in, `Params` out: Hugging Face folders of config.json and safetensors."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from kivi_jax.models.registry import FAMILIES, Config, Family, Params, Split, WeightRow, abstract_model

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"
DTYPES = ("bfloat16", "float16", "float32")
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Tensors of older checkpoints that hold nothing a configuration doesn't.
IGNORED = re.compile(r".*rotary_emb\.inv_freq")


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or of a kind that isn't supported."""


def load(name: str | Path, dtype: str = "bfloat16") -> Params:
    """Loads a model from a folder, from the Hugging Face Hub, or the small one that comes with the package.

    Args:
        name: a folder with config.json and safetensors, `"org/name"` of a Hub repository, or `"demo"`.
        dtype: of the weights and activations: "bfloat16", "float16" or "float32".

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: what the checkpoint lacks, has too much of, or has in the wrong shape, all of it at once; or
            an unsupported architecture.
        ValueError: an unknown `dtype`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = _find_folder(str(name))
    fields = _read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    try:
        config = family.config.from_json(fields)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _, shapes = abstract_model(model_type, config, jnp.dtype(dtype))
    return Params(
        weights=_load_weights(folder, family, config, shapes, dtype),
        model_type=model_type,
        config=config,
        end_tokens=_end_tokens(folder, fields),
        tokenizer=str(folder) if any((folder / file).exists() for file in TOKENIZER_FILES) else None,
    )


def _find_folder(name: str) -> Path:
    if name == "demo":
        return DEMO_FOLDER
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(
            f"no folder {name!r}; a model is a folder with config.json and safetensors, "
            f"'org/name' on the Hugging Face Hub, or 'demo'"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except (
        Exception
    ) as error:  # the Hub client raises many unrelated kinds: no network, no such repository, gated
        raise FileNotFoundError(
            f"no folder {name!r}, and no such model from the Hugging Face Hub: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _end_tokens(folder: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids; generation_config.json, where there is one, knows more of them than config.json."""
    generation = folder / "generation_config.json"
    ids = _read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = fields.get("eos_token_id") if ids is None else ids
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and 0 <= token < 2**31 for token in listed):
        raise CheckpointError(f"{folder}: eos_token_id must be a token id or a list of them, got {ids!r}")
    return tuple(listed)


def _load_weights(
    folder: Path, family: Family, config: Config, shapes: Mapping[Any, Any], dtype: str
) -> dict[Any, Any]:
    """Every parameter of the module, converted tensor by tensor, after all names and shapes were checked."""
    expected = {_path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    sources: dict[tuple[str, ...], tuple[Path, str, Any]] = {}
    problems = []
    for file in _weight_files(folder):
        for name, shape in _tensor_shapes(file):
            targets, split = _targets(name, family.weights)
            if not targets or not expected.keys() >= set(targets):
                # A tied head is sometimes saved a second time under its own name.
                if not IGNORED.fullmatch(name) and targets != ("head.kernel",):
                    problems.append(f"unexpected {name}")
                continue
            rows = sum(expected[target][0] for target in targets)
            if shape != (whole := (rows, *expected[targets[0]][1:])):
                problems.append(f"{name} has shape {shape}, expected {whole}")
            sources[targets] = (file, name, split)
    found = {target for targets in sources for target in targets}
    problems += [f"missing the tensor for {path}" for path in expected if path not in found]
    if problems:
        raise CheckpointError(f"{folder}: the weights don't fit config.json:\n  " + "\n  ".join(problems))
    weights: dict[Any, Any] = {}
    bar = tqdm(sources.items(), desc="loading", unit="tensor", leave=False, disable=None)
    for targets, (file, name, split) in bar:
        try:
            with safe_open(file, framework="np") as tensors:
                tensor = tensors.get_tensor(name)
        except (SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy does not have
            raise CheckpointError(f"{file}: {name} can't be read: {error}") from None
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}, expected floating point")
        parts = (tensor,) if split is None else split(config, tensor)
        for target, part in zip(targets, parts, strict=True):
            _insert(weights, target, jnp.asarray(part, dtype))
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, single or sharded."""
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX_FILE} must map tensors to files under 'weight_map'")
        names = set(weight_map.values())
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX_FILE} names files outside the folder: {sorted(outside)}")
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    if missing := [file.name for file in files if not file.exists()]:
        pickled = any(folder.glob("*.bin"))
        advice = "; pickled .bin weights are never loaded, save them as safetensors" if pickled else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}{advice}")
    return files


def _tensor_shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes from a file's header."""
    try:
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dictionary
                yield name, tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from None


def _targets(name: str, table: tuple[WeightRow, ...]) -> tuple[tuple[str, ...], Split | None]:
    """Parameter paths of a checkpoint's tensor, and what splits it where they are several."""
    for pattern, paths, *split in table:
        if match := re.fullmatch(pattern, name):
            templates = (paths,) if isinstance(paths, str) else paths
            return tuple(match.expand(template) for template in templates), next(iter(split), None)
    return (), None


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in keys)


def _insert(weights: dict[Any, Any], path: str, tensor: Any) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for parent in parents:
        weights = weights.setdefault(parent, {})
    weights[last] = tensor
