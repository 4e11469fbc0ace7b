"""From an input line to a prompt and its settings. A line's own settings win over the job's."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from kivi_jax.arguments import read_size
from kivi_jax.batch.lines import Failure, Line
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT_FIELDS = {COMPLETIONS: ("prompt",), CHAT: ("messages",)}

SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationSettings))
BARE_FIELDS = ("id", "custom_id", "prompt", "messages", *SETTINGS)

ENVELOPE_FIELDS = ("custom_id", "method", "url", "body")
LIMITS = ("max_tokens", "max_completion_tokens")
# Of the body's fields, those that are settings by the same name.
SAME_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "n",
    "stop",
    "ignore_eos",
)
BODY_FIELDS = ("model", "user", "logprobs", *LIMITS, *SAME_NAMES)
# Clients write these out, and their defaults change nothing.
NEUTRAL = {
    "stream": False,
    "echo": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_logprobs": 0,
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A line that can be run.

    Attributes:
        number, id: of its line.
        url: which of OpenAI's endpoints answers it; None for a bare line.
        model: what the body calls the model, to be given back.
        prompt, settings: what to generate.
    """

    number: int
    id: str | int
    url: str | None
    model: str | None
    prompt: Prompt
    settings: GenerationSettings


def read_request(line: Line, defaults: GenerationSettings) -> Request | Failure:
    """The request of a line, or what is wrong with it; `defaults` are the job's settings."""
    try:
        return _read_openai(line, defaults) if line.openai else _read_bare(line, defaults)
    except ValueError as error:
        return Failure(line.number, line.id, line.openai, "invalid_request", str(error))


def _read_bare(line: Line, defaults: GenerationSettings) -> Request:
    fields = _given(line.fields, BARE_FIELDS, "fields of a line")
    options = {name: value for name, value in fields.items() if name in SETTINGS}
    prompt = _read_prompt({name: fields[name] for name in ("prompt", "messages") if name in fields})
    return Request(line.number, line.id, None, None, prompt, _settings(line, defaults, options))


def _read_openai(line: Line, defaults: GenerationSettings) -> Request:
    fields = _given(line.fields, ENVELOPE_FIELDS, "fields of a line with a body")
    url, body = fields.get("url"), fields.get("body")
    if fields.get("method") != "POST":
        raise ValueError(f"method must be 'POST', got {fields.get('method')!r}")
    if not isinstance(url, str) or url not in PROMPT_FIELDS:
        raise ValueError(f"url must be one of {', '.join(map(repr, PROMPT_FIELDS))}, got {url!r}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be a JSON object, got {type(body).__name__}")
    for name, value in NEUTRAL.items():
        if body.get(name) not in (None, value):
            raise ValueError(f"{name} must be {value!r} or left out, as nothing else is supported")
    body = {name: value for name, value in body.items() if name not in NEUTRAL}
    body = _given(body, (*PROMPT_FIELDS[url], *BODY_FIELDS), f"fields of a body for {url}")
    for name in ("model", "user"):
        if not isinstance(body.get(name, ""), str):
            raise ValueError(f"{name} must be a text, got {body[name]!r}")
    options = {name: body[name] for name in SAME_NAMES if name in body}
    if body.get("top_k") in (-1, 0):  # what vLLM has for all tokens
        options["top_k"] = None
    limits = {read_size(name, body[name]) for name in LIMITS if name in body}
    if len(limits) > 1:
        raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
    if limits:
        options["max_new_tokens"] = limits.pop()
    if "logprobs" in body:
        options["logprobs"] = _wants_logprobs(body["logprobs"])
    prompt = _read_prompt({name: body[name] for name in PROMPT_FIELDS[url] if name in body})
    settings = _settings(line, defaults, options)
    return Request(line.number, line.id, url, body.get("model"), prompt, settings)


def _given(fields: Mapping[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """The fields that are set, all of them known; null stands for a field's default."""
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"unknown field {unknown[0]!r}; {what} are {', '.join(known)}")
    return {name: value for name, value in fields.items() if value is not None}


def _wants_logprobs(value: Any) -> bool:
    """Chats have a flag, completions the number of alternatives to each token, which aren't computed."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value == 0:
        return True
    raise ValueError(f"logprobs must be true, false or 0, for those of the chosen tokens only, got {value!r}")


def _settings(line: Line, defaults: GenerationSettings, options: Mapping[str, Any]) -> GenerationSettings:
    """Without a seed of its own, a line draws by its id, so that equal prompts in two lines have unlike samples."""
    digest = hashlib.sha256(f"{defaults.seed} {line.id}".encode(errors="backslashreplace")).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    return dataclasses.replace(defaults, **{"seed": seed, **options})


def _read_prompt(fields: Mapping[str, Any]) -> Prompt:
    if len(fields) != 1:
        raise ValueError("a request needs a prompt or messages, and not both")
    ((name, prompt),) = fields.items()
    if name == "messages":
        if not (isinstance(prompt, list) and prompt and all(isinstance(part, dict) for part in prompt)):
            raise ValueError("messages must be a list of one or more objects with a role and content")
        return [_read_message(message) for message in prompt]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise ValueError("prompt must be a text or a list of token ids; several prompts need a line each")
    return prompt


def _read_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message, with the text of OpenAI's content parts as most chat templates take it."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise ValueError("a message's content must be a text or a list of parts that are text")
    return {**message, "content": "\n".join(texts)}
