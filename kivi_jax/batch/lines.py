"""Input lines: what each is called, and whether it can be read at all."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

Code = Literal["invalid_json", "invalid_request", "duplicate_id", "context_length_exceeded", "model_error"]

# In one of OpenAI's lines, and in no bare one.
ENVELOPE = ("method", "url", "body")


@dataclasses.dataclass(frozen=True)
class Line:
    """A JSON object of the input.

    Attributes:
        number: counted from 1.
        id: its `custom_id` or `id`, or `line-<number>` if it has none.
        openai: whether its form is that of OpenAI's batches.
        fields: the object.
    """

    number: int
    id: str | int
    openai: bool
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a line has no completions.

    Attributes:
        number: the line's, counted from 1.
        id: what its result is called.
        openai: whether its form is that of OpenAI's batches; None if it can't be read.
        code, message: what is wrong.
    """

    number: int
    id: str | int
    openai: bool | None
    code: Code
    message: str


def name_of(number: int) -> str:
    """What a line without an id of its own is called."""
    return f"line-{number}"


def read_line(number: int, data: bytes) -> Line | Failure:
    """The line, or why it is none."""
    try:
        text = data.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"not a line of JSON: {error.msg} at character {error.pos + 1}"
        return Failure(number, name_of(number), None, "invalid_json", message)
    except (ValueError, RecursionError) as error:
        return Failure(number, name_of(number), None, "invalid_json", f"not a line of JSON: {error}")
    if not isinstance(fields, dict):
        message = f"must be a JSON object, got {type(fields).__name__} {_shortened(fields)}"
        return Failure(number, name_of(number), None, "invalid_json", message)
    openai = any(name in fields for name in ENVELOPE)
    try:
        return Line(number, _read_id(number, fields, openai), openai, fields)
    except ValueError as error:
        return Failure(number, name_of(number), openai, "invalid_request", str(error))


def _read_id(number: int, fields: Mapping[str, Any], openai: bool) -> str | int:
    """The line's own id. Whole numbers are ids in bare lines, as they are in many data sets."""
    names = [name for name in ("custom_id", "id") if fields.get(name) is not None]
    if openai and "custom_id" not in names:
        raise ValueError("a line with method, url and body needs a custom_id")
    if len(names) > 1 and not openai:
        raise ValueError("give id or custom_id, not both")
    if not names:
        return name_of(number)
    name, value = names[0], fields[names[0]]
    kinds = str if openai else str | int
    if not isinstance(value, kinds) or isinstance(value, bool) or value == "":
        wanted = "a text" if openai else "a text or a whole number"
        raise ValueError(f"{name} must be {wanted} and not empty, got {_shortened(value)}")
    # Else a line without an id could have its name taken.
    if re.fullmatch(r"line-\d+", str(value)) and value != name_of(number):
        raise ValueError(f"{name} {value!r} is what a line without an id is called; choose another")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
