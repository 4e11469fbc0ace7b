"""The host's side of what an engine was asked for: prompts, and the completions that grow."""

import dataclasses

from kivi_jax.completions import Completion, CompletionReader
from kivi_jax.request import GenerationSettings


@dataclasses.dataclass(eq=False)
class Sample:
    """One completion of a request: in no slot, or in one, or finished.

    Attributes:
        request: what it is part of.
        number: which of its prompt's samples it is.
        reader: makes the completion.
        tokens: what was generated so far, and `logprobs` of each.
        completion: as `tokens` reads.
    """

    request: "Request"
    number: int
    reader: CompletionReader
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    completion: Completion = dataclasses.field(default_factory=lambda: Completion(None, [], None))

    @property
    def done(self) -> bool:
        return self.request.cancelled or self.completion.finish_reason is not None

    def add(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens
        self.logprobs += logprobs

    def read(self) -> None:
        wanted = self.logprobs if self.request.settings.logprobs else None
        self.completion = self.reader.read(self.tokens, wanted)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what is made of it.

    Attributes:
        id: as `Engine.submit` gave it.
        tokens: of the prompt.
        settings: of all its samples.
        end_tokens: ids that end them.
        samples: its completions.
        unplaced: how many of the samples, the last ones, have no slot yet.
        cancelled: whether nobody wants it any more.
    """

    id: int
    tokens: list[int]
    settings: GenerationSettings
    end_tokens: tuple[int, ...]
    samples: list[Sample] = dataclasses.field(default_factory=list)
    unplaced: int = 0
    cancelled: bool = False
