"""A study as Markdown with pictures, as one HTML page, and as JSON."""

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from markdown_it import MarkdownIt

from tools.kv_study import pictures
from tools.kv_study.distributions import TOP, Distribution
from tools.kv_study.errors import LABELS, NEGLIGIBLE
from tools.kv_study.groups import GROUPINGS, Pairing
from tools.kv_study.study import BITS, Study
from tools.report_page import table

NAME = "kv_study"
FEWEST = min(BITS)
ALL = slice(None)  # layers
PICTURES = {
    "errors.png": pictures.errors,
    "surfaces.png": pictures.surfaces,
    "channels.png": pictures.channels,
    "tokens.png": pictures.tokens,
}
# KIVI's Table 2: Llama-2-13B at 2 bits, per token and per channel, in percent.
PAPER = {
    "keys": (13.67, 4.55),
    "probabilities": (47.00, 9.60),
    "values": (4.57, 3.73),
    "output_of_values": (3.55, 49.89),
}
PAPER_SPARSITY = 84.3
STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; }
"""


def write_report(study: Study, folder: Path) -> Path:
    """Writes kv_study.md and its pictures, kv_study.html and kv_study.json; returns the HTML page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: pictures.png(draw(study)) for name, draw in PICTURES.items()}
    for name, image in images.items():
        (folder / name).write_bytes(image)
    text = markdown(study)
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    (folder / f"{NAME}.json").write_text(json.dumps(study.numbers()) + "\n")
    page = folder / f"{NAME}.html"
    page.write_text(html(text, images), encoding="utf-8")
    return page


def html(text: str, images: Mapping[str, bytes]) -> str:
    """Markdown as a page that holds its images."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for name, image in images.items():
        data = base64.b64encode(image).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    head = f'<meta charset="utf-8">\n<title>Keys and values</title>\n<style>{STYLE}</style>'
    return f"<!doctype html>\n{head}\n{body}"


def markdown(study: Study) -> str:
    return "\n".join(_lines(study)) + "\n"


def _lines(study: Study) -> Iterator[str]:
    layers, heads, channels = study.keys.channel_mean.shape
    yield f"# Keys and values of {study.model}"
    yield ""
    size = study.group_size
    yield (
        f"{layers} layers of {heads} KV heads of {channels} channels; one text of {study.tokens} tokens. Keys are as "
        f"they are cached, after RoPE. Groups are {size} consecutive tokens of a channel (*per channel*) or {size} "
        "consecutive channels of a token (*per token*)."
    )
    yield from ("", "## Against the paper", "", *_against_the_paper(study))
    yield from ("", "## Perplexity", "", *_perplexities(study))
    yield from ("", "## Relative errors", "", *_errors(study), "", "![errors by layer](errors.png)")
    yield from ("", "## Magnitudes", "", *_magnitudes(study), "", "![some layers](surfaces.png)")
    yield from ("", "![channels of every head](channels.png)", "", "![tokens of every head](tokens.png)")
    yield from ("", f"## Errors by layer at {FEWEST} bits", "", *_errors_by_layer(study))


def _against_the_paper(study: Study) -> Iterator[str]:
    yield (
        f"Relative errors at {FEWEST} bits in percent, means over layers and heads; the paper's (Table 2) are of "
        "Llama-2-13B."
    )
    yield ""
    here = [study.errors[grouping, FEWEST] for grouping in GROUPINGS]
    rows = []
    for name, paper in PAPER.items():
        found = [_percent(getattr(errors, name)) for errors in here]
        agree = np.argmin(found) == np.argmin(paper)
        rows.append([LABELS[name], *(f"{error:.2f}" for error in (*paper, *found)), "yes" if agree else "no"])
    yield from table("of|paper: per token|per channel|here: per token|per channel|same one smaller", rows)
    yield ""
    yield (
        f"Of the tokens that a query sees, {_percent(study.attention.sparsity):.1f} % get less than {NEGLIGIBLE:.0%} "
        f"of its largest probability (the paper's sparsity: {PAPER_SPARSITY} %)."
    )


def _perplexities(study: Study) -> Iterator[str]:
    yield "All keys and values quantized in one pass over the text, each token's own and its neighbours', too."
    if study.window_losses:
        yield (
            "The last row is decoded token by token from KIVI's cache, which quantizes keys per channel and values per "
            "token and has the last 128 tokens exact."
        )
    yield ""

    def row(keys: str, values: str, losses: list[float]) -> list[str]:
        return [keys, values, *(f"{np.exp(loss):.2f}" for loss in losses)]

    rows = [row("exact", "exact", [study.losses[None]] * len(BITS))]
    for keys, values in itertools.product(GROUPINGS, GROUPINGS):
        pairings = [Pairing(keys, values, bits, study.group_size) for bits in BITS]
        rows.append(row(keys, values, [study.losses[pairing] for pairing in pairings]))
    if study.window_losses:
        rows.append(row("KIVI", "with its exact window", [study.window_losses[bits] for bits in BITS]))
    yield from table("|".join(["keys", "values", *(f"{bits} bits" for bits in BITS)]), rows)


def _errors(study: Study) -> Iterator[str]:
    yield "In percent, ‖x̂ − x‖ / ‖x‖ over all tokens of a head; means over layers and heads."
    yield ""
    yield from table(
        "|".join(["of", *(f"{grouping}, {bits} bits" for grouping, bits in study.errors)]),
        [
            [label, *(f"{_percent(getattr(errors, name)):.2f}" for errors in study.errors.values())]
            for name, label in LABELS.items()
        ],
    )


def _errors_by_layer(study: Study) -> Iterator[str]:
    yield (
        "In percent, per token / per channel, means over heads. Last column: how many percent of all attention one "
        "token gets, the one that gets the most."
    )
    yield ""
    rows = []
    for layer in range(study.layers):
        pairs = (
            [_percent(getattr(study.errors[grouping, FEWEST], name)[layer]) for grouping in GROUPINGS]
            for name in LABELS
        )
        most = f"{_percent(study.attention.most_attended[layer]):.0f}"
        rows.append([str(layer), *(" / ".join(f"{error:.1f}" for error in pair) for pair in pairs), most])
    yield from table("|".join(["layer", *LABELS.values(), "most attended"]), rows)


def _magnitudes(study: Study) -> Iterator[str]:
    yield (
        "Means over heads. The magnitude of a channel or token is its mean |x|, here relative to the mean of all. "
        f"*Share*: how many percent of ‖x‖² are in the largest channels or tokens, one in {TOP}; "
        f"{100 / TOP:.1f} if all are alike. *Fixed*: how many percent of the largest channels of the text's first half "
        "are among its second half's."
    )
    yield from ("", "Keys:", "", *_magnitude_table(study.keys))
    yield from ("", "Values:", "", *_magnitude_table(study.values))


def _magnitude_table(found: Distribution) -> Iterator[str]:
    rows = [
        [
            "all" if layer is ALL else str(layer),
            f"{found.largest_channel[layer].mean():.1f}",
            f"{_percent(found.top_channels[layer]):.0f}",
            f"{_percent(found.fixed_channels[layer]):.0f}",
            f"{found.smallest_token[layer].mean():.2f}",
            f"{found.largest_token[layer].mean():.1f}",
            f"{_percent(found.top_tokens[layer]):.0f}",
        ]
        for layer in (*range(len(found.channel_mean)), ALL)
    ]
    yield from table("layer|largest channel|share|fixed|smallest token|largest token|share", rows)


def _percent(shares: Float[np.ndarray, "*any"]) -> float:
    return 100 * float(shares.mean())
