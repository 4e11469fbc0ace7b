"""Log-probabilities of given texts, as decoding through the cache gives them, in one parallel pass."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Int32
from tqdm import tqdm

from kivi_jax.attend import attend_as_decoded
from kivi_jax.batching import bucket
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.model import Params, jit_of_params
from kivi_jax.progress import progress_disabled
from kivi_jax.steps import new_state
from kivi_jax.text import Pair, Text, encode_pair

# Tokens of a device, padding included, that run at a time unless one text has more.
TOKENS_AT_ONCE = 4096
LEAST_WIDTH = 64
# Bytes of float32 logits that exist at a time.
LOGITS_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
        tokens: of the continuation.
        logprobs: the natural logarithm of each token's probability after all those before it.
        greedy: whether each token is the likeliest one there, which decoding at temperature 0 would take.
    """

    tokens: list[int]
    logprobs: list[float]
    greedy: list[bool]


def score(params: Params, pairs: Sequence[Text | Pair], kv: str | KVConfig = "kivi2") -> list[Score]:
    """Scores continuations after their contexts, as decoding through a cache would.

    The context is a prompt, whose tokens attend each other exactly. A token of the continuation attends what the cache
    holds when it is decoded: keys and values that are due to be quantized as they are stored, newer ones exactly. So
    texts of no more than `residual_length` tokens have the same scores with every `kv`, and so has the first token of
    every continuation: the prompt predicts it.

    Args:
        params: the model.
        pairs: `(context, continuation)` each, of texts or lists of token ids. A single text or list is scored after its
            first token, which for a text is the tokenizer's beginning token if it has one.
        kv: how keys and values are stored, as for `generate`.

    Returns:
        A score for each pair, in their order.

    Raises:
        ValueError: `kv` is unknown or does not fit the model, a pair is none, a context or continuation has no tokens,
            both together exceed the model's positions by more than one, or one can't be encoded.
    """
    config = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
    if isinstance(pairs, str):
        raise ValueError("pairs must be a list; put a single text into one")
    texts = [_read_text(params, pair, f"pair {number}") for number, pair in enumerate(pairs)]
    scores: dict[int, Score] = {}
    with tqdm(
        total=sum(text.length for text in texts),
        desc="scoring",
        unit="tok",
        leave=False,
        disable=progress_disabled(),
    ) as progress:
        for batch in _batches(texts, params.data_devices):
            found = _score(
                params,
                jnp.asarray(batch.tokens),
                jnp.asarray(batch.prompt_lengths),
                kv=config,
                prompt_width=batch.prompt_width,
                count=batch.count,
            )
            logprobs, greedy = map(np.asarray, found)
            for row, place in enumerate(batch.places):
                text = texts[place]
                own = row, slice(len(text.continuation))
                scores[place] = Score(text.continuation, logprobs[own].tolist(), greedy[own].tolist())
                progress.update(text.length)
    return [scores[place] for place in range(len(texts))]


class _Text(NamedTuple):
    context: list[int]
    continuation: list[int]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


