"""From texts to token ids: prompts, conversations and stop strings."""

import functools
import importlib.util
import operator
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from kivi_jax.checkpoints.gguf_file import is_gguf
from kivi_jax.checkpoints.gguf_tokenizer import read_tokenizer
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings

Conversation = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Conversation
Text = str | Sequence[int]
Pair = tuple[Text, Text]

# transformers' name for a checkpoint's only chat template, or for the one to use when no name is given.
DEFAULT_TEMPLATE = "default"

# Held while a tokenizer is loaded: transformers' lazy imports fail if several threads start them, and threads that ask
# for the same tokenizer at once should load it once.
_LOADING = threading.Lock()


def load_tokenizer(source: str) -> Any:
    """The Hugging Face tokenizer in a folder, whose code is never run, or in a GGUF file. Safe to call from any thread.

    Raises:
        ValueError: its files are damaged, of an unknown kind, or need a package that is not installed.
    """
    with _LOADING:
        return _load_tokenizer(source)


@functools.lru_cache(maxsize=8)
def _load_tokenizer(source: str) -> Any:
    # Else transformers warns that PyTorch is missing, which isn't needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # seconds to import, and token-id prompts don't need it

    try:
        if is_gguf(Path(source)):
            return read_tokenizer(Path(source))
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files make parsers raise many kinds
        if _lacks_sentencepiece(Path(source)):
            # transformers' own message advises to install tiktoken, which can't read this file.
            raise ValueError(
                f"the tokenizer can't be loaded: {Path(source, 'tokenizer.model')} is read by the package "
                "sentencepiece, which is not installed; pip install sentencepiece"
            ) from error
        # transformers' own message advises to set trust_remote_code.
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs code of its own, and code from checkpoints is never run" if needs_code else error
        raise ValueError(
            f"the tokenizer can't be loaded: its files in {source} are damaged or of an unknown kind: {reason}"
        ) from error


def _lacks_sentencepiece(folder: Path) -> bool:
    """Whether there is only a SentencePiece model, and the package that reads it is not installed."""
    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not model.exists():
        return False
    with model.open("rb") as file:
        # The byte that begins a SentencePiece model; other files of this name are text.
        return file.read(1) == b"\n" and importlib.util.find_spec("sentencepiece") is None


def is_conversation(prompt: Any) -> TypeGuard[Conversation]:
    """Whether `prompt` is a list of messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def encode(params: Params, prompts: Sequence[Prompt], chat_template: str | None = None) -> list[list[int]]:
    """Token ids of every prompt. Conversations are formatted by the checkpoint's chat template named `chat_template`.

    Raises:
        ValueError: a prompt is empty, not valid Unicode or not a `Prompt`, or has a token outside the vocabulary; there
            is a text but no tokenizer; or a conversation but no such chat template, or one that refuses it.
    """
    return [
        _encode_prompt(params, prompt, f"prompt {number}", chat_template)
        for number, prompt in enumerate(prompts)
    ]


def encode_pair(params: Params, pair: Any, name: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, which is what follows it in both together, if tokens don't merge
    over the border; or of a single text's first token and the others. The context of "" is the beginning token.

    Args:
        params: the model.
        pair: `(context, continuation)`, of texts or lists of token ids, or one of these.
        name: of the pair, for errors.

    Raises:
        ValueError: as `encode`, or a part has no tokens.
    """
    if isinstance(pair, str) or not _is_pair(pair):
        ids = _encode_prompt(params, pair, name)
        if len(ids) < 2:
            raise ValueError(f"{name} has a single token, which nothing comes before; give it a context")
        return ids[:1], ids[1:]
    context, continuation = pair
    if isinstance(context, str) and not context:
        first = _tokenizer(params).encode("")
        if not first:
            raise ValueError(f"the context of {name} is empty, and this tokenizer has no beginning token")
    else:
        first = _encode_prompt(params, context, f"the context of {name}")
    if isinstance(context, str) and isinstance(continuation, str) and continuation:
        both = _encode_prompt(params, context + continuation, name)
        if len(both) > len(first) and both[: len(first)] == first:
            return first, both[len(first) :]
    return first, _encode_prompt(params, continuation, f"the continuation of {name}", special_tokens=False)


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(part, str | Sequence | np.ndarray) for part in pair)
    )


