"""Completions, read from the tokens that a model generates."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from kivi_jax.decoding import NO_TOKEN
from kivi_jax.detokenizer import Detokenizer
from kivi_jax.text import load_tokenizer

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    Attributes:
        text: the decoded tokens, as they continue the prompt. While unfinished it only grows, and lacks an end that the
            next tokens may change: half a character, or the beginning of a stop string. Half a character at the end of
            a finished one reads as U+FFFD. None if the checkpoint has no tokenizer.
        tokens: generated ids, without the end token; after a stop string, those up to its last one.
        finish_reason: "stop" after an end token or a stop string, "length" at `max_new_tokens`, "error" where the
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
    """Reads what is generated after one prompt, each token once, so that what it shows and where it ends don't depend
    on how many tokens come at a time.

    Args:
        context: the tokens of the prompt if the completion continues its text. An answer in a conversation begins a
            text of its own, and has none.
        end_tokens: ids that end a completion.
        tokenizer: the folder with the tokenizer's files, if there is one.
        stops: strings that end a completion.
        max_new_tokens: where a completion ends otherwise.
        error: what is said where the model gave no token.
    """

    def __init__(
        self,
        context: Sequence[int],
        end_tokens: tuple[int, ...],
        tokenizer: str | None,
        stops: tuple[str, ...],
        max_new_tokens: int,
        error: str = "the model gave no token",
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self._stops = stops
        self._detokenizer = None if tokenizer is None else Detokenizer(load_tokenizer(tokenizer), context)
        self._text = ""
        self._count = 0  # tokens of the completion
        self._finish_reason: FinishReason | None = None
        self._error = error

    def read(self, tokens: list[int], logprobs: list[float] | None = None) -> Completion:
        """The completion that `tokens`, all that was generated so far, amount to; they begin with the last call's."""
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
            self._error if self._finish_reason == "error" else None,
        )

    def _add(self, token: int) -> str:
        """The text that comes with this token, which may finish the completion."""
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
        """Where the first of the stop strings in `text` begins that ends after its first `new` characters."""
        places = (text.find(stop, max(0, new - len(stop) + 1)) for stop in self._stops)
        return min((place for place in places if place >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with: it may be about to come."""
        lengths = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(lengths, default=0)
