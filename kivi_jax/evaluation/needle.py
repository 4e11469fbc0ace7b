"""Needle in a haystack: whether a model finds a number that stands somewhere in a long text (Kamradt 2023)."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from kivi_jax.generation import generate
from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params
from kivi_jax.text import Prompt, encode, load_tokenizer

CITIES = ("Aarhus", "Bergen", "Cusco", "Dakar", "Essen", "Fukuoka", "Galway", "Hobart", "Izmir", "Jaipur")
NEEDLE = "The secret number of {city} is {number}."
QUESTION = "What is the secret number of {city}? Answer with the number only."
ANSWER = "The secret number of {city} is"
MAX_NEW_TOKENS = 24
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, and the number in its text.

    Attributes:
        length: tokens that the prompt has at most.
        depth: where in the text the number stands, from 0 to 1.
    """

    prompt: Prompt
    number: str
    length: int
    depth: float


def make_cases(
    params: Params, haystack: str, lengths: Sequence[int], depths: Sequence[float], each: int
) -> list[Case]:
    """`each` prompts for every length and depth, whose texts are parts of `haystack`, repeated where it is too short.

    Raises:
        ValueError: the model has no tokenizer, or a length leaves no room for a text.
    """
    if params.tokenizer is None:
        raise ValueError("needles need a model with a tokenizer")
    rng = np.random.default_rng(0)
    sentences = [
        f"{sentence.strip()}." for sentence in haystack.replace("\n", " ").split(". ") if sentence.strip()
    ]
    return [
        _make_case(params, sentences, length, depth, rng)
        for length, depth, _ in itertools.product(lengths, depths, range(each))
    ]


def _make_case(
    params: Params, sentences: Sequence[str], length: int, depth: float, rng: np.random.Generator
) -> Case:
    city = str(rng.choice(CITIES))
    number = "".join(map(str, rng.integers(0, 10, DIGITS)))
    needle = NEEDLE.format(city=city, number=number)
    start = int(rng.integers(len(sentences)))
    endless = itertools.islice(itertools.cycle(sentences), start, None)

    def prompt(parts: Sequence[str]) -> Prompt:
        at = round(depth * len(parts))
        text = " ".join([*parts[:at], needle, *parts[at:]])
        question = QUESTION.format(city=city)
        if load_tokenizer(params.tokenizer or "").chat_template:
            return [{"role": "user", "content": f"{text}\n\n{question}"}]
        return f"{text}\n\n{question}\n{ANSWER.format(city=city)}"

    def tokens(parts: Sequence[str]) -> int:
        return len(encode(params, [prompt(parts)])[0])

    if tokens([]) > length:
        raise ValueError(f"a prompt of {length} tokens has no room for a text; name greater lengths")
    # Twice as many sentences until they are too long, then the most that fit, by bisection.
    taken = list(itertools.islice(endless, 16))
    while tokens(taken) <= length:
        taken += itertools.islice(endless, len(taken))
    fitting, too_many = 0, len(taken)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if tokens(taken[:middle]) <= length else (fitting, middle)
    return Case(prompt(taken[:fitting]), number, length, depth)


def find_needles(
    params: Params, cases: Sequence[Case], kv: str | KVConfig, tokens_at_once: int = 16384
) -> Iterator[tuple[Case, bool]]:
    """Whether the number is in the answer to each case, by greedy decoding. The prompt attends itself exactly, and so
    predicts the answer's first token; the others are read from the cache.

    Raises:
        ValueError: the model's activations overflow.
    """
    for length, group in itertools.groupby(cases, key=lambda case: case.length):
        alike = list(group)
        rows = max(tokens_at_once // length, 1)
        for start in range(0, len(alike), rows):
            part = alike[start : start + rows]
            completions = generate(params, [case.prompt for case in part], kv, max_new_tokens=MAX_NEW_TOKENS)
            for case, completion in zip(part, completions, strict=True):
                if completion.finish_reason == "error":
                    raise ValueError(f"a prompt of {length} tokens: {completion.error}")
                yield case, case.number in (completion.text or "")