def _read_text(params: Params, pair: Text | Pair, name: str) -> _Text:
    text = _Text(*encode_pair(params, pair, name))
    if text.length - 1 > params.config.max_positions:  # nothing comes after the last one
        raise ValueError(
            f"{name} has {text.length} tokens, more than the model's {params.config.max_positions} positions and one"
        )
    return text


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Texts of like length in arrays of few shapes.

    Attributes:
        places: which text each of the first rows is; the others only fill up the batch.
        tokens: right-padded.
        prompt_lengths: tokens of each row's context; all of a row that only fills up.
        prompt_width: at least the longest context.
        count: at least the tokens of the longest continuation.
    """

    places: list[int]
    tokens: Int32[np.ndarray, "B T"]
    prompt_lengths: Int32[np.ndarray, " B"]
    prompt_width: int
    count: int


def _batches(texts: Sequence[_Text], devices: int) -> Iterator[_Batch]:
    """Batches of texts that are split over `devices`, the longest first: memory that is too small shows at once."""
    widths: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        widths.setdefault(bucket(text.length, LEAST_WIDTH), []).append(place)
    for width, places in sorted(widths.items(), reverse=True):
        most = devices * max(TOKENS_AT_ONCE // width, 1)
        # Those with short continuations together.
        places.sort(key=lambda place: len(texts[place].continuation))
        for start in range(0, len(places), most):
            part = places[start : start + most]
            rows = min(devices * bucket(-(-len(part) // devices)), most)
            yield _pad(texts, part, rows, width)


def _pad(texts: Sequence[_Text], places: list[int], rows: int, width: int) -> _Batch:
    tokens = np.zeros((rows, width), np.int32)
    prompt_lengths = np.full(rows, width, np.int32)
    for row, place in enumerate(places):
        text = texts[place]
        tokens[row, : text.length] = text.context + text.continuation
        prompt_lengths[row] = len(text.context)
    return _Batch(
        places,
        tokens,
        prompt_lengths,
        _width_of(max(len(texts[place].context) for place in places), width),
        _width_of(max(len(texts[place].continuation) for place in places), width),
    )


def _width_of(longest: int, width: int) -> int:
    """A number of columns from a small choice: every combination has to be compiled."""
    few = LEAST_WIDTH // 4
    while few < longest:
        few *= 4
    return min(few, width)


@functools.partial(jit_of_params, static_argnames=("kv", "prompt_width", "count"))
def _score(
    params: Params,
    tokens: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"],
    kv: KVConfig,
    prompt_width: int,
    count: int,
) -> tuple[Float[Array, "B count"], Bool[Array, "B count"]]:
    """Log-probability of the `count` tokens after each row's prompt, and whether each is the likeliest."""
    hidden = decoded_hidden(params, tokens, prompt_lengths, kv, prompt_width)
    at = jnp.minimum(prompt_lengths[:, None] + jnp.arange(count), tokens.shape[1] - 1)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    before = jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)

    def of_piece(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = params.model().logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets

    logprobs, greedy = in_pieces(of_piece, params, before, targets)
    return logprobs, greedy


def decoded_hidden(
    params: Params,
    tokens: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"],
    kv: KVConfig,
    prompt_width: int,
) -> Float[Array, "B T hidden"]:
    """Final hidden states of texts whose first `prompt_lengths` tokens, 1 to `prompt_width`, were prefilled and whose
    others were decoded one by one, within a compiled function.
    """
    batch = prompt_lengths.size
    partition = params.partition(batch)
    tokens, prompt_lengths = partition.place((tokens, prompt_lengths))
    attend = functools.partial(
        partition.attend, functools.partial(attend_as_decoded, prompt_width), (prompt_lengths,)
    )
    layers = new_state(params, partition, batch, 1, kv).layers  # they only say how tokens are stored
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    lengths = jnp.maximum(prompt_lengths[:, None], positions + 1)
    hidden, _ = params.model()(tokens, positions, layers, attend, lengths)
    return hidden


def in_pieces(
    function: Callable[..., tuple[Array, ...]], params: Params, *arrays: Array
) -> tuple[Array, ...]:
    """`function` of arrays `[B, N, ...]`, of as many of the N tokens at a time as have `LOGITS_BYTES` of logits."""
    batch, count = arrays[0].shape[:2]
    size = min(max(LOGITS_BYTES // (4 * batch * params.config.vocab_size), 1), count)
    pieces = -(-count // size)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, pieces * size - count), *[(0, 0)] * (x.ndim - 2)))
        return padded.reshape(batch, pieces, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(batch, pieces * size, *x.shape[3:])[:, :count]

    results = jax.lax.map(lambda piece: function(*piece), tuple(map(split, arrays)))
    return tuple(map(join, results))
