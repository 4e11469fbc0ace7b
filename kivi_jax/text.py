"""Between texts and token ids: prompts encoded, completions decoded and cut at stop strings."""

import bisect
import dataclasses
import functools
import operator
import os
from collections.abc import Sequence
from typing import Any, Literal

from kivi_jax.models.registry import Params

# Tokens of the prompt that are decoded along with a completion: what a tokenizer makes of a token, its leading space
# above all, can depend on the few before it.
CONTEXT_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        text: the decoded tokens, as they continue the prompt; None if the checkpoint has no tokenizer.
        tokens: generated ids, without the end token; after a stop string, those up to its last one.
        finish_reason: "stop" after an end token or a stop string, "length" at `max_new_tokens`; None while unfinished.
    """

    text: str | None
    tokens: list[int]
    finish_reason: Literal["stop", "length"] | None


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer in `folder`; no code from the folder is run.

    Raises:
        ValueError: its files are damaged or of an unknown kind.
    """
    # transformers warns that it has no PyTorch, which nobody here wants it to have.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # seconds to import, and token-id prompts don't need it

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's files make its parsers raise
        raise ValueError(f"{folder}: the tokenizer can't be loaded: {error}") from error


def encode(params: Params, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a text but no tokenizer, or something else.
    """
    encoded = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if params.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer; pass prompts as lists of token ids")
            ids = load_tokenizer(params.tokenizer).encode(prompt) if prompt else []
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError:
                raise ValueError(
                    f"prompt {number} must be a text or a list of token ids, got {prompt!r}; "
                    f"a single list of ids belongs in another list"
                ) from None
        if not ids:
            raise ValueError(f"prompt {number} is empty; give it at least one token")
        if outside := [token for token in ids if not 0 <= token < params.config.vocab_size]:
            raise ValueError(
                f"prompt {number} has token {outside[0]}, outside the vocabulary of {params.config.vocab_size}"
            )
        encoded.append(ids)
    return encoded


def check_stops(params: Params, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
        ValueError: one is empty or no string, or the checkpoint has no tokenizer to find them with.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop must be a string or several, none of them empty, got {stop!r}")
    if stops and params.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
    return stops


@dataclasses.dataclass(frozen=True)
class CompletionReader:
    """Reads what was generated after one prompt."""

    prompt: Sequence[int]
    end_tokens: tuple[int, ...]
    tokenizer: str | None
    stops: tuple[str, ...]
    max_new_tokens: int

    def read(self, tokens: list[int]) -> Completion:
        """The completion that `tokens`, all that was generated so far, amount to."""
        finish_reason: Literal["stop", "length"] | None = (
            "length" if len(tokens) == self.max_new_tokens else None
        )
        ends = [place for place, token in enumerate(tokens) if token in self.end_tokens]
        if ends:
            tokens, finish_reason = tokens[: ends[0]], "stop"
        if self.tokenizer is None:
            return Completion(None, tokens, finish_reason)
        text = self._decode(tokens)
        if self._first_stop(text) is not None:
            # The first tokens that complete a stop string decide, whatever was generated since.
            needed = bisect.bisect_left(
                range(len(tokens)),
                True,
                key=lambda count: self._first_stop(self._decode(tokens[:count])) is not None,
            )
            tokens, finish_reason = tokens[:needed], "stop"
            text = self._decode(tokens)
            text = text[: self._first_stop(text)]
        elif finish_reason is None:
            text = text[: len(text) - self._begun_stop(text)]
        return Completion(text, tokens, finish_reason)

    def _decode(self, tokens: list[int]) -> str:
        decode = functools.partial(load_tokenizer(str(self.tokenizer)).decode, skip_special_tokens=True)
        context = list(self.prompt[-CONTEXT_TOKENS:])
        before, whole = decode(context), decode(context + tokens)
        # Where the prompt ends within a character, the context decodes differently once the character is whole.
        return whole[len(before) :] if whole.startswith(before) else decode(tokens)

    def _first_stop(self, text: str) -> int | None:
        """Where the first of the stop strings in `text` begins."""
        return min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with: it may be about to come."""
        lengths = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(lengths, default=0)
