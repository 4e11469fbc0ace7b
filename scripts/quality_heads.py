"""Draws in which layers and KV heads caches change attention, for one text (extra `plots`).

    python -m scripts.quality_heads smollm2 heads.png --kv kivi2,kivi2-plus

A cell is the squared error of what a KV head's queries get, as decoding reads the cache, relative to what they get from
exact keys and values: of the tokens that come after the first window, whose own keys and values are exact in both.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from jaxtyping import Float

import kivi_jax
from kivi_jax.cli import one_line_errors
from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import resolve_kv
from kivi_jax.kv.state import empty_state
from kivi_jax.model import Params
from kivi_jax.pallas_kernels.decode_attention.in_parallel import decode_attention_in_parallel
from kivi_jax.pallas_kernels.heads import Heads
from kivi_jax.pallas_kernels.prefill_attention.api import prefill_attention
from kivi_jax.text import encode
from tools.kv_study.passes import Attended, attended_layers
from tools.prose import PROSE


def main(
    model: Annotated[str, typer.Argument(help="Whatever kivi_jax.load takes.")],
    out: Annotated[Path, typer.Argument(help="The picture, .png or .svg.")],
    kv: Annotated[str, typer.Option(help="Caches side by side, with commas.")] = "kivi2,kivi2-plus",
    text: Annotated[Path, typer.Option(help="A file of UTF-8 text.")] = PROSE,
    tokens: Annotated[int, typer.Option(min=2, help="How many of its first tokens.")] = 1024,
) -> None:
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib; pip install 'kivi-jax[plots]'") from None
    params = kivi_jax.load(model, "float32")
    (ids,) = encode(params, [text.read_text(encoding="utf-8")])
    if len(ids) < tokens:
        raise ValueError(f"{text} has only {len(ids)} tokens, fewer than the {tokens} of --tokens")
    layers = attended_layers(params, jnp.asarray(ids[:tokens]))
    names = kv.split(",")
    found = [
        errors_of_heads(params, layers, resolve_kv(name, params.config.head_dim, len(layers)))
        for name in names
    ]
    shades = LogNorm(min(error[error > 0].min() for error in found), max(error.max() for error in found))
    figure = Figure((2 + 1.6 * len(names), 6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, errors, axis in zip(names, found, axes, strict=True):
        image = axis.imshow(errors, norm=shades, cmap="cividis", aspect="auto", interpolation="nearest")
        axis.set_title(f"{name}\nmean {errors.mean():.3f}", fontsize=10)
        axis.set_xticks(range(errors.shape[1]))
        axis.set_xlabel("KV head")
        print(
            f"{name}: mean {errors.mean():.4f}, largest {errors.max():.4f} in layer {errors.max(1).argmax()}"
        )
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="relative squared error of attention")
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


def errors_of_heads(
    params: Params, layers: Sequence[Attended], config: KVConfig
) -> Float[np.ndarray, "layers H"]:
    """Relative squared errors of what the queries of each KV head get."""
    of_layers = config.of_layers(len(layers))
    rows = [
        _errors(*(x.swapaxes(0, 1)[None] for x in layer), of_layer, window, params.config.alibi_slopes)
        for layer, of_layer, window in zip(layers, of_layers, params.config.sliding_windows, strict=True)
    ]
    return np.stack(jax.device_get(rows))


@functools.partial(jax.jit, static_argnames=("config", "sliding_window", "slopes"))
def _errors(
    q: Float[Array, "1 T Hq D"],
    k: Float[Array, "1 T H D"],
    v: Float[Array, "1 T H D"],
    config: KVConfig,
    sliding_window: int | None,
    slopes: tuple[float, ...] | None,
) -> Float[Array, " H"]:
    _, length, num_kv_heads, head_dim = k.shape
    shape = (1, 1, num_kv_heads, length, head_dim, config, k.dtype, [sliding_window])
    (layer,) = empty_state(*shape).layers
    heads = Heads(slopes)
    exact = prefill_attention(q, k, v, sliding_window, heads)
    if layer.flush_every is None:
        return jnp.zeros(num_kv_heads)
    stored = decode_attention_in_parallel(q, k, v, layer, jnp.zeros(1, jnp.int32), heads)

    def energy(x: Array) -> Array:
        later = jnp.square(x[0, layer.flush_every :].astype(jnp.float32)).sum((0, 2))
        return later.reshape(num_kv_heads, -1).sum(1)

    return energy(stored - exact) / energy(exact)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
