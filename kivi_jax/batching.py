"""Prompts of different lengths in arrays of few shapes."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, Int32

# Prompts of one batch are prefilled in groups of like length where padding them to the longest would run more than so
# many times their tokens, and more than so many tokens.
MOST_PADDED = 1.6
FREE_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts in arrays of bucketed shapes, so that different prompts rarely need another compilation.

    Attributes:
        tokens: right-padded; if there are several groups, from the shortest prompt to the longest.
        lengths: of each row; rows that only fill up the batch have one token.
        places: which of the prompts a row of `tokens` is.
        groups: rows that are prefilled together, one group after the other, and how many columns they need.
        prompt_rows: the row of `tokens` that each row of the generation continues.
        samples: which of its prompt's samples a row of the generation is.
        rows: the rows of the generation in the order of the prompts, those of one prompt's samples together.
        capacity: tokens a row of the KV state must hold.
    """

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]
    places: Int32[np.ndarray, " B"]
    groups: tuple[tuple[int, int], ...]
    prompt_rows: Int32[np.ndarray, " N"]
    samples: Int32[np.ndarray, " N"]
    rows: Int[np.ndarray, " completions"]
    capacity: int

    @classmethod
    def pad(
        cls, ids: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, devices: int = 1
    ) -> "PromptBatch":
        """`n` samples of prompts that are split over `devices`, each of which gets as many rows as the others."""
        longest = max(map(len, ids))
        tokens = np.zeros((bucket(-(-len(ids) // devices)) * devices, bucket(longest, least=16)), np.int32)
        lengths = np.ones(len(tokens), np.int32)
        places = np.arange(len(tokens), dtype=np.int32)
        groups = _groups([len(prompt) for prompt in ids], tokens.shape) if devices == 1 else [tokens.shape]
        if len(groups) > 1:
            places[: len(ids)] = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for row, place in enumerate(places[: len(ids)]):
            prompt = ids[place]
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        rows = np.arange(bucket(-(-len(ids) * n // devices)) * devices, dtype=np.int32)
        prompt_rows = np.minimum(rows // n, len(tokens) - 1)
        first_rows = n * np.argsort(places[: len(ids)])
        return cls(
            tokens,
            lengths,
            places,
            tuple(groups),
            prompt_rows,
            rows % n,
            (first_rows[:, None] + np.arange(n)).reshape(-1),
            bucket(longest + max_new_tokens, least=16),
        )


def _groups(lengths: Sequence[int], whole: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the fewest groups of prompts, from short to long, that don't pad too much.

    Every shape of a group has to be compiled once, and one group, `whole`, costs the least where it may be.
    """
    # The shortest are padded to a bucket of 16 in any case, and equals need no groups for it.
    affordable = max(MOST_PADDED * sum(max(length, 16) for length in lengths), FREE_TOKENS)
    if math.prod(whole) <= affordable:
        return [whole]
    counts = Counter(bucket(length, least=16) for length in lengths)
    widths = sorted(counts)
    cost = sum(width * counts[width] for width in widths)
    # Narrow ones join the next wider ones, the cheapest first.
    while len(widths) > 1:
        more, width, wider = min((counts[a] * (b - a), a, b) for a, b in itertools.pairwise(widths))
        if cost + more > affordable:
            break
        cost += more
        counts[wider] += counts.pop(width)
        widths.remove(width)
    return [(rows, width) for width in widths for rows in _bucket_sizes(counts[width])]


def _bucket_sizes(count: int) -> Iterator[int]:
    """Sizes that `bucket` has, the largest first, whose sum is `count`."""
    while count:
        size = max(size for size in range(1, count + 1) if bucket(size) == size)
        yield size
        count -= size


def bucket(size: int, least: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, … from `least` on: few shapes to compile, at most half too much."""
    rounded = least
    while rounded < size:
        three_halves = rounded * 3 // 2
        rounded = three_halves if rounded > 1 and three_halves >= size else rounded * 2
    return rounded
