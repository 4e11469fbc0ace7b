"""A model as one self-describing pytree, and how functions of it are compiled."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh

from kivi_jax.models.decoder import Decoder
from kivi_jax.models.registry import Config, abstract_model
from kivi_jax.models.sharding import DATA_AXIS
from kivi_jax.pallas_kernels.dispatch import Implementation
from kivi_jax.partition import Partition, make_partition
from kivi_jax.promotion import with_usual_promotion

Arguments = ParamSpec("Arguments")
Result_co = TypeVar("Result_co", covariant=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=[
        "model_type",
        "config",
        "mesh",
        "decode_attention",
        "end_tokens",
        "tokenizer",
        "sampling_defaults",
    ],
)
@dataclasses.dataclass(frozen=True)
class Params:
    """A model: its weights, and all that is needed to run them and to read and write its texts.

    Attributes:
        weights: nested dictionaries of arrays, named as in the Flax module.
        model_type: the key of its family in `FAMILIES`.
        config: the family's configuration.
        end_tokens: the ids that end a completion.
        tokenizer: the folder with the tokenizer's files, or the GGUF file with the tokenizer, if there is one.
        sampling_defaults: `sampling` as pairs, which can be hashed.
        mesh: the devices that the weights are split over and the KV state will be; None for a single one.
        decode_attention: which implementation of it decodes, and attends chunks; with "xla" in its place, as by
            `dataclasses.replace`, a TPU or GPU does not run its kernels.
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

    @property
    def data_devices(self) -> int:
        """How many parts of equally many rows the mesh splits batches into."""
        return 1 if self.mesh is None else self.mesh.shape.get(DATA_AXIS, 1)

    def partition(self, batch: int) -> Partition:
        """How a batch is spread over the mesh."""
        return make_partition(self.config, self.mesh, batch)

    def without_text(self) -> "Params":
        """The model without what only its texts need: the part that compiled programs depend on."""
        if not (self.end_tokens or self.tokenizer or self.sampling_defaults):
            return self
        return dataclasses.replace(self, end_tokens=(), tokenizer=None, sampling_defaults=())


@runtime_checkable
class Compiled(Protocol[Arguments, Result_co]):
    """A function of the model and other arguments, compiled as `jax.jit` compiles it and with its methods."""

    def __call__(self, params: Params, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result_co: ...

    lower: Callable[..., Any]
    trace: Callable[..., Any]
    eval_shape: Callable[..., Any]
    clear_cache: Callable[[], None]


def jit_of_params(
    function: Callable[Concatenate[Params, Arguments], Result_co],
    *,
    static_argnames: str | Iterable[str] = (),
    donate_argnames: str | Iterable[str] = (),
) -> Compiled[Arguments, Result_co]:
    """`jax.jit` of a function whose first argument is the model, computed with JAX's usual promotion.

    A call leaves out what only texts need, so that another tokenizer or end token is not another compilation. What is
    lowered or traced is for a model just as it is given.
    """
    jitted: Any = jax.jit(
        with_usual_promotion(function), static_argnames=static_argnames, donate_argnames=donate_argnames
    )

    @functools.wraps(function)
    def compiled(params: Params, *args: Any, **kwargs: Any) -> Any:
        return jitted(params.without_text(), *args, **kwargs)

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
        setattr(compiled, name, getattr(jitted, name))
    return cast(Compiled[Arguments, Result_co], compiled)
