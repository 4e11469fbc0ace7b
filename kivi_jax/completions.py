"""Completions, read from the tokens that a model generates."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from kivi_jax.decoding import NO_TOKEN
from kivi_jax.detokenizer import Detokenizer
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt, is_conversation, load_tokenizer

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        text: the decoded tokens, as they continue the prompt. While the completion is unfinished, its text only grows:
            an end that the next tokens may change (an incomplete character, or the beginning of a stop string) is held
            back. At the end of a finished one, an incomplete character is U+FFFD. None if there is no tokenizer.
        tokens: generated ids, without the end token. With a stop string, the last one is the token that completes it.
        finish_reason: "stop" after an end token or a stop string, "length" at `max_new_tokens`, "error" if the
            model's activations overflowed; None while unfinished.
        logprobs: natural logarithm of the probability the model gave each of `tokens`, in nats: the log-softmax of its
            float32 logits, before temperature, repetition penalty and cuts; None if they weren't asked for.
        error: after an "error", what went wrong and what to do.
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: list[float] | None = None
    error: str | None = None


class CompletionReader:
    """Makes one prompt's completion from the tokens that are generated.

    Each token is read once, so that text and end of a completion don't depend on how many tokens come at a time.

    Args:
        context: the prompt's tokens if the completion continues its text; empty for an answer in a conversation, which
            begins a new text.
        end_tokens: ids that end a completion.
        tokenizer: the folder with the tokenizer's files; None if there is no tokenizer.
        stops: strings that end a completion.
        max_new_tokens: the most tokens of a completion.
        dtype: of the model's activations, which an error names.
    """

    def __init__(
        self,
        context: Sequence[int],
        end_tokens: tuple[int, ...],
        tokenizer: str | None,
        stops: tuple[str, ...],
        max_new_tokens: int,
        dtype: str,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self._stops = stops
        self._detokenizer = None if tokenizer is None else Detokenizer(load_tokenizer(tokenizer), context)
        self._text = ""
        self._count = 0  # tokens of the completion
        self._finish_reason: FinishReason | None = None
        self._dtype = dtype

    def read(self, tokens: list[int], logprobs: list[float] | None = None) -> Completion:
        """The completion after `tokens`: all tokens generated so far, beginning with those of the last call."""
        text = self._text
        for token in itertools.islice(tokens, self._count, None):
            if self._finish_reason is not None:
                break
            added = self._add(token)
            text += added
            if added and (place := self._first_stop(text, len(text) - len(added))) is not None:
                text, self._finish_reason = text[:place], "stop"
        self._text = text
        begun = 0 if self._finish_reason is not None else self._begun_stop(text)
        return Completion(
            None if self._detokenizer is None else text[: len(text) - begun],
            tokens[: self._count],
            self._finish_reason,
            logprobs and logprobs[: self._count],
            self._overflow() if self._finish_reason == "error" else None,
        )

    def _add(self, token: int) -> str:
        """Counts a token, which may finish the completion, and returns the text that it adds."""
        failed = token == NO_TOKEN
        ends = failed or token in self.end_tokens
        if ends:
            self._finish_reason = "error" if failed else "stop"
        else:
            self._count += 1
            if self._count == self.max_new_tokens:
                self._finish_reason = "length"
        if self._detokenizer is None:
            return ""
        text = "" if ends else self._detokenizer.add(token)
        return text if self._finish_reason is None else text + self._detokenizer.rest()

    def _first_stop(self, text: str, new: int) -> int | None:
        """Where the first stop string begins that ends after the first `new` characters of `text`."""
        places = (text.find(stop, max(0, new - len(stop) + 1)) for stop in self._stops)
        return min((place for place in places if place >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` that may be the beginning of a stop string."""
        lengths = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(lengths, default=0)

    def _overflow(self) -> str:
        """What to say if the model gave logits that are not finite, and so no token."""
        problem = f"the model's activations are no finite numbers in {self._dtype}"
        if self._dtype == "float16":
            return f"{problem}, whose largest is 65504; load it with dtype='bfloat16' or 'float32'"
        return f"{problem}; its weights may be damaged or of another model"


def make_reader(
    params: Params,
    prompt: Prompt,
    tokens: Sequence[int],
    settings: GenerationSettings,
    stops: tuple[str, ...],
    end_tokens: tuple[int, ...],
) -> CompletionReader:
    """The reader of a completion of `prompt`, which has these tokens; stops and end tokens are from `read_stops`."""
    return CompletionReader(
        () if is_conversation(prompt) else tokens,
        end_tokens,
        params.tokenizer,
        stops,
        settings.max_new_tokens,
        params.dtype.name,
    )