def _encode_prompt(
    params: Params, prompt: Any, name: str, chat_template: str | None = None, special_tokens: bool = True
) -> list[int]:
    if isinstance(prompt, str):
        _check_unicode(prompt, name)
        ids = _tokenizer(params).encode(prompt, add_special_tokens=special_tokens) if prompt else []
    elif is_conversation(prompt):
        ids = _encode_conversation(_tokenizer(params), prompt, name, chat_template)
    else:
        ids = _check_ids(prompt, name)
    if not ids:
        raise ValueError(f"{name} is empty; give it at least one token")
    if outside := [token for token in ids if not 0 <= token < params.config.vocab_size]:
        raise ValueError(
            f"{name} has token {outside[0]}, outside the vocabulary of {params.config.vocab_size}"
        )
    return ids


def _tokenizer(params: Params) -> Any:
    if params.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer; pass prompts as lists of token ids")
    return load_tokenizer(params.tokenizer)


def _check_unicode(prompt: str, name: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # lone surrogates, which Python makes of bytes that are not UTF-8
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


def _check_ids(prompt: Any, name: str) -> list[int]:
    try:
        if not isinstance(prompt, bytes | bytearray | Mapping):  # these may consist of integers, too
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise ValueError(
        f"{name} must be a text, a list of token ids or a list of messages, got {prompt!r}; "
        f"a single list of ids belongs in another list, and a single message in a list"
    )


def _encode_conversation(
    tokenizer: Any, messages: Conversation, name: str, chat_template: str | None
) -> list[int]:
    """Token ids of the messages and the answer's header, as the checkpoint's chat template formats them."""
    for message in messages:
        if "role" not in message:
            raise ValueError(f"a message of {name} needs a 'role', got {dict(message)!r}")
    template = _find_template(tokenizer.chat_template, chat_template)
    try:
        # Jinja runs the template in its sandbox. The template adds beginning tokens, and nothing else does.
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # templates raise any kind for conversations that they don't accept
        raise ValueError(
            f"{name}: the checkpoint's chat template does not take this conversation: {error}"
        ) from error


def _find_template(templates: str | Mapping[str, str] | None, name: str | None) -> str:
    """The chat template called `name`; without a name, the checkpoint's only one or its default."""
    if not templates:
        raise ValueError(
            "this checkpoint's tokenizer has no chat template, so it can't take messages; "
            "pass the conversation as one text, formatted as the model expects it"
        )
    named = {DEFAULT_TEMPLATE: templates} if isinstance(templates, str) else templates
    wanted = DEFAULT_TEMPLATE if name is None else name
    if isinstance(wanted, str) and wanted in named:
        return named[wanted]
    names = ", ".join(map(repr, sorted(named)))
    if name is None:
        raise ValueError(
            f"this checkpoint has no default chat template; choose one by chat_template: {names}"
        )
    raise ValueError(f"chat_template must be one of this checkpoint's, {names}, got {name!r}")


def read_stops(params: Params, settings: GenerationSettings) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The strings and the token ids that end a completion. Special tokens are not in its text, so they are found by id.

    Raises:
        ValueError: there are stop strings, and the checkpoint has no tokenizer to find them with.
    """
    end_tokens = () if settings.ignore_eos else params.end_tokens
    if not settings.stops:
        return (), end_tokens
    if params.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
    added = _tokenizer(params).added_tokens_decoder.items()
    special = {str(token): number for number, token in added if token.special}
    ends = [special[text] for text in settings.stops if text in special]
    return tuple(text for text in settings.stops if text not in special), (*end_tokens, *ends)
