"""The engine gives each request what `generate` gives it alone, whoever else is there."""

import dataclasses
import random
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import kivi_jax
from kivi_jax import Completion, Engine, GenerationSettings, KVConfig
from kivi_jax.engine import slots as engine_slots
from kivi_jax.engine.slots import Programs, Slots
from scripts.parity_report import GOLDENS
from tests.further import further

KV = KVConfig(2, 2, 32, 32, boosted_channels=0.25)  # of which a slot keeps nothing for its next request
PIECE = 32  # tokens that are prefilled at once
CAPACITY = 144
SAMPLED = GenerationSettings(40, temperature=1.0, seed=2**40, logprobs=True)
ASKED = (  # tokens of a prompt, of which the longer ones come in pieces, and how to go on
    (5, GenerationSettings(13)),
    (12, GenerationSettings(48, logprobs=True)),
    (12, SAMPLED),
    (16, dataclasses.replace(SAMPLED, n=3)),
    (16, GenerationSettings(48, temperature=0.7, top_k=7, top_p=0.8, seed=-3)),
    (30, GenerationSettings(47, repetition_penalty=1.4)),
    (30, GenerationSettings(1)),
    (64, GenerationSettings(40, repetition_penalty=1.4)),
    (96, GenerationSettings(33, temperature=1.2, min_p=0.1, seed=7)),
)
Asked = tuple[list[int], GenerationSettings]


def alone(params: kivi_jax.Params, prompt: list[int], settings: GenerationSettings) -> tuple[Completion, ...]:
    out = kivi_jax.generate(params, [prompt], KV, settings, prefill_chunk=PIECE)[0]
    return tuple(out) if isinstance(out, list) else (out,)


@pytest.fixture(scope="module")
def pool(tiny) -> list[tuple[Asked, tuple[Completion, ...]]]:
    """Requests, and what each gets alone."""
    generator = np.random.default_rng(0)
    asked = [(generator.integers(0, 100, length).tolist(), settings) for length, settings in ASKED]
    return [(request, alone(tiny, *request)) for request in asked]


@pytest.fixture(scope="module")
def engines(tiny) -> dict[tuple[int, int], Engine]:
    """By slots and window. Each is used for many schedules, as one that runs for long is."""
    return {
        (slots, window): Engine(tiny, KV, slots=slots, capacity=CAPACITY, window=window, prefill_tokens=PIECE)
        for slots, window in ((1, 8), (3, 5), (4, 64))
    }


def equal(completion: Completion, expected: Completion) -> None:
    """Tokens and their end are the same, and log-probabilities but for rounding."""
    assert completion.tokens == expected.tokens
    assert completion.finish_reason == expected.finish_reason
    if expected.logprobs is not None:
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-3)
    else:
        assert completion.logprobs is None


def run_schedule(engine: Engine, pool: list, seed: int) -> None:
    """Requests that come and are cancelled at random steps."""
    chance = random.Random(seed)
    arrivals = [chance.choice(pool) for _ in range(chance.randrange(1, 10))]
    expected, finished, cancelled, seen = {}, set(), set(), {}
    while arrivals or engine.waiting or engine.running:
        for _ in range(chance.choice([0, 1, 1, 2, 6])):
            if arrivals:
                (prompt, settings), completions = arrivals.pop()
                expected[engine.submit(prompt, settings)] = completions
        if expected and chance.random() < 0.1:
            request = chance.choice(list(expected))
            assert engine.cancel(request) == (request not in finished | cancelled)
            if request not in finished:
                cancelled.add(request)
        outputs = engine.step()
        assert engine.running <= engine.slots
        assert [output.request for output in outputs] == sorted({output.request for output in outputs})
        for output in outputs:
            assert output.request not in finished | cancelled
            for so_far, whole in zip(output.completions, expected[output.request], strict=True):
                assert so_far.tokens == whole.tokens[: len(so_far.tokens)]
            # Something is new with each.
            count = sum(len(completion.tokens) for completion in output.completions)
            assert output.finished or count > seen.get(output.request, 0)
            seen[output.request] = count
            if output.finished:
                finished.add(output.request)
                for completion, whole in zip(output.completions, expected[output.request], strict=True):
                    equal(completion, whole)
    assert engine.step() == []
    assert finished | cancelled == set(expected)


