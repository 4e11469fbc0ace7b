"""Draws what caches cost a model over the bits that they take, from results of `kivi-jax eval --json` (extra `plots`).

    kivi-jax eval tools/alice.txt --model smollm2 --dtype float32 --json smollm2.json
    python -m scripts.quality_picture smollm2.json quality.png

Several files, of several models, share a picture.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kivi_jax.cli import one_line_errors
from kivi_jax.evaluation.text_quality import BASELINE


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files of kivi-jax eval, one for each model.")],
    out: Annotated[Path, typer.Argument(help="The picture, .png or .svg.")],
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib; pip install 'kivi-jax[plots]'") from None
    figure = Figure((7, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, file in enumerate(results):
        model, points = read_points(file)
        names, bits, divergences = zip(*points, strict=True)
        axis.plot(bits, divergences, "os^D"[place % 4], label=model)
        for name, x, y in zip(names, bits, divergences, strict=True):
            axis.annotate(name, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xlim(right=axis.get_xlim()[1] + 0.5)
    axis.set_xlabel("stored bits of a key or value (bf16: 16)")
    axis.set_ylabel("KL from bf16, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


def read_points(file: Path) -> tuple[str, list[tuple[str, float, float]]]:
    """The model's name, and name, bits and divergence of each cache.

    Raises:
        ValueError: the file holds no results of texts.
    """
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        caches = report["text"]["kv"].items()
        points = [(name, found["bits"], found["positions"][0]["divergence"]) for name, found in caches]
        model = Path(report["model"]).name.removesuffix(".gguf")
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError(f"{file} is no file of kivi-jax eval TEXT --json") from None
    points = [point for point in points if point[0] != BASELINE]  # whose divergence is 0
    if not points:
        raise ValueError(f"{file} has no quantized cache")
    return model, points


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
