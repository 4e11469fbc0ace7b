"""The supported model families, and a model's parameters as one self-describing pytree."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from kivi_jax.models import llama


@dataclasses.dataclass(frozen=True)
class Family:
    """What turns a checkpoint of one `model_type` into a model.

    Attributes:
        config: reads `config.json`.
        module: the Flax module, built from such a configuration.
        weights: checkpoint name (a pattern for the whole name) -> parameter path.
    """

    config: type[llama.LlamaConfig]
    module: type[llama.Llama]
    weights: tuple[tuple[str, str], ...]


FAMILIES = {"llama": Family(llama.LlamaConfig, llama.Llama, llama.WEIGHTS)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["model_type", "config", "end_tokens", "tokenizer"],
)
@dataclasses.dataclass(frozen=True)
class Params:
    """A model: its weights, and all that is needed to run them.

    Attributes:
        weights: nested dictionaries of arrays, named as in the Flax module.
        model_type: the key of its family in `FAMILIES`.
        config: the family's configuration.
        end_tokens: the ids that end a completion.
        tokenizer: the folder with the tokenizer's files, if there is one.
    """

    weights: Any
    model_type: str
    config: llama.LlamaConfig
    end_tokens: tuple[int, ...] = ()
    tokenizer: str | None = None

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self.weights)[0].dtype

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for `generate` that the checkpoint recommends."""
        return {}

    def model(self) -> llama.Llama:
        """The Flax module with these weights."""
        graph, _ = abstract_model(self.model_type, self.config, self.dtype)
        return nnx.merge(graph, self.weights)


@functools.lru_cache
def abstract_model(model_type: str, config: llama.LlamaConfig, dtype: Any) -> tuple[Any, Any]:
    """The module's graph, and its parameters' shapes and dtypes in the structure of `Params.weights`."""
    module = FAMILIES[model_type].module
    model = nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