@pytest.mark.parametrize("first", [0, *(further(first) for first in range(60, 300, 60))])
def test_requests_get_what_they_get_alone(pool, engines, first):
    """Whenever they come, however many slots and steps there are, and whoever is cancelled beside them."""
    for seed in range(first, first + 60):
        engine = engines[sorted(engines)[seed % len(engines)]]
        run_schedule(engine, pool, seed)


@pytest.mark.exhaustive
def test_layers_with_and_without_windows():
    """Slots are filled again where some layers keep a ring of blocks and others all tokens, as in Gemma 3."""
    params = kivi_jax.load(GOLDENS / "gemma3_vision", "float32")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 100, length).tolist() for length in (5, 96, 33)]
    settings = GenerationSettings(40)
    expected = kivi_jax.generate(params, prompts, KV, settings, prefill_chunk=PIECE)
    engine = Engine(params, KV, slots=2, capacity=CAPACITY, window=8, prefill_tokens=PIECE)
    for place, completion in engine.generate((prompt, settings) for prompt in prompts):
        equal(completion, expected[place])


def test_nothing_is_compiled_after_warming_up(tiny, pool):
    engine = Engine(tiny, KV, slots=2, capacity=CAPACITY, window=8, prefill_tokens=PIECE)
    engine.warm_up()
    run_schedule(engine, pool[:1], 0)  # what JAX does between programs
    compiled = []

    def record(event: str, seconds: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        for seed in range(12):
            run_schedule(engine, pool, seed)
        assert compiled == []
        jax.jit(lambda x: x * 3)(7)
        assert compiled  # so it would have been heard
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def recorded(monkeypatch, name: str) -> list:
    calls = []
    method = getattr(Slots, name)

    def record(self, *arguments):
        calls.append(arguments)
        return method(self, *arguments)

    monkeypatch.setattr(Slots, name, record)
    return calls


def test_samples_share_a_prefill(tiny, monkeypatch):
    engine = Engine(tiny, KV, slots=4, capacity=64, window=8, prefill_tokens=PIECE)
    inserted = recorded(monkeypatch, "insert")
    settings = GenerationSettings(20, temperature=1.0, n=4, seed=5)
    ((place, completions),) = engine.generate([([1, 2, 3], settings)])
    assert place == 0
    for completion, expected in zip(completions, alone(tiny, [1, 2, 3], settings), strict=True):
        equal(completion, expected)
    ((placements,),) = inserted
    assert [len(placement.begins) for placement in placements] == [4]
    # More samples than slots get theirs as these become free.
    more = dataclasses.replace(settings, n=6)
    ((_, completions),) = engine.generate([([1, 2, 3], more)])
    for completion, expected in zip(completions, alone(tiny, [1, 2, 3], more), strict=True):
        equal(completion, expected)


def test_windows_end_when_enough_rows_are_free_and_somebody_waits(tiny, monkeypatch):
    engine = Engine(tiny, KV, slots=2, capacity=128, window=64)
    windows = recorded(monkeypatch, "decode")
    reports = []
    read = engine_slots.Window.read

    def record(self):
        reports.append(read(self))
        return reports[-1]

    monkeypatch.setattr(engine_slots.Window, "read", record)
    requests = [([1, 2], GenerationSettings(count)) for count in (9, 50, 40)]
    assert len(list(engine.generate(requests))) == 3
    # The first row's end lets the third request in; after that nobody waits.
    assert reports[0].counts.tolist() == [9, 9]
    assert reports[1].counts.tolist() == [40, 50]
    assert [enough for *_, enough in windows] == [1, 3]
    assert len(reports) == len(windows)


def test_prompts_of_like_length_are_prefilled_together(tiny, monkeypatch):
    engine = Engine(tiny, KV, slots=8, capacity=96, window=8, prefill_tokens=64)
    inserted = recorded(monkeypatch, "insert")
    prompts = [[1] * length for length in (3, 40, 5, 50, 7)]
    list(engine.generate([(prompt, GenerationSettings(4)) for prompt in prompts]))
    lengths = [[len(placement.tokens) for placement in placements] for (placements,) in inserted]
    assert lengths == [[3, 5], [7], [40], [50]]  # two of up to 32 tokens are 64, and one of more


def test_long_prompts_do_not_hold_up_others(tiny):
    """Pieces alternate with windows, so that rows which decode go on."""
    engine = Engine(tiny, KV, slots=2, capacity=200, window=16, prefill_tokens=16)
    first = engine.submit([1, 2, 3], GenerationSettings(60))
    engine.step()
    long = engine.submit([7] * 130, GenerationSettings(5))
    counts = []
    while engine.running or engine.waiting:
        for output in engine.step():
            counts.append((output.request, len(output.completions[0].tokens)))
    requests = [request for request, _ in counts]
    assert requests[: requests.index(long)] == [first] * 10  # the first window, and one after each piece
    pace = np.diff([count for request, count in counts if request == first])
    assert pace.tolist()[:8] == [2] * 8
    assert max(counts)[1] == 5


def test_long_prompts_that_come_first_do_not_hold_up_others_either(tiny):
    engine = Engine(tiny, KV, slots=3, capacity=200, window=16, prefill_tokens=16)
    long = engine.submit([7] * 130, GenerationSettings(5))
    short = engine.submit([1, 2, 3], GenerationSettings(5))
    finished = []
    while engine.running or engine.waiting:
        finished += [output.request for output in engine.step() if output.finished]
    assert finished == [short, long]


def test_rows_that_end_with_their_first_token_are_filled_again(tiny):
    """Though none of them ends in a window; the one that goes on gets a step from each."""
    engine = Engine(tiny, KV, slots=4, capacity=128, window=64)
    whole = alone(tiny, [5], GenerationSettings(100))[0]
    requests = [([5], GenerationSettings(100)), *[([i], GenerationSettings(1)) for i in range(60)]]
    found = dict(engine.generate(requests))
    equal(found[0], whole)
    assert all(len(found[place].tokens) == 1 for place in range(1, 61))
    assert engine.stats.steps == 99
    assert engine.stats.windows > 20  # three of the sixty in each


def test_a_step_that_fails_leaves_no_engine(tiny, monkeypatch):
    """What its slots hold is unknown, and must not become another request's."""
    engine = Engine(tiny, KV, slots=2, capacity=64, window=8)
    first = engine.submit([1, 2], GenerationSettings(30))
    engine.step()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_slots.Window, "read", lambda window: interrupted(0))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.step()[0].request == first  # waiting for a window may be interrupted
    engine.submit([3], GenerationSettings(30))
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "insert", lambda slots, placements: interrupted(0))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    for call in (engine.step, lambda: engine.submit([1])):
        with pytest.raises(
            RuntimeError, match=r"a step of this engine failed \(KeyboardInterrupt: .* make another"
        ):
            call()


