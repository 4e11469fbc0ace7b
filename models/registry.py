"""The supported model families."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from kivi_jax.models import falcon, gemma, llama, mistral, qwen
from kivi_jax.models.decoder import Decoder

Config = llama.LlamaConfig | falcon.FalconConfig
# (pattern of a checkpoint's whole tensor name, parameter path), or where a tensor holds several parameters
# (pattern, their paths, split), with split(config, tensor) an array for each path. Their shapes, joined along axis 0,
# are the tensor's. (pattern, ()) are tensors that the model has no use for.
Split = Callable[[Any, np.ndarray], tuple[np.ndarray, ...]]
WeightRow = tuple[str, str] | tuple[str, tuple[()]] | tuple[str, tuple[str, ...], Split]


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


_GEMMA3 = Family(gemma.Gemma3Config, gemma.Gemma3, gemma.WEIGHTS)
_FALCON = Family(falcon.FalconConfig, falcon.Falcon, falcon.WEIGHTS)
FAMILIES = {
    "llama": Family(llama.LlamaConfig, llama.Llama, llama.WEIGHTS),
    "mistral": Family(mistral.MistralConfig, llama.Llama, mistral.WEIGHTS),
    "qwen2": Family(qwen.Qwen2Config, llama.Llama, qwen.WEIGHTS),
    "qwen3": Family(qwen.Qwen3Config, llama.Llama, qwen.WEIGHTS),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,  # with a vision tower, which is left out
    "falcon": _FALCON,
    # What Falcons were called before transformers had them.
    "RefinedWeb": _FALCON,
    "RefinedWebModel": _FALCON,
}


@functools.lru_cache
def abstract_model(model_type: str, config: Config, dtype: Any) -> tuple[Any, Any]:
    """The module's graph, and its parameters' shapes and dtypes in the structure of `Params.weights`."""
    module = FAMILIES[model_type].module
    model = nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)
