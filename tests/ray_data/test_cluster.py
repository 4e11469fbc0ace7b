"""On a real Ray of this machine: what rows get, and what becomes of a job whose actors die."""

import gc
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

pytest.importorskip("ray.data")

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

import kivi_jax
from kivi_jax import GenerationSettings
from kivi_jax.ray_data import map_prompts, mapping
from tests.ray_data import probes

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent
ENGINE = {"slots": 8, "capacity": 160, "window": 8, "dtype": "float32", "batch_size": 2}
ROWS = [{"id": i, "prompt": f"def f{i}(x", "max_new_tokens": 4 + 3 * (i % 5)} for i in range(24)]


@pytest.fixture(scope="module", autouse=True)
def notes(tmp_path_factory) -> Iterator[Path]:
    """A Ray that says it has a TPU, and the folder in which probes write."""
    folder = tmp_path_factory.mktemp("notes")
    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # As in this process, whose results are compared.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.values["jax_compilation_cache_max_size"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        probes.FOLDER: str(folder),
    }
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv(probes.FOLDER, str(folder))
    ray.init(
        address="local",
        num_cpus=4,  # for tasks beside the predictor and, after a stop, the filter of rows that are written
        resources={"TPU": 1},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.disable()  # pytest would keep what Ray logs, and with it actors
    yield folder
    logging.disable(logging.NOTSET)
    ray.shutdown()
    patch.undo()


@pytest.fixture
def probe(monkeypatch):
    """Puts a probe in the place of the predictor."""

    def use(kind: type[probes.Probe]) -> type[probes.Probe]:
        monkeypatch.setattr(mapping, "KiviPredictor", kind)
        return kind

    return use


def free_actors() -> None:
    """A job that failed keeps its actors, and they the TPU, until what its exception refers to is gone."""
    gc.collect()


@pytest.fixture(autouse=True)
def _no_actors_of_other_tests():
    free_actors()


@pytest.fixture(scope="module")
def demo() -> kivi_jax.Params:
    return kivi_jax.load("demo", dtype="float32")


def write_lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def check(demo: kivi_jax.Params, row: dict, **settings: object) -> None:
    """A row has what its prompt gets alone."""
    expected = kivi_jax.generate(demo, row["prompt"], "kivi2", **settings)
    assert row["generated_text"] == expected.text, row["id"]
    assert row["finish_reason"] == expected.finish_reason
    assert row["completion_tokens"] == len(expected.tokens)
    assert row["prompt_tokens"] > 0
    assert row["error"] == ""


def test_rows_get_what_their_prompts_get_alone(demo, probe, tmp_path):
    """Each with its own settings, several batches at a time, and bad ones beside them."""
    own = {
        3: {"temperature": 0.9, "seed": 2**40},
        4: {"temperature": 0.9, "seed": 5, "top_k": 9},
        5: {"max_new_tokens": 90, "stop": ["("]},
        6: {"repetition_penalty": 1.3},
    }
    bad = {
        8: ({"prompt": ""}, "the prompt is empty; give it at least one token"),
        9: ({"prompt": "word " * 200}, "exceed the engine's capacity of 160 tokens"),
        10: ({"prompt": None}, "a row needs either a prompt or messages, and has neither"),
        11: ({"temperature": -1.0}, "temperature must be 0 (greedy) or more, got -1.0"),
        12: (
            {"prompt": None, "messages": [{"role": "user", "content": "hello"}]},
            "this checkpoint's tokenizer has no chat template",
        ),
    }
    rows = [row | own.get(row["id"], {}) | bad.get(row["id"], ({}, ""))[0] for row in ROWS]
    rows[7]["max_new_tokens"] = None  # what is asked for all
    kind = probe(probes.Probe)
    dataset = ray.data.read_json(write_lines(tmp_path / "prompts.jsonl", rows))
    results = map_prompts(dataset, "demo", tpus=1, batches_in_flight=4, max_new_tokens=9, **ENGINE)
    results.write_parquet(str(tmp_path / "results"))
    table = pq.read_table(tmp_path / "results")
    found = {row["id"]: row for row in table.to_pylist()}
    assert sorted(table.column("id").to_pylist()) == list(range(24))
    for row in rows:
        result = found[row["id"]]
        assert {name: result[name] for name in row} == row  # its columns are as they were
        if row["id"] in bad:
            assert bad[row["id"]][1] in result["error"]
            assert (result["generated_text"], result["finish_reason"]) == ("", "error")
            continue
        settings = {"max_new_tokens": row["max_new_tokens"] or 9, **own.get(row["id"], {})}
        check(demo, result, **settings)
    assert found[5]["finish_reason"] == "stop"
    # One engine had rows of several batches in its slots.
    assert {row["pid"] for row in found.values()} == {found[0]["pid"]}
    assert max(row["most"] for row in found.values()) > 2 * ENGINE["batch_size"]
    assert sorted(itertools.chain(*kind.finished())) == list(range(24))


@pytest.mark.parametrize("kind", [probes.KilledOnce, probes.DiesOnce])
def test_an_actor_that_dies_costs_its_batches_only(demo, probe, kind):
    """Killed, or because its engine failed: another one does what is not done."""
    probe(kind)
    dataset = ray.data.from_items(ROWS)
    rows = map_prompts(dataset, "demo", tpus=1, batches_in_flight=3, **ENGINE).take_all()
    assert (kind.folder() / "once").exists()
    assert sorted(row["id"] for row in rows) == list(range(24))
    for row in rows:
        check(demo, row, max_new_tokens=row["max_new_tokens"])
    actors = [row["pid"] for row in rows]
    assert len(set(actors)) == 2
    assert not set(actors) & {os.getpid()}


def test_an_engine_that_dies_of_its_first_batches_ends_the_job(probe):
    """And says of what, where another actor would die of the same."""
    probe(probes.DiesAtOnce)
    with pytest.raises(Exception, match=r"the engine died of RuntimeError: a chip was lost; start it anew"):
        map_prompts(ray.data.from_items(ROWS), "demo", tpus=1, **ENGINE).take_all()


def test_datasets_that_no_row_of_could_be_done_end_the_job():
    renamed = ray.data.from_items([{"id": 0, "text": "def f("}])
    with pytest.raises(Exception, match="rows need a column 'prompt' or 'messages', got 'id', 'text'"):
        map_prompts(renamed, "demo", tpus=1, **ENGINE).take_all()


def test_a_job_that_was_stopped_goes_on(demo, probe, notes, tmp_path):
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(notes / probes.CHECKPOINT)
    )
    try:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "prompts.parquet")

        def run() -> None:
            prompts = ray.data.read_parquet(str(tmp_path / "prompts.parquet"))
            results = map_prompts(prompts, "demo", tpus=1, batches_in_flight=2, **ENGINE)
            results.write_parquet(str(tmp_path / "results"), min_rows_per_file=4)

        stopped, resumed = probes.Stopped, probes.Resumed
        probe(stopped)
        with pytest.raises(Exception, match="this job is to be resumed"):
            run()
        written = pq.read_table(notes / probes.CHECKPOINT).column("id").to_pylist()
        assert 0 < len(written) < 24
        free_actors()
        probe(resumed)
        run()
    finally:
        context.checkpoint_config = None
    assert sorted(itertools.chain(written, *resumed.finished())) == list(range(24))  # nothing is done again
    rows = pq.read_table(tmp_path / "results").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(24))
    for row in rows:
        check(demo, row, max_new_tokens=row["max_new_tokens"])
    assert not (notes / probes.CHECKPOINT).exists()  # the job is done


def test_settings_that_are_wrong_are_found_before_anything_runs():
    dataset = ray.data.from_items(ROWS)
    for options, message in (
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"kv": "kivi3"}, "kv must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"settings": GenerationSettings(temperature=1.0, n=2)}, "a row gets one completion"),
        ({"logprobs": True}, "a row gets one completion and no log-probabilities"),
        ({"tpus": 4}, "pass mesh='4x1' to split batches, or mesh='1x4' to split the model"),
        ({"gpus": 2}, "gpus 2 without a mesh"),
        ({"tpus": 1, "gpus": 1}, "leave out one"),
        ({"mesh": "4"}, "mesh must be DATAxMODEL"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batches_in_flight": 0}, "batches_in_flight must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"concurrency": (3, 2)}, r"the fewest and the most, got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            map_prompts(dataset, "demo", **options)
    with pytest.raises(TypeError, match="there is no option 'max_tokens'"):
        map_prompts(dataset, "demo", max_tokens=3)
