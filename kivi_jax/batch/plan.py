"""The first pass over a job's input: what there is to do, and which lines can't be done, before a model is loaded."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from kivi_jax.batch.lines import Failure, name_of, read_line
from kivi_jax.batch.requests import Request, read_request
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.text import encode, read_stops


@dataclasses.dataclass(frozen=True)
class Rules:
    """What lines are read by.

    Attributes:
        params: the model; its weights aren't needed.
        defaults: settings of lines without their own.
        chat_template: name of the chat template for messages.
        capacity: most tokens of a prompt and its completion; None for as many as the model has positions.
        shard: (i, n), to take every n-th line from the i-th on, counted from 0.
    """

    params: Params
    defaults: GenerationSettings
    chat_template: str | None = None
    capacity: int | None = None
    shard: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the first pass found.

    Attributes:
        lines: how many there are in this shard.
        tokens: most that each request's prompt and completion may come to, of those to do, by line number.
        failures: lines that can't be run, and have no result yet.
        done: how many lines have a result.
        failed: and how many of these results are errors.
        samples: completions that the lines of this shard ask for, done or not.
    """

    lines: int
    tokens: Mapping[int, int]
    failures: list[Failure]
    done: int
    failed: int
    samples: int = 0


def make_plan(lines: Iterable[tuple[int, bytes]], rules: Rules, done: Mapping[str, bool]) -> Plan:
    """Reads every line, and encodes the prompts of those that `done`, the ids that have a result, lacks."""
    own, samples, written = 0, 0, []
    tokens: dict[int, int] = {}
    failures: list[Failure] = []
    for number, read in _read_all(lines, rules):
        if (number - 1) % rules.shard[1] != rules.shard[0]:
            continue
        own += 1
        samples += 0 if isinstance(read, Failure) else read.settings.n or 1
        if str(read.id) in done:
            written.append(done[str(read.id)])
            continue
        size = read if isinstance(read, Failure) else _size(read, rules)
        if isinstance(size, Failure):
            failures.append(size)
        else:
            tokens[number] = size
    return Plan(own, tokens, failures, len(written), sum(written), samples)


def _read_all(lines: Iterable[tuple[int, bytes]], rules: Rules) -> Iterator[tuple[int, Request | Failure]]:
    """Every line, also of other shards: an id must be one line's only."""
    numbers: dict[str, int] = {}
    for number, data in lines:
        line = read_line(number, data)
        if isinstance(line, Failure):
            yield number, line
        elif (first := numbers.setdefault(str(line.id), number)) != number:
            message = f"id {line.id!r} of line {number} is that of line {first} already"
            yield number, Failure(number, name_of(number), line.openai, "duplicate_id", message)
        else:
            yield number, read_request(line, rules.defaults)


def _size(request: Request, rules: Rules) -> int | Failure:
    """Most tokens of the prompt and its completion together, or why the model can't take them."""
    limit = rules.params.config.max_positions
    what, advice = f"the model's {limit} positions", "shorten the prompt or lower max_new_tokens"
    if rules.capacity is not None and rules.capacity < limit:
        limit, what = rules.capacity, f"the capacity of {rules.capacity}"
        advice += ", or raise --capacity"
    openai = request.url is not None
    try:
        (ids,) = encode(rules.params, [request.prompt], rules.chat_template)
        read_stops(rules.params, request.settings)
    except ValueError as error:
        message = str(error).replace("prompt 0", "the prompt", 1)
        return Failure(request.number, request.id, openai, "invalid_request", message)
    new = request.settings.max_new_tokens
    if len(ids) + new > limit:
        message = f"a prompt of {len(ids)} tokens and max_new_tokens {new} exceed {what}; {advice}"
        return Failure(request.number, request.id, openai, "context_length_exceeded", message)
    return len(ids) + new


def list_failures(failures: list[Failure], most: int = 5) -> str:
    """The first failures, for a message."""
    listed = [f"line {failure.number}: {failure.message}" for failure in failures[:most]]
    rest = len(failures) - len(listed)
    return "; ".join([*listed, f"and {rest} more"] if rest else listed)
