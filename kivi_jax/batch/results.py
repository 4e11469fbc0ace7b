"""Result lines, one for each input line: written in the form of the input's, and recognized when a job goes on."""

import dataclasses
import hashlib
import json
from typing import Any

from kivi_jax.batch.lines import Failure
from kivi_jax.batch.openai_bodies import make_body
from kivi_jax.batch.requests import Request
from kivi_jax.completions import Completion
from kivi_jax.model import Params


@dataclasses.dataclass(frozen=True)
class Written:
    """What a result line that is there says: the id it answers, as text, and whether by an error."""

    key: str
    failed: bool


def result_line(
    request: Request, completions: tuple[Completion, ...], prompt_tokens: int, params: Params, model: str
) -> bytes:
    """The line that answers `request`; `model` is what the job calls the model."""
    if request.url is None:
        return _encoded(_bare_fields(request, completions, prompt_tokens))
    identity = _identity(request.id)
    body = make_body(request, completions, prompt_tokens, params, model, identity)
    response = {"status_code": 200, "request_id": f"req_{identity}", "body": body}
    return _encoded(
        {"id": f"batch_req_{identity}", "custom_id": request.id, "response": response, "error": None}
    )


def failure_line(failure: Failure) -> bytes:
    """The error line of a request that has no completions."""
    error = {"code": failure.code, "message": failure.message}
    if failure.openai:
        named = {"id": f"batch_req_{_identity(failure.id)}", "custom_id": failure.id}
    elif failure.openai is None:  # its readers may look for either
        named = {"id": failure.id, "custom_id": failure.id}
    else:
        named = {"id": failure.id}
    return _encoded({**named, "response": None, "error": error})


def read_result(line: bytes) -> Written | None:
    """What a line of the output says; None if it is torn or no result."""
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    identity = fields.get("custom_id", fields.get("id"))
    return None if identity is None else Written(str(identity), fields.get("error") is not None)


def _bare_fields(request: Request, completions: tuple[Completion, ...], prompt_tokens: int) -> dict[str, Any]:
    """One completion's fields lie in the line itself, those of several samples in a list."""
    described = [_describe(completion) for completion in completions]
    return {
        "id": request.id,
        **(described[0] if request.settings.n is None else {"completions": described}),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(len(completion.tokens) for completion in completions),
    }


def _describe(completion: Completion) -> dict[str, Any]:
    """A completion, with its tokens where they say something that the text does not."""
    fields: dict[str, Any] = {"text": completion.text}
    if completion.text is None or completion.logprobs is not None:
        fields["tokens"] = completion.tokens
    if completion.logprobs is not None:
        fields["logprobs"] = completion.logprobs
    return fields | {"finish_reason": completion.finish_reason}


def _identity(name: str | int) -> str:
    """The same in every run of a job."""
    return hashlib.sha256(str(name).encode(errors="backslashreplace")).hexdigest()[:24]


def _encoded(fields: dict[str, Any]) -> bytes:
    """In ASCII, so that no reader finds line breaks of Unicode inside a line."""
    return json.dumps(fields).encode() + b"\n"
