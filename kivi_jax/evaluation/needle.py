"""Needle in a haystack: whether a model finds a number that stands somewhere in a long text (Kamradt 2023)."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from kivi_jax.batching import PromptBatch
from kivi_jax.completions import Completion, make_reader
from kivi_jax.decoding import begin_decoding
from kivi_jax.kv.config import KVConfig
from kivi_jax.loop import continue_to_end
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.rows import make_rows
from kivi_jax.steps import init_state, prefill_each
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
    params: Params, cases: Sequence[Case], kvs: Sequence[KVConfig], tokens_at_once: int = 16384
) -> Iterator[tuple[Case, list[bool]]]:
    """Whether the number is in the answer to each case from each of `kvs`, by greedy decoding. The prompt attends
    itself exactly, and so is prefilled once and predicts the answer's first token; the others are read from the cache.

    Raises:
        ValueError: the model's activations overflow.
    """
    for length, group in itertools.groupby(cases, key=lambda case: case.length):
        alike = list(group)
        rows = min(max(tokens_at_once // length, 1), len(alike))
        for start in range(0, len(alike), rows):
            part = alike[start : start + rows]
            # The last ones are filled up, so that no other shape is compiled.
            prompts = [case.prompt for case in part] + [part[0].prompt] * (rows - len(part))
            answers = answer_each(params, prompts, kvs)
            for case, of_case in zip(part, zip(*answers, strict=True), strict=False):
                for answer in of_case:
                    if answer.finish_reason == "error":
                        raise ValueError(f"a prompt of {length} tokens: {answer.error}")
                yield case, [case.number in (answer.text or "") for answer in of_case]


def answer_each(params: Params, prompts: Sequence[Prompt], kvs: Sequence[KVConfig]) -> list[list[Completion]]:
    """Greedy completions of all prompts from each of `kvs`, which are those of `generate`."""
    settings = GenerationSettings(MAX_NEW_TOKENS)
    ids = encode(params, prompts)
    batch = PromptBatch.pad(ids, MAX_NEW_TOKENS, devices=params.data_devices)
    rows = make_rows(settings, params.end_tokens, batch.places, batch.samples, len(prompts))
    rows = dataclasses.replace(rows, sampling=None)
    states = tuple(init_state(params, len(batch.tokens), batch.capacity, kv) for kv in kvs)
    logits, states = prefill_each(params, jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), states)
    answers = []
    for state in states:
        readers = [
            make_reader(params, prompt, tokens, settings, (), params.end_tokens)
            for prompt, tokens in zip(prompts, ids, strict=True)
        ]
        decoding = begin_decoding(params, logits, state, None, rows, max_new_tokens=MAX_NEW_TOKENS)
        *_, completions = continue_to_end(params, batch, readers, decoding, MAX_NEW_TOKENS)
        answers.append(completions)
    return answers
