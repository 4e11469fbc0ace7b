"""How much worse a model predicts given texts when it reads them from a quantized cache."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params, jit_of_params
from kivi_jax.scoring import TOKENS_AT_ONCE, decoded_hidden, in_pieces
from kivi_jax.text import encode, load_tokenizer

BASELINE = "bf16"  # what other caches are compared with


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a model predicts through one cache beside what it predicts through an unquantized one, token by token.

    Attributes:
        loss: negative log-probability of each token that was predicted, in nats.
        divergence: from the unquantized cache's distribution, in nats (Kullback and Leibler).
        agrees: whether the same token is the likeliest.
    """

    loss: Float[np.ndarray, "windows tokens"]
    divergence: Float[np.ndarray, "windows tokens"]
    agrees: Bool[np.ndarray, "windows tokens"]


def compare(
    params: Params, windows: Int[np.ndarray, "windows T"], prompt_tokens: int, kvs: Sequence[KVConfig]
) -> Iterator[list[Comparison]]:
    """Predicts the tokens of windows of text after their first `prompt_tokens`, which are prefilled, as if they were
    decoded; yields a comparison for each of `kvs`, of as many windows as run at a time.
    """
    rows = max(TOKENS_AT_ONCE // windows.shape[1], 1) * params.data_devices
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        # The last ones are filled up, so that no other shape is compiled.
        filled = np.concatenate([part, np.repeat(part[:1], min(rows, len(windows)) - len(part), axis=0)])
        tokens = jnp.asarray(filled)
        exact = _hidden(params, tokens, KVConfig(16, 16), prompt_tokens)
        comparisons = []
        for kv in kvs:
            stored = _hidden(params, tokens, kv, prompt_tokens) if kv.quantized or kv.overrides else exact
            found = _compare(params, exact, stored, tokens[:, prompt_tokens:])
            comparisons.append(Comparison(*(np.asarray(x)[: len(part)] for x in found)))
        yield comparisons


@dataclasses.dataclass(frozen=True)
class Summary:
    """Means over all predicted tokens at some positions.

    Attributes:
        first, last: the positions.
        from_codes: share of keys and values that were read from codes.
        loss: nats a token.
        divergence: nats a token.
        agreement: share of tokens.
    """

    first: int
    last: int
    from_codes: float
    loss: float
    divergence: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def summarize(
    comparisons: Sequence[Comparison],
    kv: KVConfig,
    sliding_windows: Sequence[int | None],
    prompt_tokens: int,
    ranges: Sequence[int],
) -> list[Summary]:
    """A summary of all positions, and one of each range that begins at one of `ranges` and ends before the next."""
    loss, divergence, agrees = (
        np.concatenate([getattr(comparison, name) for comparison in comparisons])
        for name in ("loss", "divergence", "agrees")
    )
    end = prompt_tokens + loss.shape[1]
    starts = sorted({prompt_tokens, *(start for start in ranges if prompt_tokens < start < end)})
    spans = list(itertools.pairwise([*starts, end]))
    # Of the token at position i, the one at i - 1 was predicted from.
    shares = read_from_codes(kv, sliding_windows, np.arange(prompt_tokens, end) - 1)
    shares[0] = 0  # the first one is predicted by the prompt, which attends itself

    def mean(x: np.ndarray, first: int, stop: int) -> float:
        return float(x[..., first - prompt_tokens : stop - prompt_tokens].mean(dtype=np.float64))

    return [
        Summary(first, stop - 1, *(mean(x, first, stop) for x in (shares, loss, divergence, agrees)))
        for first, stop in ([(prompt_tokens, end)] if len(spans) == 1 else [(prompt_tokens, end), *spans])
    ]


@functools.partial(jit_of_params, static_argnames=("kv", "prompt_tokens"))
def _hidden(
    params: Params, tokens: Int[Array, "B T"], kv: KVConfig, prompt_tokens: int
) -> Float[Array, "B predicted hidden"]:
    """Hidden states from which the tokens after the prompt are predicted."""
    lengths = jnp.full(tokens.shape[0], prompt_tokens)
    return decoded_hidden(params, tokens, lengths, kv, prompt_tokens)[:, prompt_tokens - 1 : -1]


@jit_of_params
def _compare(
    params: Params,
    exact: Float[Array, "B predicted hidden"],
    stored: Float[Array, "B predicted hidden"],
    targets: Int[Array, "B predicted"],
) -> tuple[Array, ...]:
    def of_piece(exact: Array, stored: Array, targets: Array) -> tuple[Array, ...]:
        model = params.model()
        expected, found = (jax.nn.log_softmax(model.logits(hidden)) for hidden in (exact, stored))
        chosen = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
        return -chosen, divergence, expected.argmax(-1) == found.argmax(-1)

    return in_pieces(of_piece, params, exact, stored, targets)


def read_from_codes(
    kv: KVConfig, sliding_windows: Sequence[int | None], positions: Int[np.ndarray, " T"]
) -> Float[np.ndarray, " T"]:
    """Share of the keys and values before each position that a token there reads from codes, of all it reads; the mean
    of all layers, each of which attends the newest of `sliding_windows` tokens, the one at the position included.
    """
    shares = []
    for layer, window in zip(kv.of_layers(len(sliding_windows)), sliding_windows, strict=True):
        seen = positions if window is None else np.minimum(positions, window - 1)
        if not layer.quantized:
            shares.append(np.zeros(len(positions)))
            continue
        first = np.maximum(positions - seen, layer.sink_tokens)
        keys = np.maximum(positions - positions % layer.residual_length - first, 0)
        values = np.maximum(positions - layer.residual_length - first, 0)
        shares.append((keys + values) / (2 * np.maximum(seen, 1)))
    return np.mean(shares, axis=0)


def windows_of_text(
    params: Params, text: str, length: int, most: int | None = None
) -> Int[np.ndarray, "windows T"]:
    """`cut_windows` of a text's tokens, each after the model's beginning tokens.

    Raises:
        ValueError: `length` exceeds the model's positions, or the text is shorter.
    """
    if length > params.config.max_positions:
        raise ValueError(f"--length {length} exceeds the model's {params.config.max_positions} positions")
    (ids,) = encode(params, [text])
    beginning = load_tokenizer(params.tokenizer or "").encode("")
    return cut_windows(ids[len(beginning) :], length, most, beginning)


def cut_windows(
    ids: Sequence[int], length: int, most: int | None = None, beginning: Sequence[int] = ()
) -> Int[np.ndarray, "windows T"]:
    """The text's tokens in windows of `length`, each after the tokens that texts of this model begin with, which count.
    What is left over is left out.

    Raises:
        ValueError: the text has fewer tokens.
    """
    own = length - len(beginning)
    count = len(ids) // max(own, 1)
    if own < 1 or not count:
        raise ValueError(f"the text has {len(ids)} tokens, less than a window of {length}; name longer texts")
    count = min(count, most or count)
    windows = np.asarray(ids[: count * own], np.int32).reshape(count, own)
    return np.concatenate([np.tile(np.asarray(beginning, np.int32), (count, 1)), windows], axis=1)
