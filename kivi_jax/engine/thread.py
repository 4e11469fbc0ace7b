"""An engine in a thread of its own, for programs in which many wait for requests at the same time."""

import dataclasses
import queue
import threading
from concurrent.futures import Future

from kivi_jax.engine.engine import Engine, Output
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt


class EngineDied(RuntimeError):
    """The thread of an engine has ended, and with it every request that it had."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    prompt: Prompt
    settings: GenerationSettings
    answer: Future[Output]


class EngineThread:
    """Runs an engine, which is for one thread only, for callers in any.

    What an engine that raises had on its device is lost. So all who wait are then told, and so is everybody who comes
    later: nobody waits for a thread that is gone.

    Args:
        engine: is used by nobody else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._answers: dict[int, Future[Output]] = {}  # by request, those that the engine has
        self._lock = threading.Lock()  # of `_end`, so that nothing is asked after the last look at what was
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kivi-jax engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, settings: GenerationSettings) -> Future[Output]:
        """Takes a request. `asyncio.wrap_future` makes an awaitable of what it returns.

        Returns:
            The finished output. Or an exception: whatever `Engine.submit` raises for this request, which concerns no
            other one, or `EngineDied`.
        """
        answer: Future[Output] = Future()
        with self._lock:
            if self._end is None:
                self._asked.put(_Asked(prompt, settings, answer))
            else:
                answer.set_exception(_died(self._end))
        return answer

    def close(self) -> None:
        """Ends the thread after the step that it is in. Requests that are not finished raise `EngineDied`."""
        self._stop(_Closed("it was closed"))
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._end is None:
                self._take()
                for output in self._engine.step():
                    if output.finished:
                        self._answers.pop(output.request).set_result(output)
        except BaseException as error:  # whatever it is: those who wait would wait for ever
            self._stop(error)
        assert self._end is not None
        for answer in self._answers.values():
            answer.set_exception(_died(self._end))
        while not self._asked.empty():
            asked = self._asked.get()
            if asked is not None and asked.answer.set_running_or_notify_cancel():
                asked.answer.set_exception(_died(self._end))

    def _stop(self, end: BaseException) -> None:
        with self._lock:
            if self._end is None:
                self._end = end
        self._asked.put(None)  # wakes the thread

    def _take(self) -> None:
        """Gives the engine what was asked, as much as it will soon have slots for; waits while there is nothing."""
        while self._end is None and self._engine.waiting <= self._engine.slots:
            idle = not (self._engine.waiting or self._engine.running)
            try:
                asked = self._asked.get(block=idle)
            except queue.Empty:
                return
            if asked is None or not asked.answer.set_running_or_notify_cancel():
                continue
            try:
                self._answers[self._engine.submit(asked.prompt, asked.settings)] = asked.answer
            except Exception as error:  # of this request; the engine is as it was
                asked.answer.set_exception(error)


class _Closed(Exception):
    """Ends a thread that nobody needs any more."""


def _died(end: BaseException) -> EngineDied:
    """An exception of its own for each who waits: raised ones remember where they were."""
    if isinstance(end, _Closed):
        return EngineDied("the engine gave no result: it was closed")
    reason = str(end).partition("\n")[0]  # XLA says pages where memory is full
    error = EngineDied(
        f"the engine died of {type(end).__name__}: {reason}; start it anew, with fewer slots or a smaller capacity "
        "if the device's memory was full"
    )
    error.__cause__ = end
    return error
