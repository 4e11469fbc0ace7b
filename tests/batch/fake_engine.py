"""An engine without a model: what a request generates follows from its prompt and settings alone."""

import dataclasses
import json

from kivi_jax.completions import Completion


@dataclasses.dataclass(frozen=True)
class FakeOutput:
    request: int
    prompt_tokens: int
    completions: tuple[Completion, ...]
    finished: bool


class FakeEngine:
    """Decodes `window` tokens a step for the first `slots` requests.

    Attributes:
        made: all that were made, of which tests look at the last one.
        before_step: called with the engine before each step.
    """

    made: list["FakeEngine"] = []  # noqa: RUF012
    before_step = staticmethod(lambda engine: None)

    def __init__(self, params, kv, *, slots=None, most_slots=None, capacity=None, **options):
        self.most_slots = most_slots
        self.params, self.kv, self.slots, self.capacity, self.options = (
            params,
            kv,
            slots or 4,
            capacity,
            options,
        )
        self.requests, self.tokens, self.submitted = {}, {}, []
        FakeEngine.made.append(self)

    @property
    def running(self):
        return min(self.slots, len(self.requests))

    @property
    def waiting(self):
        return len(self.requests) - self.running

    def submit(self, prompt, settings=None):
        if prompt == "refused":
            raise ValueError("the engine refuses it")
        number = len(self.submitted)
        self.submitted.append((prompt, settings))
        self.requests[number], self.tokens[number] = (prompt, settings), 0
        return number

    def step(self):
        self.before_step(self)
        outputs = []
        for number in list(self.requests)[: self.slots]:
            prompt, settings = self.requests[number]
            self.tokens[number] = min(self.tokens[number] + self.options["window"], settings.max_new_tokens)
            finished = self.tokens[number] == settings.max_new_tokens
            completions = tuple(
                complete(prompt, settings, sample, self.tokens[number], finished)
                for sample in range(settings.n or 1)
            )
            outputs.append(FakeOutput(number, len(prompt), completions, finished))
            if finished:
                del self.requests[number]
        return outputs


def complete(prompt, settings, sample, count, finished):
    if prompt == "overflow":
        return Completion(
            "", [], "error" if finished else None, error="the model's activations are no numbers"
        )
    drawn = settings.seed if settings.temperature else 0
    text = json.dumps([prompt, settings.max_new_tokens, drawn, sample])
    logprobs = [-0.5] * count if settings.logprobs else None
    return Completion(text, [7] * count, "length" if finished else None, logprobs)