def test_requests_are_several(tiny):
    engine = Engine(tiny, KV, slots=1, capacity=64)
    with pytest.raises(ValueError, match="requests must be several prompts, got a single one"):
        engine.generate("a text")


def test_stop_strings_end_rows_and_texts_are_read(lettered):
    prompts = ["w1 w2", "w3", "w4 w4"]
    whole = kivi_jax.generate(lettered, prompts, KV, max_new_tokens=40)
    stop = "".join(f" w{token}" for token in whole[0].tokens[3:6])
    expected = [kivi_jax.generate(lettered, prompt, KV, max_new_tokens=40, stop=stop) for prompt in prompts]
    assert expected[0].finish_reason == "stop"
    engine = Engine(lettered, KV, slots=2, capacity=64, window=4)
    found = dict(engine.generate(prompts, GenerationSettings(40, stop=stop)))
    assert [found[place] for place in range(3)] == expected


def test_end_tokens_beyond_those_of_the_device(tiny, monkeypatch):
    """A checkpoint's and a request's: whatever their number, each ends its row."""
    tokens = kivi_jax.generate(tiny, [[1, 2]], KV, max_new_tokens=30)[0].tokens
    others = [token for token in range(100) if token not in tokens]
    params = dataclasses.replace(tiny, end_tokens=(*others[:12], tokens[6]))
    expected = kivi_jax.generate(params, [[1, 2]], KV, max_new_tokens=30)[0]
    assert expected.finish_reason == "stop"
    engine = Engine(params, KV, slots=2, capacity=64, window=8)
    monkeypatch.setattr(
        engine, "_programs", Programs(params, dataclasses.replace(engine._programs.shape, ends=4))
    )
    engine._device = Slots(engine._programs)
    ignoring = GenerationSettings(30, ignore_eos=True)
    found = dict(engine.generate([([1, 2], GenerationSettings(30)), ([1, 2], ignoring)]))
    assert found[0] == expected
    assert found[1].tokens == tokens


