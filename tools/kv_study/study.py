"""The study of one model on one text, and its numbers."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

import kivi_jax
from kivi_jax.progress import progress_disabled
from tools.kv_study.distributions import Distribution, distribution
from tools.kv_study.errors import Attention, Errors, layer_attention, layer_errors
from tools.kv_study.groups import GROUPINGS, Grouping, Pairing
from tools.kv_study.passes import Attended, attended_layers, mean_loss
from tools.teacher_forcing import teacher_forced_logits

BITS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """|x| of every token and channel of a layer's first KV head."""

    layer: int
    keys: Float[np.ndarray, "T D"]
    values: Float[np.ndarray, "T D"]


@dataclasses.dataclass(frozen=True)
class Study:
    """What was measured. Arrays have a row for each layer, and in it one for each head.

    Attributes:
        errors: by grouping and bits.
        losses: mean loss of a token in nats, all keys and values quantized; that of None is the unquantized model's.
        window_losses: the same by bits, with KIVI's exact window.
    """

    model: str
    tokens: int
    group_size: int
    keys: Distribution
    values: Distribution
    attention: Attention
    errors: dict[tuple[Grouping, int], Errors]
    losses: dict[Pairing | None, float]
    window_losses: dict[int, float]
    surfaces: tuple[Surfaces, ...]

    @property
    def layers(self) -> int:
        return len(self.keys.channel_mean)

    def numbers(self) -> dict[str, Any]:
        """All but single tokens, for JSON."""

        def fields(found: Any) -> dict[str, Any]:
            return {name: _numbers(array) for name, array in found._asdict().items() if name != "token_mean"}

        return {
            "model": self.model,
            "tokens": self.tokens,
            "group_size": self.group_size,
            "keys": fields(self.keys),
            "values": fields(self.values),
            "attention": fields(self.attention),
            "errors": [
                {"grouping": grouping, "bits": bits} | fields(errors)
                for (grouping, bits), errors in self.errors.items()
            ],
            "losses": [
                (pairing._asdict() if pairing else {}) | {"loss": loss}
                for pairing, loss in self.losses.items()
            ],
            "window_losses": [{"bits": bits, "loss": loss} for bits, loss in self.window_losses.items()],
        }


def run_study(
    params: kivi_jax.Params,
    model: str,
    tokens: Int[np.ndarray, " T"],
    group_size: int = 32,
    window: bool = True,
) -> Study:
    """The study of `params`, named `model`; without `window` its cache isn't decoded from, which takes the longest.

    Raises:
        ValueError: more tokens than the model has positions, or they or `head_dim` don't divide into groups.
    """
    if len(tokens) > params.config.max_positions:
        raise ValueError(
            f"a text of {len(tokens)} tokens is longer than the model's {params.config.max_positions} positions"
        )
    progress = functools.partial(tqdm, leave=False, disable=progress_disabled())
    text = jnp.asarray(tokens)
    layers = attended_layers(params, text)
    windows = params.config.sliding_windows
    measured = [
        _measure_layer(params, layer, sliding_window, group_size)
        for layer, sliding_window in zip(progress(layers, "errors by layer"), windows, strict=True)
    ]
    attention, errors = zip(*measured, strict=True)
    pairings = [
        Pairing(keys, values, bits, group_size)
        for bits, keys, values in itertools.product(BITS, GROUPINGS, GROUPINGS)
    ]
    keys, values = (
        distribution(np.stack([np.asarray(getattr(layer, name), np.float32) for layer in layers]))
        for name in ("k", "v")
    )
    return Study(
        model=model,
        tokens=len(tokens),
        group_size=group_size,
        keys=keys,
        values=values,
        attention=_stack(attention),
        errors={
            (grouping, bits): _stack([found[grouping, bits] for found in errors])
            for bits in BITS
            for grouping in GROUPINGS
        },
        losses={
            pairing: mean_loss(params, text, pairing) for pairing in progress([None, *pairings], "pairings")
        },
        window_losses={
            bits: _window_loss(params, text, bits, group_size)
            for bits in progress(BITS if window else (), "token by token")
        },
        surfaces=tuple(_surfaces(layers)),
    )


def _measure_layer(
    params: kivi_jax.Params, layer: Attended, sliding_window: int | None, group_size: int
) -> tuple[Attention, dict[tuple[Grouping, int], Errors]]:
    slopes = params.config.alibi_slopes
    slopes = None if slopes is None else np.asarray(slopes, np.float32)
    errors = {
        (grouping, bits): layer_errors(layer, grouping, bits, group_size, sliding_window, slopes)
        for bits in BITS
        for grouping in GROUPINGS
    }
    return jax.device_get((layer_attention(layer, sliding_window, slopes), errors))


def _window_loss(params: kivi_jax.Params, text: Int[jax.Array, " T"], bits: int, group_size: int) -> float:
    """Mean loss of every token but the first, decoded token by token from the library's own cache."""
    kv = kivi_jax.KVConfig(bits, bits, group_size=group_size)
    logits = teacher_forced_logits(params.without_text(), text[None], 1, kv)[:, 0]
    chosen = jnp.take_along_axis(logits, text[1:, None], axis=-1)[:, 0]
    return float((jax.nn.logsumexp(logits, axis=-1) - chosen).mean())


def _surfaces(layers: Sequence[Attended]) -> Iterator[Surfaces]:
    """Of the second layer, a middle one and the last but one, as far as there are so many."""
    last = len(layers) - 1
    for number in sorted({min(1, last), len(layers) // 2, max(last - 1, 0)}):
        keys, values = (np.abs(np.asarray(x[0], np.float32)) for x in (layers[number].k, layers[number].v))
        yield Surfaces(number, keys, values)


def _stack(found: Sequence[Any]) -> Any:
    """Named tuples of arrays of heads, one a layer, as one of arrays of layers and heads."""
    return type(found[0])(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


def _numbers(array: Float[np.ndarray, "..."]) -> Any:
    """As lists of numbers with five digits."""
    return [_numbers(part) for part in array] if array.ndim else float(f"{array:.5g}")
