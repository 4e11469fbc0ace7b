"""Pictures of a study, as PNG files of tens of kilobytes."""

import io

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from tools.kv_study.errors import LABELS
from tools.kv_study.study import BITS, Study

WIDTH, DOTS_PER_INCH = 9.5, 80  # in inches
COLOURS = 128
CELLS = 64  # the most that a heat map has of tokens, and a surface of channels
# Reads the same with and without colour vision. Few colours, since a heat map of noise takes space for each.
HEAT = matplotlib.colormaps["cividis"].resampled(16)
LINES = {"per token": ("#d55e00", "s"), "per channel": ("#0072b2", "o")}  # of Okabe and Ito's palette
FAINTEST = 1 / 8  # of the mean; whatever is smaller looks the same


def png(figure: Figure) -> bytes:
    """The picture with a palette of `COLOURS`, which takes a third of the space."""
    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=DOTS_PER_INCH)
    Image.open(full).convert("RGB").quantize(COLOURS).save(reduced, format="png", optimize=True)
    return reduced.getvalue()


def surfaces(study: Study) -> Figure:
    """|keys| and |values| of some layers, channel by token, as in the paper's Figure 2.

    A cell shows the largest of its channels and tokens.
    """
    figure = Figure((WIDTH, 5), layout="constrained")
    axes = figure.subplots(2, len(study.surfaces), squeeze=False, sharex=True, sharey=True)
    for name, row in zip(("keys", "values"), axes, strict=True):
        for surface, axis in zip(study.surfaces, row, strict=True):
            sizes = getattr(surface, name).T
            image = axis.imshow(
                _largest(_largest(sizes, 0), 1),
                cmap=HEAT,
                vmin=0,
                aspect="auto",
                interpolation="nearest",
                origin="lower",
                extent=(0, study.tokens, 0, len(sizes)),
            )
            figure.colorbar(image, ax=axis)
            axis.set_title(f"|{name}|, layer {surface.layer}, KV head 0")
        row[0].set_ylabel("channel")
    for axis in axes[-1]:
        axis.set_xlabel("token")
    return figure


def channels(study: Study) -> Figure:
    """The mean magnitude of every head's channels, relative to its mean channel's."""
    return _by_head(*(_relative(found.channel_mean) for found in (study.keys, study.values)), "channel")


def tokens(study: Study) -> Figure:
    """The mean magnitude of every head's first tokens, relative to its mean token's."""
    keys, values = (_relative(found.token_mean)[..., :CELLS] for found in (study.keys, study.values))
    return _by_head(keys, values, "token")


def _relative(sizes: Float[np.ndarray, "L H N"]) -> Float[np.ndarray, "L H N"]:
    return sizes / sizes.mean(-1, keepdims=True)


def _largest(sizes: Float[np.ndarray, "N M"], axis: int) -> Float[np.ndarray, "n m"]:
    """With at most `CELLS` along `axis`, each the largest of its part."""
    cells = min(CELLS, sizes.shape[axis])
    return np.maximum.reduceat(sizes, np.arange(cells) * sizes.shape[axis] // cells, axis)


def _by_head(keys: Float[np.ndarray, "L H N"], values: Float[np.ndarray, "L H N"], unit: str) -> Figure:
    figure = Figure((WIDTH, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    norm = LogNorm(FAINTEST, max(keys.max(), values.max()), clip=True)
    for axis, name, sizes in zip(axes, ("keys", "values"), (keys, values), strict=True):
        layers, _, columns = sizes.shape
        image = axis.imshow(
            sizes.reshape(-1, columns),
            cmap=HEAT,
            norm=norm,
            aspect="auto",
            interpolation="nearest",
            extent=(0, columns, layers, 0),
        )
        axis.set_title(name)
        axis.set_xlabel(unit)
    axes[0].set_ylabel("layer (in it, a row for each KV head)")
    label = f"mean magnitude of a {unit}, relative to its head's mean"
    bar = figure.colorbar(image, ax=axes, label=label, format="{x:g}", ticks=LogLocator(2))
    bar.minorticks_off()
    return figure


def errors(study: Study) -> Figure:
    """Every error by layer, the mean of its heads."""
    figure = Figure((WIDTH, 6.4), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True)
    for axis, (name, title) in zip(axes.flat, LABELS.items(), strict=True):
        for (grouping, bits), found in study.errors.items():
            colour, marker = LINES[grouping]
            axis.plot(
                100 * getattr(found, name).mean(-1),
                color=colour,
                marker=marker,
                markersize=3,
                linestyle="-" if bits == min(BITS) else ":",
                label=f"{grouping}, {bits} bits",
            )
        axis.set_title(title)
        _from_zero(axis)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    figure.supylabel("relative error, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _from_zero(axis: Axes) -> None:
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)
