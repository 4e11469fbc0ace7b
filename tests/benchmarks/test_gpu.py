"""The GPU benchmark in tiny shapes on a CPU, and the figures that it derives."""

import functools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import benchmark as gpu_benchmark
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.attention import Case, attended_bytes, cache_shapes, chain, contestants, random_like
from benchmarks.gpu.correctness import GRIDS
from benchmarks.gpu.plan import KINDS, SMOKE
from benchmarks.gpu.results import Results
from benchmarks.gpu.worker import WorkerError, work
from kivi_jax.kv import kv_bytes
from kivi_jax.kv.dense import DenseLayer
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels.decode_attention.gpu import decode_attention
from kivi_jax.pallas_kernels.heads import Heads
from tools.oracle.numpy_kivi import softmax_attention

TINY = Case((4, 2, 64), 2, 300)


def sizes(plan):
    """Rows and tokens of attention, of all stages."""
    return [size for stage in plan.stages for _, listed in stage.attention for size in listed]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results of `--smoke`, and the command to run it again."""
    out = tmp_path_factory.mktemp("benchmarks")
    run = functools.partial(
        main,
        parts=",".join(gpu_benchmark.PARTS),
        out=out,
        minutes=10,
        again=False,
        skip="",
        threads=2,
        commit="0123456789abcdef",
        only_render=False,
        smoke=True,
    )
    run()
    return Results.read(out / "smoke-cpu.json"), run


@pytest.mark.interpreted
def test_smoke_measures_every_part(smoke):
    results, _ = smoke
    plan = SMOKE
    assert results.device == "cpu"
    (run,) = results.runs
    assert run["packages"]["jax"] == jax.__version__
    assert run["commit"] == "0123456789abcdef"
    assert {record["run"] for record in results.records} == {0}

    cases = results.of("correctness")
    assert len(cases) == 4
    assert all(record["passed"] and 0 < record["worst"] < 1e-5 for record in cases)
    (copy,) = results.of("copy")
    assert copy["bytes_per_second"] > 0
    for batch, tokens in sizes(plan):
        timed = {
            record["contestant"] for record in results.succeeded("attention", batch=batch, tokens=tokens)
        }
        packed = {f"{kind} {name}" for kind in KINDS for name in ("kernel", "xla")}
        assert {"bf16 layer", "bf16 xla", *packed} <= timed
        failed = {
            record["contestant"] for record in results.of("attention", batch=batch, tokens=tokens)
        } - timed
        assert {"bf16 cudnn", "bf16 cudnn lengths", "bf16 cudnn folded"} <= failed  # there is none on CPUs

    chunks = {record["contestant"]: record["milliseconds"] for record in results.succeeded("chunks")}
    assert set(chunks) == {f"{kind} {by}" for kind in KINDS for by in ("kernel", "xla")}
    assert all(milliseconds > 0 for milliseconds in chunks.values())

    generated = {(record["kv"], record["role"]): record for record in results.succeeded("throughput")}
    plus = "kivi2-plus R=64"
    assert set(generated) == {("bf16", "largest"), (plus, "largest"), (plus, "common")}
    assert generated[plus, "common"]["batch"] == generated["bf16", "largest"]["batch"]
    for (_, role), record in generated.items():
        assert record["tokens_per_second"] > 0
        assert role == "common" or record["compiled_bytes"] <= record["limit"]
        seconds = record["prefill_seconds"] + record["decode_seconds"]
        assert record["tokens_per_second"] == pytest.approx(24 * record["batch"] / seconds)


@pytest.mark.interpreted
def test_smoke_writes_a_page(smoke):
    results, _ = smoke
    page = results.path.with_suffix(".md").read_text()
    assert re.search(r"^\| 0 \| .* \| 0123456789ab \| ", page, re.MULTILINE)
    assert "4 of 4 cases are within 1e-5" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| 4/2 × 64 | ")]
    times = {(row[1], row[2]): row for row in rows if len(row) == 6 + 4 * len(KINDS)}
    assert set(times) == {(str(batch), str(tokens)) for batch, tokens in sizes(SMOKE)}
    for (batch, tokens), row in times.items():
        case = gpu_tables.attention_times(results)[(4, 2, 64), int(batch), int(tokens)]
        best = min(
            record["milliseconds"]
            for name, record in case.items()
            if name.startswith("bf16") and "error" not in record
        )
        assert float(row[9]) == pytest.approx(best / case[f"{KINDS[0]} kernel"]["milliseconds"], abs=0.005)
    generated = [line for line in page.splitlines() if line.startswith("| 40 + 24 | ")]
    assert [line.split(" | ")[1:3] for line in generated] == [
        ["bf16", "largest"],
        ["kivi2-plus R=64", "largest"],
        ["kivi2-plus R=64", "common"],
    ]


@pytest.mark.interpreted
def test_what_was_measured_is_not_measured_again(smoke):
    results, run = smoke
    run()
    resumed = Results.read(results.path)
    assert [record for record in resumed.records if "error" not in record] == [
        record for record in results.records if "error" not in record
    ]
    assert len(resumed.runs) == 2


@pytest.mark.interpreted
def test_no_time_measures_nothing(smoke, tmp_path, capsys):
    _, run = smoke
    run(out=tmp_path, minutes=0.4)
    assert json.loads((tmp_path / "smoke-cpu.json").read_text())["records"] == []
    printed = capsys.readouterr().out
    for part in (
        "correctness",
        "copy",
        "attention (4, 2, 64)",
        "chunks (4, 2, 64), 40 over 256",
        "40 + 24 tokens, bf16, largest batch",
    ):
        assert f"{part}: left out, no time" in printed


@pytest.mark.parametrize(("room", "tried"), [(100, [100]), (95, [100, 96, 92]), (10, [100, 96, 92, 88])])
def test_fewer_rows_are_tried_when_memory_runs_out(tmp_path, monkeypatch, room, tried):
    batches = []

    def work(script, job, seconds, environment):
        batches.append(job["batch"] or 100)
        ran_out = {"out_of_memory": True, "error": "RESOURCE_EXHAUSTED"} if batches[-1] > room else {}
        yield {"batch": batches[-1], **ran_out}

    monkeypatch.setattr(gpu_benchmark, "work", work)
    results = Results(tmp_path / "results.json", "GPU", [{}], [])
    benchmark = gpu_benchmark.Benchmark(SMOKE, results, False, 1, [], time.monotonic() + 60, str(tmp_path))
    benchmark.generation((40, 24), "kivi2 R=32", "largest", batch=None)
    assert batches == tried
    (record,) = results.records
    assert ("error" in record) == (room < tried[-1])
    assert record["too_many"] == tried[:-1]


@pytest.mark.parametrize("name", ["bf16 xla folded", "kivi2 xla"])
def test_an_attention_waits_for_the_one_before(name):
    """A chain computes what calls in turn do, and its program has the products of every one of them."""
    (contestant,) = (contestant for contestant in contestants(TINY, "xla") if contestant.name == name)
    caches = [random_like(cache_shapes(TINY, contestant.storage), seed) for seed in range(2)]
    start = jax.random.normal(jax.random.key(9), (TINY.batch, 4, 64), jnp.bfloat16)
    lengths = jnp.full(TINY.batch, TINY.tokens - 1, jnp.int32)
    program = jax.jit(functools.partial(chain, contestant.attend, 2)).lower(start, start, lengths, caches)
    out = expected = start
    for _ in range(2):
        for cache in caches:
            expected = contestant.attend(start + expected * 2**-10, lengths, cache)
    out = program.compile()(start, start, lengths, caches)
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=0.02)
    once = jax.jit(contestant.attend).lower(start, lengths, caches[0]).compile().as_text()
    chained = program.compile().as_text()
    assert chained.count(" dot(") == 2 * once.count(" dot(") > 0


def test_unquantized_contestants_agree():
    """And the library's own layer, whose new token is the last of the others' tokens."""
    k, v = random_like(cache_shapes(TINY, gpu_attention.BHTD), seed=3)
    caches = {
        gpu_attention.BTHD: (k.swapaxes(1, 2), v.swapaxes(1, 2)),
        gpu_attention.BHTD: (k, v),
        "bf16": (k[:, :, -1], v[:, :, -1], DenseLayer(k, v)),
    }
    q = jax.random.normal(jax.random.key(9), (TINY.batch, 4, 64), jnp.bfloat16)
    lengths = jnp.full(TINY.batch, TINY.tokens - 1, jnp.int32)
    rows = zip(*(np.float32(x) for x in (q[:, :, None], k, v)), strict=True)
    expected = np.stack([softmax_attention(*row)[:, 0] for row in rows])
    names = []
    for contestant in contestants(TINY, "xla"):
        if contestant.storage in caches and "cudnn" not in contestant.name:
            out = contestant.attend(q, lengths, caches[contestant.storage])
            np.testing.assert_allclose(np.float32(out), expected, atol=0.01, err_msg=contestant.name)
            names.append(contestant.name)
    assert names == ["bf16 xla", "bf16 xla lengths", "bf16 xla folded", "bf16 layer"]


@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
@pytest.mark.parametrize("folded", [False, True])
def test_pytorch_attends_the_same(order, folded):
    torch = pytest.importorskip("torch")
    from benchmarks.gpu import pytorch as gpu_torch

    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 4, 64), np.float32)
    k, v = generator.standard_normal((2, 2, 2, 300, 64), np.float32)
    cache = [torch.from_numpy(x) for x in (k, v)]
    if order == "BTHD":
        cache = [x.swapaxes(1, 2).contiguous().swapaxes(1, 2) for x in cache]
    out = gpu_torch.attend(torch.from_numpy(q), tuple(cache), torch.nn.attention.SDPBackend.MATH, folded)
    expected = np.stack([softmax_attention(*row)[:, 0] for row in zip(q[:, :, None], k, v, strict=True)])
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attended_bytes_are_those_of_packed_tokens_before_the_ring(kind):
    """2.75, 3 and 5 bits a value."""
    case = Case((32, 8, 128), 16, 4096)
    bits = {"kivi2-plus": 2.75, "kivi2": 3, "kivi4": 5}[kind]
    assert attended_bytes(case, kind) == (4096 - 1 - 128) * 16 * 8 * 128 * 2 * bits / 8
    layer = cache_shapes(case, kind)[-1]
    exact = (layer.window_k, layer.window_v, layer.sink_k, layer.sink_v, layer.channels, layer.query_energy)
    packed = kv_bytes(layer) - sum(x.size * x.dtype.itemsize for x in exact if x is not None)
    assert attended_bytes(case, kind) == pytest.approx(packed * (4096 - 129) / 4096)


def test_unquantized_bytes_are_all_keys_and_values():
    for storage in (gpu_attention.BTHD, gpu_attention.BHTD, "bf16"):
        assert attended_bytes(TINY, storage) == 2 * 2 * 2 * 300 * 2 * 64


def results_of(tmp_path, **milliseconds):
    """Attention of 512, 1024 and 2048 tokens by each contestant, None where it failed."""
    results = Results(tmp_path / "results.json", "GPU", [{}], [])
    for name, times in milliseconds.items():
        for tokens, taken in zip((512, 1024, 2048), times, strict=True):
            record = {"part": "attention", "shape": [4, 2, 64], "batch": 1, "tokens": tokens}
            outcome = {"error": "failed"} if taken is None else {"milliseconds": taken}
            results.add(record | {"contestant": name.replace("_", " ")} | outcome)
    return results


@pytest.mark.parametrize(
    ("kernel", "xla", "least"),
    [
        ((2, 2, 2), (1, 3, 4), 1024),
        ((2, 2, 2), (3, 1, 4), 2048),
        ((2, 2, 2), (3, 3, 1), None),
        ((2, 2, 2), (3, 3, 3), 512),
        ((2, None, 2), (3, 3, 3), 512),
    ],
)
def test_the_kernel_wins_from_where_it_is_never_slower(tmp_path, kernel, xla, least):
    results = results_of(tmp_path, kivi2_kernel=kernel, kivi2_xla=xla)
    found = gpu_tables.wins_from(results, "kivi2", lambda case: case.get("kivi2 xla"))
    assert found == {((4, 2, 64), 1): least}
    assert (
        gpu_tables.wins_from(results, "kivi2", lambda case: case.get("bf16 xla")) == {}
    )  # which is not there


def test_the_best_bf16_is_of_any_library(tmp_path):
    results = results_of(tmp_path, bf16_xla=(3, 3, 3), bf16_torch_flash=(2, 4, None), kivi2_kernel=(1, 1, 1))
    best = [gpu_tables.best_bf16(case)["contestant"] for case in gpu_tables.attention_times(results).values()]
    assert best == ["bf16 torch flash", "bf16 xla", "bf16 xla"]


def test_a_failure_replaces_no_result(tmp_path):
    results = results_of(tmp_path, kivi2_kernel=(1, 1, None))
    record = {"part": "attention", "shape": [4, 2, 64], "batch": 1, "contestant": "kivi2 kernel"}
    results.add(record | {"tokens": 512, "error": "failed"})
    results.add(record | {"tokens": 1024, "milliseconds": 5})
    results.add(record | {"tokens": 2048, "milliseconds": 6})
    times = {record["tokens"]: record["milliseconds"] for record in Results.read(results.path).records}
    assert times == {512: 1, 1024: 5, 2048: 6}


@pytest.mark.parametrize("case", [*GRIDS["first"](), *GRIDS["whole"]()], ids=lambda case: case.name)
def test_rows_of_correctness_are_divided_unless_they_are_there_many_times(case):
    query_heads, heads, head_dim = case.shape
    rows = case.times * len(case.lengths)
    shape = (1, rows, heads, case.capacity, head_dim, case.kv, case.dtype, [case.sliding_window])
    (layer,) = jax.eval_shape(lambda: empty_state(*shape)).layers
    q, k = (jax.ShapeDtypeStruct((rows, 1, n, head_dim), case.dtype) for n in (query_heads, heads))
    attend = functools.partial(decode_attention, heads=Heads(case.slopes), interpret=True)
    traced = jax.make_jaxpr(attend)(q, k, k, layer, jax.ShapeDtypeStruct((rows,), jnp.int32))
    assert ("kivi_merge" in str(traced)) == (case.times == 1)


def test_workers_that_fail_or_last_too_long():
    with pytest.raises(WorkerError, match=r"ended with 1: .*unexpected keyword argument 'unknown'"):
        list(work("device", {"unknown": 1}, 60))
    with pytest.raises(WorkerError, match="took more than 0 s"):
        list(work("device", {"copy_bytes": None}, 0.1))