def test_overflow_is_an_error_of_its_request_alone(tiny):
    expected = kivi_jax.generate(tiny, [[1, 2, 3]], KV, max_new_tokens=8)[0]
    bad = next(token for token in range(1, 100) if token not in {1, 2, 3, *expected.tokens})
    weights = jax.tree.map(lambda x: x, tiny.weights)
    weights["embed"]["embedding"] = weights["embed"]["embedding"].at[bad].set(np.inf)
    engine = Engine(dataclasses.replace(tiny, weights=weights), KV, slots=2, capacity=64)
    found = dict(engine.generate([[7, bad], [1, 2, 3]], GenerationSettings(8)))
    assert (found[0].tokens, found[0].finish_reason) == ([], "error")
    assert found[1] == expected


def test_requests_are_read_as_slots_become_free(tiny):
    engine = Engine(tiny, KV, slots=2, capacity=64, window=4)
    taken = []

    def endless() -> Iterator[list[int]]:
        while True:
            taken.append(len(taken))
            yield [1, 2, len(taken) % 100]

    results = engine.generate(endless(), GenerationSettings(6))
    for _ in range(5):
        next(results)
    assert len(taken) < 20
    results.close()
    engine.step()
    assert (engine.waiting, engine.running) == (0, 0)
    # Requests that somebody cancels are not waited for.
    results = engine.generate([([1], GenerationSettings(3)), ([2], GenerationSettings(40))])
    assert next(results)[0] == 0
    assert engine.cancel(engine._submitted - 1)
    assert list(results) == []


def test_what_can_never_fit_is_refused_at_once(tiny):
    engine = Engine(tiny, KV, slots=2, capacity=64)
    with pytest.raises(
        ValueError, match=r"a prompt of 60 tokens and max_new_tokens 5 exceed .* capacity of 64"
    ):
        engine.submit([1] * 60, max_new_tokens=5)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.submit([1000])
    with pytest.raises(TypeError, match="no option 'tempratur'"):
        engine.submit([1], tempratur=1)
    assert (engine.waiting, engine.running) == (0, 0)
    found = dict(engine.generate([[1], [1] * 60, [2]], GenerationSettings(5)))
    assert found[1].finish_reason == "error"
    assert "capacity of 64" in found[1].error
    assert len(found[0].tokens) == len(found[2].tokens) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots must be"),
        ({"capacity": 4096}, "capacity 4096 exceeds the model's 2048 positions"),
        ({"window": 0}, "window must be"),
        ({"prefill_tokens": -1}, "prefill_tokens must be"),
        ({"kv": "kivi3"}, "kivi3"),
    ],
)
def test_bad_sizes_are_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny, **{"slots": 1, "capacity": 64} | arguments)
