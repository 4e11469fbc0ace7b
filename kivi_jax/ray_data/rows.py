"""Rows of a dataset: what each asks for, and the columns that come of it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kivi_jax.engine import Output
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt

PROMPTS = ("prompt", "messages")
# Without those for which a row has no place: several completions, and a number for each token.
SETTINGS = tuple(
    field.name for field in dataclasses.fields(GenerationSettings) if field.name not in ("n", "logprobs")
)
WHOLE = ("max_new_tokens", "top_k", "seed")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a row gets, by the names of the columns.

    Attributes:
        generated_text: the completion; empty where there is none.
        finish_reason: "stop", "length", or "error".
        prompt_tokens: of the prompt; 0 if it was refused.
        completion_tokens: that were generated.
        error: why there is no whole completion; "" and not None if there is one, since a Parquet file whose column is
            all null has another schema than those with an error.
    """

    generated_text: str = ""
    finish_reason: str = "error"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


COLUMNS = {
    field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Result)
}


def check_columns(names: Sequence[str]) -> None:
    """Refuses a dataset that no row of could be done, or that the results would damage.

    Raises:
        ValueError: there are no prompts, or columns named as those of results are.
    """
    if not set(PROMPTS) & set(names):
        raise ValueError(f"rows need a column 'prompt' or 'messages', got {', '.join(map(repr, names))}")
    if taken := [name for name in COLUMNS if name in names]:
        raise ValueError(
            f"rows have columns {', '.join(map(repr, taken))} already, which results would replace; "
            "rename or drop them first"
        )


def read_rows(
    table: pa.Table, defaults: GenerationSettings
) -> list[tuple[Prompt, GenerationSettings] | Result]:
    """What each row asks for, or the result of one that can't be read."""
    names = [name for name in table.column_names if name in (*PROMPTS, *SETTINGS)]
    read: list[tuple[Prompt, GenerationSettings] | Result] = []
    for row in table.select(names).to_pylist():
        try:
            read.append((_read_prompt(row), _read_settings(row, defaults)))
        except (TypeError, ValueError) as error:
            read.append(Result(error=str(error)))
    return read


def _read_prompt(row: Mapping[str, Any]) -> Prompt:
    given = [name for name in PROMPTS if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"a row needs either a prompt or messages, and has {' and '.join(given) or 'neither'}"
        )
    value = row[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str):
            raise ValueError(f"prompt must be a text, got {value!r}")
        return value
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise ValueError(f"messages must be a list of messages, got {value!r}")
    messages = list(value)
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message must have a role and a content, got {message!r}")
    # Arrow gives every message the fields that any one has.
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _read_settings(row: Mapping[str, Any], defaults: GenerationSettings) -> GenerationSettings:
    own = {name: row[name] for name in SETTINGS if row.get(name) is not None}
    for name in WHOLE:
        # In pandas, a column of whole numbers of which some are missing has floats.
        if isinstance(value := own.get(name), float) and value.is_integer():
            own[name] = int(value)
    return dataclasses.replace(defaults, **own) if own else defaults


def read_output(output: Output) -> Result:
    """The result of a finished request."""
    (completion,) = output.completions
    return Result(
        completion.text or "",
        completion.finish_reason or "",
        output.prompt_tokens,
        len(completion.tokens),
        completion.error or "",
    )


def refused(error: Exception) -> Result:
    """The result of a row whose request raised."""
    return Result(error=str(error).replace("prompt 0", "the prompt", 1) or type(error).__name__)


def add_results(table: pa.Table, results: Sequence[Result]) -> pa.Table:
    """The table with the results' columns after its own."""
    for name, kind in COLUMNS.items():
        table = table.append_column(name, pa.array([getattr(result, name) for result in results], kind))
    return table
