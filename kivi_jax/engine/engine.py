"""The engine: requests in, completions out, and between them a batch that stays full."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Unpack

import numpy as np

from kivi_jax.arguments import read_size
from kivi_jax.completions import Completion, make_reader
from kivi_jax.engine.admission import Admission
from kivi_jax.engine.memory import plan_memory
from kivi_jax.engine.requests import Request, Sample
from kivi_jax.engine.slots import Placement, Programs, Report, Shape, Slots, Window
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.model import Params
from kivi_jax.request import GenerationOptions, GenerationSettings, make_settings
from kivi_jax.rows import pad_end_tokens
from kivi_jax.text import Prompt, encode, is_conversation, read_stops

# Without a capacity that is asked for: enough for most requests, and a row's memory grows with it.
DEFAULT_CAPACITY = 4096
# A window leaves once this part of the slots is free and somebody waits: later keeps slots idle, earlier costs a
# transfer for each row that ends.
FREED_PART = 16
# While prompts wait for their turn, rows that decode get this part of a window between two turns.
SHORT_WINDOW_PART = 8


@dataclasses.dataclass(frozen=True)
class Output:
    """What a request has so far.

    Attributes:
        request: its id.
        prompt_tokens: the length of its prompt.
        completions: one for each sample, unfinished ones too.
        finished: whether all of them are finished; then nothing more comes.
    """

    request: int
    prompt_tokens: int
    completions: tuple[Completion, ...]
    finished: bool


@dataclasses.dataclass
class Stats:
    """What an engine has done so far.

    Attributes:
        windows: of decoding.
        steps: of decoding, each a token of every row that has not ended.
        tokens: generated, also those that nobody wants: of cancelled requests, and after a stop string.
        prompt_tokens: that were prefilled.
        decoding: sum over the steps of the rows that had not ended, so `decoding / steps` slots were in use.
        host_seconds: from the end of a window to the start of the next, within `step`.
    """

    windows: int = 0
    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    decoding: int = 0
    host_seconds: float = 0.0


class Engine:
    """Generates for requests that come at any time, in a batch whose rows are filled again as they end.

    A request's tokens are those that `generate` gives for it alone: they depend neither on the order of requests nor on
    `slots` or `window`; in 16 bits up to rounding, which can turn a near tie. A prompt of more than `prefill_tokens` is
    prefilled in pieces, as by `generate(…, prefill_chunk=prefill_tokens)`.

    Nothing runs but in calls of `step`, and none of it in threads. A step starts a window of decoding and returns what
    the window before gave, so that texts are made while the device goes on.

    Args:
        params: from `load`. On its mesh slots are split over the axis "data".
        kv: storage of the KV state, as for `generate`.
        slots: rows of the batch. None for as many as fit the device's free memory; how many that are, and why, is then
            printed to stderr before anything is allocated.
        most_slots: with `slots=None`, no more than these, rounded up to what the mesh can split: for a job of few
            requests, as rows that nobody uses cost time.
        capacity: tokens that a row can hold, prompt and completion. None for 4096, or the model's positions if they are
            fewer.
        window: most tokens that a row generates between two looks at it.
        prefill_tokens: most tokens of a prompt that run at once. While rows decode, no more run between two windows on
            a device, and beside them no more than one piece of a long prompt.
        chat_template: name of the chat template for conversations, where the checkpoint has several.

    Attributes:
        slots: rows of the batch.
        capacity: tokens of a row.
        stats: what was done so far.

    Raises:
        ValueError: an unknown `kv`, a size that is no positive whole number, slots that the mesh can't split evenly, a
            capacity of more than the model's positions, or memory for not even one slot.
    """

    def __init__(
        self,
        params: Params,
        kv: str | KVConfig = "kivi2",
        *,
        slots: int | None = None,
        most_slots: int | None = None,
        capacity: int | None = None,
        window: int = 64,
        prefill_tokens: int = 4096,
        chat_template: str | None = None,
    ) -> None:
        positions = params.config.max_positions
        self.capacity = (
            min(DEFAULT_CAPACITY, positions) if capacity is None else read_size("capacity", capacity)
        )
        if self.capacity > positions:
            raise ValueError(f"capacity {self.capacity} exceeds the model's {positions} positions")
        shape = Shape(
            resolve_kv(kv, params.config.head_dim, params.config.num_layers),
            1 if slots is None else read_size("slots", slots, ", or None for as many as fit"),
            self.capacity,
            read_size("window", window),
            read_size("prefill_tokens", prefill_tokens),
            len(pad_end_tokens(params.end_tokens)) + 4,  # some for stop strings that are special tokens
        )
        devices = params.data_devices
        if slots is not None and shape.slots % devices:
            raise ValueError(f"{slots} slots can't be split evenly over {devices} devices")
        if slots is None:
            programs, plan = plan_memory(
                params, shape, None if most_slots is None else read_size("most_slots", most_slots)
            )
            print(plan, file=sys.stderr)
        else:
            programs = Programs(params, shape)
        self.slots = programs.shape.slots
        self.stats = Stats()
        self._params = params
        self._chat_template = chat_template
        self._programs = programs
        self._admission = Admission(programs.shape, programs.devices)
        self._device = Slots(programs)
        self._window: Window | None = None
        self._requests: dict[int, Request] = {}  # by id, those that are not finished
        self._submitted = 0
        self._broken: BaseException | None = None  # what ended a step half-way

    @property
    def waiting(self) -> int:
        """Samples that have no slot yet."""
        return sum(request.unplaced for request in self._admission.waiting)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(sample is not None for sample in self._admission.slots)

    def warm_up(self) -> None:
        """Compiles every program that a request can need. Otherwise the first one that needs it waits for it."""
        collections.deque(self._programs.all(), maxlen=0)

    def submit(
        self,
        prompt: Prompt,
        settings: GenerationSettings | None = None,
        *,
        n: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> int:
        """Takes a request, and returns its id.

        Args:
            prompt: a text, a conversation or a list of token ids.
            settings: how to generate; None for the defaults. Each request has its own.
            n: samples of the prompt, which is prefilled once for those that get slots together.
            **options: fields of `GenerationSettings`, which change those of `settings`.

        Raises:
            TypeError: an option that there is not.
            ValueError: what `generate` refuses, or more tokens than the capacity.
            RuntimeError: a step failed.
        """
        self._check_whole()
        settings = make_settings(settings, n, **options)
        (tokens,) = encode(self._params, [prompt], self._chat_template)
        stops, end_tokens = read_stops(self._params, settings)
        if len(tokens) + settings.max_new_tokens > self.capacity:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens {settings.max_new_tokens} exceed the engine's "
                f"capacity of {self.capacity} tokens; shorten one of them, or make an engine with a larger capacity"
            )
        # What the device has no place for is found when the tokens are read.
        on_device = end_tokens[: self._programs.shape.ends]
        request = Request(self._submitted, tokens, settings, on_device)
        request.samples += [
            Sample(request, i, make_reader(self._params, prompt, tokens, settings, stops, end_tokens))
            for i in range(settings.n or 1)
        ]
        request.unplaced = len(request.samples)
        self._submitted += 1
        self._requests[request.id] = request
        self._admission.waiting.append(request)
        return request.id

    def cancel(self, request: int) -> bool:
        """Drops a request, of which nothing more comes. False if there is none of this id that is unfinished."""
        dropped = self._requests.pop(request, None)
        if dropped is None:
            return False
        dropped.cancelled = True
        if dropped in self._admission.waiting:
            self._admission.waiting.remove(dropped)
        return True

    def step(self) -> list[Output]:
        """Fills free slots, starts a window of decoding, and returns what the one before it gave.

        So the first call returns nothing, and so does each while nothing waits or runs.

        Returns:
            For each request that has new tokens what it has so far, finished or not, in the order of their ids.

        Raises:
            RuntimeError: an earlier step was left half-way, by an error of the device's or by Ctrl-C. While a window
                is waited for, Ctrl-C does no harm.
        """
        self._check_whole()
        report = None if self._window is None else self._window.read()
        began = time.perf_counter()
        try:
            samples = [] if report is None else self._collect(report)
            self._admit()
            self._window = self._decode()
            self.stats.host_seconds += time.perf_counter() - began
            return self._read(samples)
        except BaseException as error:
            self._broken = error
            raise

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"a step of this engine failed ({type(self._broken).__name__}: {self._broken}), and what its slots "
                f"hold is unknown; make another engine"
            ) from self._broken

    def generate(
        self,
        requests: Iterable[Prompt | tuple[Prompt, GenerationSettings]],
        settings: GenerationSettings | None = None,
    ) -> Iterator[tuple[int, Completion | list[Completion]]]:
        """Yields the completions of many requests as they finish, each with the place of its request.

        Not beside requests of your own, whose outputs would be passed over. What is not finished when the iterator is
        closed is cancelled.

        Args:
            requests: prompts, each alone or with its own settings; read as slots become free, so it may be endless.
            settings: of prompts that come alone; None for the defaults.

        Yields:
            The place of a request, from 0 on, and what `generate` returns for its prompt. For one that `submit` would
            refuse that is a completion with the finish reason "error", which tells why.

        Raises:
            ValueError: `requests` is a single prompt, or `settings` are none.
        """
        if isinstance(requests, str | Mapping) or is_conversation(requests):
            raise ValueError(
                f"requests must be several prompts, got a single one; put it in a list: {requests!r}"
            )
        return self._generate(requests, make_settings(settings, None))

    def _generate(
        self, requests: Iterable[Prompt | tuple[Prompt, GenerationSettings]], settings: GenerationSettings
    ) -> Iterator[tuple[int, Completion | list[Completion]]]:
        source = enumerate(requests)
        places: dict[int, tuple[int, GenerationSettings]] = {}
        more = True
        try:
            while more or places:
                while more and self.waiting <= self.slots:
                    if (item := next(source, None)) is None:
                        more = False
                        break
                    place, asked = item
                    prompt, own = (
                        asked if isinstance(asked, tuple) and _has_settings(asked) else (asked, settings)
                    )
                    try:
                        places[self.submit(prompt, own)] = place, own
                    except ValueError as error:
                        yield place, Completion(None, [], "error", error=str(error))
                for output in self.step():
                    if output.finished and output.request in places:
                        place, own = places.pop(output.request)
                        completions = list(output.completions)
                        yield place, completions[0] if own.n is None else completions
                places = {request: of for request, of in places.items() if request in self._requests}
        finally:
            for request in places:
                self.cancel(request)

    def _collect(self, report: Report) -> list[Sample]:
        """Frees the slots that have ended, and returns the samples with new tokens."""
        collected = []
        steps = 0
        for slot, sample in enumerate(self._admission.slots):
            if sample is None or self._admission.in_pieces(slot):
                continue
            tokens, logprobs = report.newest(slot, len(sample.tokens))
            stepped = max(len(tokens) - (not sample.tokens), 0)  # its prefill gave the first
            steps = max(steps, stepped)
            self.stats.tokens += len(tokens)
            self.stats.decoding += stepped
            if not sample.done:
                sample.add(tokens, logprobs)
                collected.append(sample)
            if sample.done or not report.active[slot]:
                self._admission.free(slot)
        self.stats.windows += 1
        self.stats.steps += steps
        return collected

    def _admit(self) -> None:
        """Prefills what free slots can take; while something decodes, `prefill_tokens` and a piece of a long prompt."""
        for slot, sample in enumerate(self._admission.slots):
            if sample is not None and sample.request.cancelled:
                self._admission.free(slot)
        while self._admission.unfinished:
            decoding = self._admission.any_decodes
            for placements in self._admission.prompts(
                self._programs.shape.prefill_tokens if decoding else None
            ):
                self._prefill(self._device.insert, placements)
            begun, further = self._admission.pieces()
            self._prefill(self._device.insert, begun)
            self._prefill(self._device.extend, further)
            if self._admission.any_decodes:
                break

    def _prefill(self, run: Callable[[list[Placement]], None], placements: list[Placement]) -> None:
        if placements:
            run(placements)
            self.stats.prompt_tokens += sum(len(placement.tokens) for placement in placements)

    def _decode(self) -> Window | None:
        wanted = np.array([self._admission.decoding(slot) for slot in range(self.slots)])
        if not wanted.any():
            return None
        steps = self._programs.shape.window
        if self._admission.unfinished:
            steps = max(steps // SHORT_WINDOW_PART, 1)
        enough = max(self.slots // FREED_PART, 1) if self._admission.waiting else self.slots + 1
        return self._device.decode(wanted, steps, enough)

    def _read(self, samples: list[Sample]) -> list[Output]:
        """Makes the completions of samples with new tokens."""
        requests: dict[int, Request] = {}
        for sample in samples:
            if not sample.request.cancelled:
                sample.read()
                requests[sample.request.id] = sample.request
        outputs = []
        for request in sorted(requests.values(), key=lambda request: request.id):
            finished = all(sample.done for sample in request.samples)
            if finished:
                del self._requests[request.id]
            completions = tuple(sample.completion for sample in request.samples)
            outputs.append(Output(request.id, len(request.tokens), completions, finished))
        return outputs


def _has_settings(asked: tuple[object, ...]) -> bool:
    return len(asked) == 2 and isinstance(asked[1], GenerationSettings)
