"""Loads models from folders and from the Hugging Face Hub."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from huggingface_hub import snapshot_download
from jax.sharding import Mesh

from kivi_jax.arguments import read_size
from kivi_jax.checkpoints import generation_config
from kivi_jax.checkpoints.hf_files import CheckpointError, read_json
from kivi_jax.checkpoints.key_bias_notice import warn_of_large_key_biases
from kivi_jax.checkpoints.weights import nest_paths, read_weights
from kivi_jax.model import Params
from kivi_jax.models.fields import GREATEST_SIZE
from kivi_jax.models.registry import FAMILIES
from kivi_jax.models.sharding import tensor_parallel_mesh

DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo"
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
    """Loads a model from a folder, from the Hugging Face Hub, or the small one that comes with the package.

    Weights are read one at a time, and with a `mesh` in the parts that its devices need, so that the host holds little
    beyond the model itself: at most the largest safetensors file.

    Args:
        name: a folder with config.json and safetensors, or one that `kivi-jax convert` wrote; `"org/name"` of a Hub
            repository, downloaded once, and without network (or with HF_HUB_OFFLINE=1) taken from the Hub client's
            cache; or `"demo"`.
        dtype: of weights and activations; "bfloat16", "float16" or "float32".
        revision: branch, tag or commit of a Hub repository; its main branch by default.
        mesh: devices with an axis named "model" to split the weights and the KV heads over (`models/sharding.py`), and
            optionally one named "data" to split batches over; other axes hold copies. By default, one device holds all.
        max_positions: the longest text in tokens, prompt and completion together, for a model that was tuned for
            another length than its config.json says, as is common with linear rope scaling. Only this limit changes,
            not what is computed within it.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype, all of which are listed; files
            are damaged; weights are NaN, infinite or beyond the range of `dtype`; or the architecture is unsupported.
        ValueError: `dtype` is unknown, `revision` is given for something that isn't on the Hub, `mesh` has no axis
            "model", or `max_positions` is not a whole number from 1 to 2^31 - 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if mesh is not None:
        mesh = tensor_parallel_mesh(mesh)
    _check_max_positions(max_positions)  # before anything is downloaded
    params = describe(folder := find_folder(name, revision), max_positions)
    weights = read_weights(folder, params.model_type, params.config, jnp.dtype(dtype), mesh)
    warn_of_large_key_biases(weights, params.config)
    return dataclasses.replace(params, weights=nest_paths(weights), mesh=mesh)


def describe(folder: Path, max_positions: int | None = None) -> Params:
    """The model in a folder without its weights, which is all that encoding prompts needs.

    Raises:
        CheckpointError, ValueError: as `load`.
    """
    max_positions = _check_max_positions(max_positions)
    fields = read_json(folder / "config.json")
    model_type, config = _read_config(folder, fields)
    if max_positions is not None:
        config = dataclasses.replace(config, max_positions=max_positions)
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


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded if necessary. Arguments and errors are those of `load`."""
    name = str(name)
    folder = DEMO_FOLDER if name == "demo" else Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} is for a model on the Hugging Face Hub, and {name!r} is a folder"
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(
            f"no folder {name!r}; a model is a folder with config.json and safetensors, "
            f"'org/name' on the Hugging Face Hub, or 'demo'"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the Hub client raises many unrelated kinds: no network, no access, …
        raise FileNotFoundError(
            f"no folder {name!r}, and no such model from the Hugging Face Hub: {error}"
        ) from error


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).exists() for name in names) for names in TOKENIZER_FILES)


def _read_config(folder: Path, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The model type, and the family's configuration."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not supported, only {', '.join(FAMILIES)}"
        )
    try:
        return model_type, FAMILIES[model_type].config.from_json(fields)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
