"""Jobs from their options to their end, without a model's work."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from etils import epath

from kivi_jax.batch.fingerprint import write_run
from kivi_jax.batch.job import Job, Outcome, run_job
from kivi_jax.batch.output import is_folder, run_file
from kivi_jax.checkpoints.load import DEMO_FOLDER
from tests.batch.bucket import Bucket
from tests.batch.fake_engine import FakeEngine

LINES = [
    {"id": "a", "prompt": "import os"},
    {"prompt": "x" * 200, "max_new_tokens": 5},
    {"id": 3, "prompt": [1, 2], "temperature": 1, "n": 2},
    {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "y", "max_tokens": 4}},
    {"custom_id": "e", "prompt": "z", "logprobs": True},
]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", LINES)


@pytest.fixture(params=["out.jsonl", "out/", "gs://bucket/some/out"])
def out(request, tmp_path):
    """A file, a folder of parts, and one in a bucket."""
    if "://" in request.param:
        request.getfixturevalue("bucket")
        return request.param
    return f"{tmp_path}/{request.param}"


@pytest.fixture(autouse=True)
def _no_engines(monkeypatch):
    monkeypatch.setattr(FakeEngine, "made", [])


def write(path, lines):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return str(path)


def run(source, out, **options):
    return run_job(Job(source, out, **{"window": 2} | options), FakeEngine)


def read(out):
    """Results by id; each once, whatever there is of parts."""
    path = epath.Path(out)
    files = sorted(path.glob("part-*.jsonl")) if is_folder(out) else [path]
    lines = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    results = {str(line.get("custom_id", line["id"])): line for line in lines}
    assert len(results) == len(lines)
    for line in lines:
        (line.get("response") or {}).get("body", {}).pop("created", None)
    return results


def test_every_line_has_a_result(source, out):
    assert run(source, out) == Outcome(5, 5, 0, 0)
    results = read(out)
    assert sorted(results) == ["3", "a", "d", "e", "line-2"]
    assert results["3"]["id"] == 3
    assert len(results["3"]["completions"]) == 2
    assert results["d"]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert len(results["e"]["logprobs"]) == 128
    (engine,) = FakeEngine.made
    assert engine.params.model_type == "llama"
    assert engine.options == {"window": 2, "prefill_tokens": 4096, "chat_template": None}
    assert engine.most_slots == 6  # of two samples and four more


def test_shards_that_share_a_folder_are_of_one_kind_before_any_has_a_part(source, tmp_path):
    out = f"{tmp_path}/out/"
    os.mkdir(out)
    write_run(run_file(out), {"kv": "bf16"}, 64)
    with pytest.raises(ValueError, match="was begun with kv 'bf16', and this run has 'kivi2'"):
        run(source, out, shard=(1, 2))


def test_options_reach_the_engine(source, out):
    run(source, out, kv="kivi4", slots=3, prefill_tokens=256, chat_template="x", dtype="float32")
    (engine,) = FakeEngine.made
    assert (engine.kv, engine.slots, engine.params.dtype.name) == ("kivi4", 3, "float32")
    assert engine.options == {"window": 2, "prefill_tokens": 256, "chat_template": "x"}


def test_capacity_is_the_longest_requests(tmp_path, out):
    source = write(
        tmp_path / "in.jsonl", [{"prompt": [1] * size, "max_new_tokens": 9} for size in (5, 50, 7)]
    )
    run(source, out)
    run(source, out, capacity=70, overwrite=True)
    assert [engine.capacity for engine in FakeEngine.made] == [59, 70]


def test_capacity_stays_when_a_job_goes_on(tmp_path, out):
    """In 16 bits another one may round in another way."""
    sizes = [{"prompt": [1] * size, "max_new_tokens": 9} for size in (50, 5, 2000)]
    run(write(tmp_path / "in.jsonl", sizes[:1]), out)
    run(write(tmp_path / "in.jsonl", sizes[:2]), out)
    run(write(tmp_path / "in.jsonl", sizes), out, max_positions=2020)
    run(write(tmp_path / "in.jsonl", [*sizes, sizes[1]]), out, max_positions=99)
    assert [engine.capacity for engine in FakeEngine.made] == [59, 59, 2009, 99]
    run(str(tmp_path / "in.jsonl"), out, overwrite=True, max_positions=70)
    assert FakeEngine.made[-1].capacity == 59


def test_settings_are_for_lines_without(source, out):
    run(source, out, settings={"max_new_tokens": 3, "temperature": 0.5})
    settings = {str(prompt)[:3]: settings for prompt, settings in FakeEngine.made[0].submitted}
    assert (settings["imp"].max_new_tokens, settings["imp"].temperature) == (3, 0.5)
    assert (settings["xxx"].max_new_tokens, settings["[1,"].temperature) == (5, 1)


def test_the_checkpoints_sampling_yields_to_settings(source, out, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.3, "top_k": 9}
    (folder / "generation_config.json").write_text(json.dumps(config))
    run(source, out, model=str(folder), model_sampling=True, settings={"temperature": 0.7})
    (settings,) = (settings for prompt, settings in FakeEngine.made[0].submitted if prompt == "import os")
    assert (settings.temperature, settings.top_k) == (0.7, 9)


def test_goes_on_after_a_signal(source, out, tmp_path, monkeypatch):
    """Stopped after every step, until all is done."""
    expected = read_after(source, f"{tmp_path}/whole.jsonl")
    stop = staticmethod(lambda engine: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(FakeEngine, "before_step", stop)
    outcomes = [run(source, out, window=1000, slots=1) for _ in range(5)]
    assert [outcome.done for outcome in outcomes] == [1, 2, 3, 4, 5]
    assert [outcome.before for outcome in outcomes] == [0, 1, 2, 3, 4]
    assert {outcome.signal for outcome in outcomes} == {signal.SIGTERM}
    assert read(out) == expected
    assert run(source, out) == Outcome(5, 5, 0, 5)
    assert len(FakeEngine.made) == 1 + 5


def read_after(source, out, **options):
    run(source, out, **options)
    return read(out)


def test_goes_on_after_every_torn_end(source, tmp_path):
    """A killed job leaves some beginning of its file."""
    out = f"{tmp_path}/out.jsonl"
    expected = read_after(source, out)
    whole = Path(out).read_bytes()
    for size in range(0, len(whole), 97):
        Path(out).write_bytes(whole[:size])
        run(source, out)
        assert read(out) == expected


def test_lines_may_be_added(source, out, tmp_path):
    run(source, out)
    write(tmp_path / "in.jsonl", [*LINES, {"prompt": "new"}])
    assert run(source, out) == Outcome(6, 6, 0, 5)
    assert [prompt for prompt, _ in FakeEngine.made[-1].submitted] == ["new"]


def test_another_run_is_refused(source, out):
    run(source, out)
    before = read(out)
    for options, message in (
        ({"kv": "kivi4"}, "begun with kv 'kivi2', and this run has 'kivi4'"),
        ({"prefill_tokens": 128}, "begun with prefill_tokens 4096"),
        ({"settings": {"stop": ["x"]}}, r"begun with stop \[\], and this run has \['x'\]"),
        ({"dtype": "float32"}, "begun with dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, out, **options)
    assert read(out) == before
    run(source, out, settings={"stop": ["x"]}, overwrite=True)
    run(source, out, settings={"stop": ["x"]}, slots=1, window=9)  # on which results don't depend
    assert read(out).keys() == before.keys()


def test_another_input_is_refused(source, out, tmp_path):
    run(source, out)
    with pytest.raises(ValueError, match=r"begun with input 'in\.jsonl', and this run has 'other\.jsonl'"):
        run(write(tmp_path / "other.jsonl", LINES), out)


def test_what_no_job_wrote_is_left_alone(source, tmp_path):
    other = write(tmp_path / "notes", [b"mine"])
    with pytest.raises(ValueError, match="something in it that no batch job wrote"):
        run(source, other)
    with pytest.raises(ValueError, match="can't be written to the file of the requests"):
        run(source, source, overwrite=True)
    assert Path(other).read_bytes() == b"mine\n"


BAD = [{"id": "a", "prompt": "x"}, b"{", {"id": "a", "prompt": "y"}, {"id": "f", "prompt": "x", "speed": 2}]


def test_bad_lines_are_error_lines(tmp_path, out):
    outcome = run(write(tmp_path / "in.jsonl", BAD), out)
    assert (outcome.lines, outcome.done, outcome.failed) == (4, 4, 3)
    assert outcome.bad.startswith("line 2: not a line of JSON: Expecting")
    assert (
        "; line 3: id 'a' of line 3 is that of line 1 already; line 4: unknown field 'speed'" in outcome.bad
    )
    results = read(out)
    assert {name: (line.get("error") or {}).get("code") for name, line in results.items()} == {
        "a": None,
        "line-2": "invalid_json",
        "line-3": "duplicate_id",
        "f": "invalid_request",
    }
    again = run(str(tmp_path / "in.jsonl"), out)
    assert (again.done, again.failed, again.before, again.bad) == (4, 3, 4, "")


def test_errors_are_done_again(tmp_path, out):
    run(write(tmp_path / "in.jsonl", BAD), out)
    mended = [BAD[0], {"prompt": "m"}, BAD[2], {"id": "f", "prompt": "x"}]
    outcome = run(write(tmp_path / "in.jsonl", mended), out, retry_errors=True)
    assert (outcome.done, outcome.failed, outcome.before) == (4, 1, 1)
    assert {name for name, line in read(out).items() if line.get("error")} == {"line-3"}


def test_strict(tmp_path, out):
    source = write(tmp_path / "in.jsonl", BAD)
    message = "3 of 4 lines are bad, and with --strict none is run: line 2: .*; line 3: .*; line 4: "
    with pytest.raises(ValueError, match=message):
        run(source, out, strict=True)
    assert not FakeEngine.made
    assert read(out) == {}
    run(write(tmp_path / "in.jsonl", LINES), out, strict=True)
    before = read(out)
    write(tmp_path / "in.jsonl", BAD)
    with pytest.raises(ValueError, match="lines are bad"):
        run(source, out, strict=True, overwrite=True)
    assert read(out) == before


@pytest.mark.parametrize("data", [b"", b"\n  \n"])
def test_empty_input(tmp_path, out, data):
    (tmp_path / "in.jsonl").write_bytes(data)
    assert run(str(tmp_path / "in.jsonl"), out) == Outcome(0, 0, 0, 0)
    assert read(out) == {}
    assert "gs:" in out or os.path.exists(out)


def test_blank_lines_are_counted_and_left_out(tmp_path, out):
    run(write(tmp_path / "in.jsonl", [b"", {"prompt": "x"}, b" "]), out)
    assert list(read(out)) == ["line-2"]


def test_requests_in_a_bucket(source, bucket):
    name = "gs://bucket/in.jsonl"
    epath.Path(name).write_bytes(Path(source).read_bytes())
    assert run(name, "gs://bucket/out") == Outcome(5, 5, 0, 0)
    assert sorted(bucket) == [
        "/bucket/in.jsonl",
        "/bucket/out/part-00000-000000.jsonl",
        "/bucket/out/run.json",
    ]
    assert run(name, "gs://bucket/out/") == Outcome(5, 5, 0, 5)


def test_shards_of_a_folder(source, tmp_path):
    out = f"{tmp_path}/out/"
    expected = read_after(source, f"{tmp_path}/whole.jsonl")
    outcomes = [run(source, out, shard=(index, 2)) for index in range(2)]
    assert [outcome.lines for outcome in outcomes] == [3, 2]
    assert read(out) == expected
    assert run(source, out) == Outcome(5, 5, 0, 5)
    with pytest.raises(ValueError, match=r"shards share .*, so none may overwrite it"):
        run(source, out, shard=(0, 2), overwrite=True)


def test_shards_of_files(source, tmp_path):
    expected = read_after(source, f"{tmp_path}/whole.jsonl")
    results = [read_after(source, f"{tmp_path}/{index}.jsonl", shard=(index, 2)) for index in range(2)]
    assert results[0] | results[1] == expected
    assert not results[0].keys() & results[1].keys()


def test_full_disk(source, out, tmp_path, monkeypatch):
    """One line says so, all that was written is whole, and the same job goes on."""
    expected = read_after(source, f"{tmp_path}/whole.jsonl")
    room, append = [2], os.write

    def fill(file, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= 1
        return append(file, data)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fill)
        if is_folder(out):
            run(write(tmp_path / "in.jsonl", LINES[:2]), out)
            write(tmp_path / "in.jsonl", LINES)
            patched.setattr(os, "fsync", full)
            patched.setattr(Bucket, "open", full)
        with pytest.raises(OSError, match=r"can't be (written|read): No space left on device"):
            run(source, out)
    assert len(read(out)) == 2
    outcome = run(source, out)
    assert (outcome.done, outcome.before) == (5, 2)
    assert read(out) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "kivi9"}, "kv must be one of"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"settings": {"top_p": 2}}, "top_p must be in"),
        ({"model": "/no/such/folder"}, "no folder '/no/such/folder'"),
        ({"max_positions": 0}, "max_positions must be at least 1"),
        ({"source": "/no/such/file"}, "/no/such/file can't be read: there is no such file"),
        ({"source": "/"}, "/ can't be read: it is no file"),
        (
            {"source": "gs://bucket/in.jsonl"},
            "gs://bucket/in.jsonl can't be read: .*pip install 'kivi-jax.gcs.'",
        ),
        ({"out": "gs://bucket/out"}, "gs://bucket/out can't be written: .*pip install 'kivi-jax.gcs.'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(source, tmp_path, options, message):
    job = Job(**{"source": source, "out": f"{tmp_path}/out.jsonl"} | options)
    if "gs:" in str(options) and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises((ValueError, OSError), match=message):
        run_job(job, FakeEngine)
    assert not FakeEngine.made
    assert not os.path.exists(f"{tmp_path}/out.jsonl") or not os.path.getsize(f"{tmp_path}/out.jsonl")


def test_input_that_changes_on_the_way(source, out, tmp_path, monkeypatch):
    def make(*arguments, **options):
        write(tmp_path / "in.jsonl", [b"{"] * 5)
        return FakeEngine(*arguments, **options)

    with pytest.raises(ValueError, match=r"in\.jsonl was changed while it was read: line 1 is bad now"):
        run_job(Job(source, out), make)
