"""The loop of a job: keeps an engine busy with requests, and writes what it finishes."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from kivi_jax.batch.lines import Code, Failure
from kivi_jax.batch.output import Output
from kivi_jax.batch.progress import Progress
from kivi_jax.batch.requests import Request
from kivi_jax.batch.results import failure_line
from kivi_jax.batch.signals import StopSignals
from kivi_jax.completions import Completion
from kivi_jax.processes import largest
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt

LOOK_AHEAD = 4  # requests for each slot, of which the longest comes first
FAILED = 1000  # in place of a signal's number: a process can't write
SUBMITTED = 2  # samples for each slot that the engine knows of, so that a freed slot never waits


@runtime_checkable
class Event(Protocol):
    """What an engine's step says of a request."""

    @property
    def request(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completions(self) -> tuple[Completion, ...]: ...
    @property
    def finished(self) -> bool: ...


@runtime_checkable
class Server(Protocol):
    """What a job needs of `kivi_jax.Engine`."""

    slots: int

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    def submit(self, prompt: Prompt, settings: GenerationSettings | None = None) -> int: ...
    def step(self) -> Sequence[Event]: ...


def longest_first(requests: Iterator[Request], tokens: Mapping[int, int], ahead: int) -> Iterator[Request]:
    """The requests, always the longest of the next `ahead` ones.

    Too little memory shows at once, and the short ones at the end leave few slots idle.
    """
    heap: list[tuple[int, int, Request]] = []
    for request in requests:
        heapq.heappush(heap, (-tokens[request.number], request.number, request))
        if len(heap) >= ahead:
            yield heapq.heappop(heap)[-1]
    while heap:
        yield heapq.heappop(heap)[-1]


class Loop:
    """Runs requests through an engine.

    Args:
        engine: with nothing in it.
        output: where lines go.
        answer: the line of a finished request.
        progress: is told of everything.
    """

    def __init__(
        self,
        engine: Server,
        output: Output,
        answer: Callable[[Request, Event], bytes],
        progress: Progress,
    ) -> None:
        self._engine, self._output, self._answer, self._progress = engine, output, answer, progress
        self._error: OSError | None = None  # of the output, after which nothing is written
        self._running: dict[int, Request] = {}
        self._generated: dict[int, int] = {}  # tokens of each request that were counted

    def run(self, requests: Iterator[Request], stop: StopSignals) -> int | None:
        """Runs all requests, or until a signal, whose number it returns.

        Processes of one job agree after each step whether they go on, so that none waits for one that stopped.

        Raises:
            OSError: the output can't be written; what it has is whole.
        """
        while not (stopped := largest(FAILED if self._error else stop.received or 0)):
            self._admit(requests)
            if not self._running:
                stopped = largest(FAILED if self._error else 0)
                break
            for event in self._engine.step():
                self._take(event)
            self._write(self._output.tick)
            self._progress.update(running=self._engine.running)
        if self._error is not None:
            raise self._error
        if stopped == FAILED:
            raise OSError("process 0 can't write the output; its message says why")
        return stopped or None

    def _write(self, write: Callable[[], None]) -> None:
        if self._error is None:
            try:
                write()
            except OSError as error:
                self._error = error

    def _admit(self, requests: Iterator[Request]) -> None:
        wanted = SUBMITTED * self._engine.slots
        while self._engine.waiting + self._engine.running < wanted:
            if (request := next(requests, None)) is None:
                return
            try:
                self._running[self._engine.submit(request.prompt, request.settings)] = request
            except ValueError as error:
                self._fail(request, "invalid_request", str(error))

    def _take(self, event: Event) -> None:
        count = sum(len(completion.tokens) for completion in event.completions)
        self._progress.update(tokens=count - self._generated.get(event.request, 0))
        self._generated[event.request] = count
        if not event.finished:
            return
        del self._generated[event.request]
        request = self._running.pop(event.request)
        if error := next((completion.error for completion in event.completions if completion.error), None):
            self._fail(request, "model_error", error)
        else:
            line = self._answer(request, event)
            self._write(lambda: self._output.write(line))
            self._progress.update(done=1)

    def _fail(self, request: Request, code: Code, message: str) -> None:
        failure = Failure(request.number, request.id, request.url is not None, code, message)
        self._write(lambda: self._output.write(failure_line(failure)))
        self._progress.update(done=1, failed=1)
