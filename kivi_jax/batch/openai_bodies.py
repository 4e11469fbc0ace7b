"""Bodies of OpenAI's completions and chat completions, made from what was generated."""

import itertools
import time
from typing import Any

from kivi_jax.batch.requests import CHAT, Request
from kivi_jax.completions import Completion
from kivi_jax.detokenizer import Detokenizer
from kivi_jax.model import Params
from kivi_jax.text import encode, is_conversation, load_tokenizer


def make_body(
    request: Request,
    completions: tuple[Completion, ...],
    prompt_tokens: int,
    params: Params,
    model: str,
    identity: str,
) -> dict[str, Any]:
    """The body that answers `request`; `identity` is what is unique in its id."""
    chat = request.url == CHAT
    generated = sum(len(completion.tokens) for completion in completions)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [
            _choice(index, completion, request, params) for index, completion in enumerate(completions)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }


def _choice(index: int, completion: Completion, request: Request, params: Params) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if request.url == CHAT:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    if completion.text is None:
        choice["token_ids"] = completion.tokens
    choice["logprobs"] = None
    if completion.logprobs is not None:
        pieces = _pieces(completion, request, params)
        make = _chat_logprobs if request.url == CHAT else _text_logprobs
        choice["logprobs"] = make(pieces, completion.logprobs)
    return choice | {"finish_reason": completion.finish_reason}


def _pieces(completion: Completion, request: Request, params: Params) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""
    if params.tokenizer is None:
        return [f"token_id:{token}" for token in completion.tokens]
    prompt = request.prompt
    context = () if is_conversation(prompt) else encode(params, [prompt])[0]
    detokenizer = Detokenizer(load_tokenizer(params.tokenizer), context)
    pieces = [detokenizer.add(token) for token in completion.tokens]
    if pieces:
        pieces[-1] += detokenizer.rest()
    return pieces


def _chat_logprobs(pieces: list[str], logprobs: list[float]) -> dict[str, Any]:
    content = [
        {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
        for piece, logprob in zip(pieces, logprobs, strict=True)
    ]
    return {"content": content}


def _text_logprobs(pieces: list[str], logprobs: list[float]) -> dict[str, Any]:
    offsets = list(itertools.accumulate(map(len, pieces), initial=0))[:-1]
    return {"tokens": pieces, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
