"""The supported model families, and a model's parameters as one self-describing pytree."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kivi_jax.models import falcon, llama, mistral, qwen
from kivi_jax.models.decoder import Decoder
from kivi_jax.pallas_kernels.decode_attention.api import Implementation

Config = llama.LlamaConfig | falcon.FalconConfig
# (pattern of a checkpoint's whole tensor name, parameter path), or where a tensor holds several parameters
# (pattern, their paths, split), with split(config, tensor) an array for each path. Their shapes, joined along axis 0,
# are the tensor's.
Split = Callable[[Any, np.ndarray], tuple[np.ndarray, ...]]
WeightRow = tuple[str, str] | tuple[str, tuple[str, ...], Split]


@dataclasses.dataclass(frozen=True)
class Family:
    """What turns a checkpoint of one `model_type` into a model.

    Attributes:
        config: reads `config.json`.
        module: the Flax module, built from such a configuration.
        weights: where each tensor of a checkpoint goes.
    """

    config: type[Config]
    module: Callable[..., Decoder]
    weights: tuple[WeightRow, ...]


_FALCON = Family(falcon.FalconConfig, falcon.Falcon, falcon.WEIGHTS)
FAMILIES = {
    "llama": Family(llama.LlamaConfig, llama.Llama, llama.WEIGHTS),
    "mistral": Family(mistral.MistralConfig, llama.Llama, mistral.WEIGHTS),
    "qwen2": Family(qwen.Qwen2Config, llama.Llama, qwen.WEIGHTS),
    "qwen3": Family(qwen.Qwen3Config, llama.Llama, qwen.WEIGHTS),
    "falcon": _FALCON,
    # What Falcons were called before transformers had them.
    "RefinedWeb": _FALCON,
    "RefinedWebModel": _FALCON,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=[
        "model_type",
        "config",
        "end_tokens",
        "tokenizer",
        "sampling_defaults",
        "mesh",
        "decode_attention",
    ],
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
        sampling_defaults: `sampling` as pairs, which can be hashed.
        mesh: the devices that the weights are split over and the KV state will be; None for a single one.
        decode_attention: which implementation of it decodes; `dataclasses.replace(params, decode_attention="xla")`
            keeps a TPU or GPU from running its kernel.
    """

    weights: Any
    model_type: str
    config: Config
    end_tokens: tuple[int, ...] = ()
    tokenizer: str | None = None
    sampling_defaults: tuple[tuple[str, int | float], ...] = ()
    mesh: Mesh | None = None
    decode_attention: Implementation = "auto"

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling that the model's authors recommend, as in `generate(params, prompts, **params.sampling)`."""
        return dict(self.sampling_defaults)

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self.weights)[0].dtype

    def model(self) -> Decoder:
        """The Flax module with these weights."""
        graph, _ = abstract_model(self.model_type, self.config, self.dtype)
        return nnx.merge(graph, self.weights)


@functools.lru_cache
def abstract_model(model_type: str, config: Config, dtype: Any) -> tuple[Any, Any]:
    """The module's graph, and its parameters' shapes and dtypes in the structure of `Params.weights`."""
    module = FAMILIES[model_type].module
    model = nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
