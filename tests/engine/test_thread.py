"""An engine in a thread: everybody gets an answer, whatever becomes of it."""

import asyncio
import concurrent.futures
import threading

import pytest

import kivi_jax
from kivi_jax import Completion, Engine, GenerationSettings, KVConfig, Output
from kivi_jax.engine.thread import EngineDied, EngineThread

KV = KVConfig(2, 2, 32, 32)
SECONDS = 60  # more than anything here takes


class Scripted(Engine):
    """Finishes all that it has with each step, once it may; raises where it is told to."""

    def __init__(self, slots: int = 2):
        self.slots = slots
        self.may_step = threading.Event()
        self.failure: BaseException | None = None
        self.submitted: list[int] = []
        self.unfinished: list[int] = []

    @property
    def waiting(self) -> int:
        return max(len(self.unfinished) - self.slots, 0)

    @property
    def running(self) -> int:
        return min(len(self.unfinished), self.slots)

    def submit(self, prompt, settings=None, **_):
        if prompt == "refused":
            raise ValueError("this one is refused")
        self.submitted.append(len(self.submitted))
        self.unfinished.append(self.submitted[-1])
        return self.submitted[-1]

    def step(self):
        if self.unfinished:
            assert self.may_step.wait(SECONDS)
        if self.failure:
            raise self.failure
        done, self.unfinished = self.unfinished, []
        return [Output(request, 1, (Completion("", [], "stop"),), True) for request in done]


def test_callers_in_many_threads_get_what_they_get_alone(tiny):
    settings = [GenerationSettings(5 + i % 7, temperature=i % 2, seed=i) for i in range(24)]
    expected = [kivi_jax.generate(tiny, [[i + 1, 2]], KV, settings[i])[0] for i in range(24)]
    engine = EngineThread(Engine(tiny, KV, slots=3, capacity=64, window=8))

    def ask(i: int) -> Completion:
        return engine.submit([i + 1, 2], settings[i]).result(SECONDS).completions[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(24)))
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    refused = engine.submit([1] * 60, GenerationSettings(5))
    with pytest.raises(ValueError, match="exceed the engine's capacity of 64"):
        refused.result(SECONDS)
    assert engine.submit([1, 2], settings[0]).result(SECONDS).finished
    engine.close()


def test_coroutines_wait_for_requests():
    engine = Scripted()
    engine.may_step.set()
    thread = EngineThread(engine)

    async def ask(prompt: str) -> Output:
        return await asyncio.wrap_future(thread.submit(prompt, GenerationSettings()))

    async def ask_all() -> list[Output | BaseException]:
        return await asyncio.gather(*map(ask, ["a", "refused", "b"]), return_exceptions=True)

    first, refused, second = asyncio.run(asyncio.wait_for(ask_all(), SECONDS))
    assert isinstance(refused, ValueError)
    assert {first.request, second.request} == {0, 1}
    thread.close()


@pytest.mark.parametrize(
    "failure", [RuntimeError("a chip was lost\nand more"), SystemExit("a chip was lost")]
)
def test_all_who_wait_hear_of_an_engine_that_died_and_so_do_later_ones(failure):
    engine = Scripted()
    engine.failure = failure
    thread = EngineThread(engine)
    waiting = [thread.submit("a", GenerationSettings()) for _ in range(20)]
    engine.may_step.set()
    for answer in waiting:
        error = answer.exception(SECONDS)
        assert isinstance(error, EngineDied)
        assert error.__cause__ is failure
        assert str(error) == (
            f"the engine died of {type(failure).__name__}: a chip was lost; start it anew, with fewer slots or a "
            "smaller capacity if the device's memory was full"
        )
    assert isinstance(thread.submit("a", GenerationSettings()).exception(SECONDS), EngineDied)
    thread.close()


def test_closing_lets_nobody_wait():
    engine = Scripted()
    thread = EngineThread(engine)
    waiting = [thread.submit("a", GenerationSettings()) for _ in range(20)]
    closing = threading.Thread(target=thread.close)
    closing.start()
    engine.may_step.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    # Those of the step that was running may be finished.
    errors = [answer.exception(SECONDS) for answer in waiting]
    assert all(error is None or "it was closed" in str(error) for error in errors)
    assert errors[-1] is not None


def test_the_engine_gets_no_more_than_it_soon_has_slots_for():
    """The rest may still be cancelled, and costs no tokenizing between steps."""
    engine = Scripted(slots=2)
    thread = EngineThread(engine)
    answers = [thread.submit("a", GenerationSettings()) for _ in range(50)]
    cancelled = answers[-1].cancel()
    engine.may_step.set()
    for answer in answers[:-1]:
        assert answer.result(SECONDS).finished
    assert cancelled
    assert len(engine.submitted) == 49
    thread.close()
