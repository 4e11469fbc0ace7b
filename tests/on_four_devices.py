"""A mesh against one device. `test_partition.py` runs this file in a process that has four CPU devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import kivi_jax
from benchmarks import mesh as mesh_report
from benchmarks.mesh import collectives, compile_decode_loop
from kivi_jax import KVConfig
from kivi_jax.checkpoints.weights import abstract_weights, flatten_paths, nest_paths
from kivi_jax.evaluation.needle import answer_each
from kivi_jax.kv import kv_bytes
from kivi_jax.model import Params
from kivi_jax.models.falcon import FalconConfig
from kivi_jax.models.gemma import Gemma3Config
from kivi_jax.models.llama import LlamaConfig
from kivi_jax.models.registry import abstract_model
from kivi_jax.partition import make_partition
from kivi_jax.steps import decode_step
from tests.further import further
from tools.gguf_variants import write_variant
from tools.offline.abstract_models import abstract_decoding, abstract_params

MODEL = Mesh(jax.devices(), ("model",))
BOTH = Mesh(np.reshape(jax.devices(), (2, 2)), ("data", "model"))
DATA = Mesh(np.reshape(jax.devices(), (4, 1)), ("data", "model"))
WINDOW = KVConfig(2, 2, 32, 32)
PLUS = KVConfig(2, 2, 32, 32, sink_tokens=4, boosted_channels=0.25, rotated_values=True)


SIZES = {"vocab_size": 104, "hidden_size": 64, "intermediate_size": 96, "num_layers": 1, "max_positions": 512}


def llama(heads: int, kv_heads: int, **changes) -> tuple[str, LlamaConfig]:
    sizes = SIZES | {"head_dim": 64} | changes
    return "llama", LlamaConfig(**sizes, num_heads=heads, num_kv_heads=kv_heads)


def gemma3(heads: int, kv_heads: int) -> tuple[str, Gemma3Config]:
    sizes = SIZES | {"head_dim": 256, "sliding_windows": (40,)}
    return "gemma3_text", Gemma3Config(**sizes, num_heads=heads, num_kv_heads=kv_heads)


def falcon(heads: int, kv_heads: int, **changes) -> tuple[str, FalconConfig]:
    return "falcon", FalconConfig(
        vocab_size=104,
        hidden_size=64 * heads,
        intermediate_size=96,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        max_positions=512,
        **changes,
    )


def name(value) -> str:
    if isinstance(value, Mesh):
        return "x".join(map(str, value.devices.shape))
    return (
        f"{value[0]}-{value[1].num_heads}-{value[1].num_kv_heads}" if isinstance(value, tuple) else str(value)
    )


def random_params(family, dtype="float32", mesh=None) -> Params:
    model_type, config = family
    generator = np.random.default_rng(0)
    _, shapes = abstract_model(model_type, config, jnp.dtype(dtype))
    abstract = abstract_weights(model_type, config, jnp.dtype(dtype), mesh)
    weights = {
        path: jax.device_put(
            (generator.standard_normal(leaf.shape) * (0.2 if len(leaf.shape) > 1 else 1)).astype(leaf.dtype),
            abstract[path].sharding,
        )
        for path, leaf in flatten_paths(shapes).items()
    }
    return Params(nest_paths(weights), model_type, config, mesh=mesh)


def run(params: Params, kv, lengths) -> tuple[np.ndarray, kivi_jax.KVState]:
    """Logits of a prefill, a chunk and steps through a flush, of ragged rows; and the state in the end."""
    generator = np.random.default_rng(1)
    batch = len(lengths)
    tokens = generator.integers(0, 104, (batch, 75), np.int32)
    counts = generator.integers(0, 12, batch, np.int32)
    state = kivi_jax.init_state(params, batch, 128, kv)
    logits, state = kivi_jax.prefill(params, tokens[:, :60], np.asarray(lengths, np.int32), state)
    all_logits = [logits]
    _, state = kivi_jax.extend(params, tokens[:, 60:72], counts, state)
    for step in range(3):
        active = np.arange(batch) != step
        logits, state = decode_step(params, tokens[:, 72 + step], state, active)
        all_logits.append(np.where(active[:, None], logits, 0))
    return np.stack(all_logits), state


@pytest.mark.parametrize(
    ("heads", "mesh", "batch", "split"),
    [
        ((32, 8), MODEL, 3, (None, "model", "model")),
        ((64, 2), MODEL, 3, (None, "model", None)),
        ((12, 6), MODEL, 3, (None, None, None)),  # three query heads of a device would read two KV heads
        ((71, 1), MODEL, 3, (None, None, None)),
        ((71, 1), BOTH, 4, ("data", None, None)),
        ((32, 8), BOTH, 3, (None, "model", "model")),
        ((32, 8), DATA, 8, ("data", "model", "model")),
    ],
)
def test_what_is_split(heads, mesh, batch, split):
    partition = make_partition(llama(*heads)[1], mesh, batch)
    assert (partition.rows, partition.query_heads, partition.kv_heads) == split


# What one device holds of the keys and values.
@pytest.mark.parametrize(
    ("family", "mesh", "batch", "part"),
    [
        further(llama(4, 4), MODEL, 2, 1 / 4),
        (llama(8, 2), MODEL, 2, 1),  # as Llama 3 on 16: a device's query heads read one KV head
        further(llama(8, 2), BOTH, 3, 1 / 2),  # three rows are no multiple of two
        further(gemma3(4, 1), MODEL, 2, 1),  # as Gemma 3 270M and 1B
        further(falcon(5, 1), MODEL, 2, 1),  # as Falcon 7B's 71 heads
        (falcon(8, 2, alibi=True, num_norms=2), MODEL, 2, 1),
    ],
    ids=name,
)
def test_equals_one_device(family, mesh, batch, part):
    check_equals_one_device(family, mesh, batch, part, WINDOW)


@pytest.mark.parametrize(
    ("family", "mesh", "batch", "part"),
    [
        (llama(8, 4), BOTH, 4, 1 / 4),
        (llama(8, 2), MODEL, 2, 1),  # devices whose query heads read the same KV head
        further(falcon(5, 1), MODEL, 2, 1),
    ],
    ids=name,
)
def test_boosted_channels_are_those_of_one_device(family, mesh, batch, part):
    check_equals_one_device(family, mesh, batch, part, PLUS)


def check_equals_one_device(family, mesh, batch, part, kv):
    """One layer, whose keys and values no sum over devices comes before, so that the codes are the same."""
    lengths = [29, 60, 1, 33][:batch]
    logits, state = run(random_params(family, mesh=mesh), kv, lengths)
    expected, alone = run(random_params(family), kv, lengths)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-5, rtol=1e-6)
    for device in mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state.layers)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held == part * sum(kv_bytes(layer) for layer in state.layers)


@pytest.mark.interpreted
@pytest.mark.parametrize(("family", "mesh"), [(llama(4, 4), BOTH), (llama(8, 2), MODEL)], ids=name)
def test_kernel_on_a_mesh(family, mesh):
    """The TPU kernel, interpreted, on the same state as XLA."""
    params = random_params(family, "bfloat16", mesh)
    tokens, token = np.arange(140, dtype=np.int32).reshape(2, 70) % 104, np.asarray([3, 5], np.int32)
    state = kivi_jax.init_state(params, 2, 128, WINDOW)
    _, state = kivi_jax.prefill(params, tokens, np.asarray([29, 70], np.int32), state)
    (expected, _), (logits, _) = (
        decode_step(dataclasses.replace(params, decode_attention=name), token, state)
        for name in ("xla", "pallas_tpu")
    )
    error = np.asarray(logits) - np.asarray(expected)
    assert np.mean(error**2) < 1e-4 * np.mean(np.square(expected))


def test_generates_the_same():
    """Two layers, exact storage: rounding differs, and turns no token of these."""
    family = llama(8, 4, num_layers=2)
    alone, split = random_params(family), random_params(family, mesh=BOTH)
    prompts = [list(range(1, 40)), [8], [3, 4, 5]]
    generate = functools.partial(kivi_jax.generate, kv="bf16", max_new_tokens=20)
    assert [out.tokens for out in generate(split, prompts)] == [
        out.tokens for out in generate(alone, prompts)
    ]
    sample = functools.partial(generate, temperature=1.0, n=2, logprobs=True, prefill_chunk=16)
    for samples, expected in zip(sample(split, prompts), sample(alone, prompts), strict=True):
        for out, other in zip(samples, expected, strict=True):
            assert out.tokens == other.tokens
            np.testing.assert_allclose(out.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [(llama(8, 2), BOTH), further(falcon(6, 1), DATA), further(falcon(6, 1), MODEL)],
    ids=name,
)
def test_scores_the_same(family, mesh):
    ids = np.random.default_rng(0).integers(0, 104, 150).tolist()
    pairs = [(ids[:first], ids[first:last]) for first, last in ((1, 150), (70, 120), (5, 64))]
    expected = kivi_jax.score(random_params(family), pairs, WINDOW)
    found = kivi_jax.score(random_params(family, mesh=mesh), pairs, WINDOW)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.exhaustive
def test_several_caches_of_one_prefill_give_the_same():
    family, mesh = llama(8, 2), BOTH
    prompts = [np.arange(length).tolist() for length in (40, 97, 70)]
    kvs = [kivi_jax.kv.PRESETS["bf16"], WINDOW]
    expected = answer_each(random_params(family), prompts, kvs)
    assert answer_each(random_params(family, mesh=mesh), prompts, kvs) == expected


@pytest.mark.parametrize("mesh", [BOTH, further(DATA), further(MODEL)], ids=name)
def test_the_engine_gives_the_same(mesh):
    """Whichever device's slots a request gets; prompts of several pieces, and samples that share one, too."""
    family = llama(8, 4, num_layers=2)
    alone, split = random_params(family), random_params(family, mesh=mesh)
    kv = kivi_jax.KVConfig(2, 2, 32, 32)
    sampled = kivi_jax.GenerationSettings(9, temperature=1.0, n=3, seed=4)
    lengths = (1, 39, 5, 70, 12, 33, 50, 3)
    requests = [
        (
            np.arange(length).tolist(),
            sampled if length in (5, 50) else kivi_jax.GenerationSettings(length % 7 + 20),
        )
        for length in lengths
    ]
    engine = kivi_jax.Engine(split, kv, slots=4, capacity=96, window=8, prefill_tokens=32)
    found = dict(engine.generate(requests))
    for place, (prompt, settings) in enumerate(requests):
        expected = kivi_jax.generate(alone, [prompt], kv, settings, prefill_chunk=32)[0]
        if settings.n is None:
            assert found[place].tokens == expected.tokens
        else:
            assert [out.tokens for out in found[place]] == [out.tokens for out in expected]


def test_slots_are_split_evenly():
    params = random_params(llama(4, 2), mesh=DATA)
    with pytest.raises(ValueError, match="6 slots can't be split evenly over 4 devices"):
        kivi_jax.Engine(params, slots=6, capacity=64)


def test_the_loop_is_compiled_once(caplog):
    params = random_params(llama(4, 2), mesh=BOTH)
    with jax.log_compiles():
        for _ in kivi_jax.stream(params, [[1, 2], [3]], temperature=1.0, n=2, max_new_tokens=40):
            pass
    compiled = [record.getMessage() for record in caplog.records]
    assert sum("Compiling jit(continue_decoding)" in message for message in compiled) == 1


@pytest.mark.compiled
@pytest.mark.parametrize("kv", ["kivi2", "bf16"])
@pytest.mark.parametrize(("mesh", "kv_heads"), [(MODEL, 4), (BOTH, 4), (MODEL, 2)], ids=name)
def test_decode_loop_exchanges_no_keys_or_values(mesh, kv_heads, kv):
    """And updates its part of the state in place, which is all of it where KV heads don't divide by the devices."""
    params = abstract_params(*llama(8, kv_heads, num_layers=2), "float32", mesh)
    decoding = abstract_decoding(params, batch=4, capacity=65536, kv=kv)
    compiled = compile_decode_loop(params, decoding)
    memory = compiled.memory_analysis()
    part = kv_bytes(decoding.state) // (4 if kv_heads == 4 else 1)
    assert part <= memory.alias_size_in_bytes < 1.1 * part
    assert memory.temp_size_in_bytes < 0.2 * part
    exchanged = collectives(compiled)
    assert exchanged  # attention and feed-forward of both layers at least
    assert all(shape.count(",") < 3 for _, shape in exchanged)


def test_report_prints_the_parts(monkeypatch, capsys):
    monkeypatch.setattr(mesh_report, "topology_mesh", lambda topology, data: BOTH)
    monkeypatch.setattr(mesh_report, "MODELS", {"tiny": llama(4, 2)[1]})
    mesh_report.main(model="tiny", batch=4, capacity=256, dtype="float32")
    lines = capsys.readouterr().out.splitlines()
    state = abstract_decoding(abstract_params(*llama(4, 2), "float32", BOTH), 4, 256, "kivi2").state
    assert f"KV state    {kv_bytes(state) / 2**20:10.1f}" in lines
    (attention,) = (line for line in lines if line.endswith("f32[2,64]"))  # two rows of two devices
    assert attention.split()[:2] == ["2", "all-reduce"]  # of attention and feed-forward


def test_a_gguf_file_is_read_in_the_parts_of_each_device(tmp_path):
    file = write_variant("llama", tmp_path / "model.gguf")
    split, whole = kivi_jax.load(file, "float32", mesh=BOTH), kivi_jax.load(file, "float32")
    jax.tree.map(np.testing.assert_array_equal, split.weights, whole.weights)
    layer = split.weights["layers"][1]
    for kernel, part in (
        (layer["attention"]["q_proj"]["kernel"], (128, 256)),
        (layer["mlp"]["down_proj"]["kernel"], (256, 128)),
    ):
        assert kernel.addressable_shards[0].data.shape == part
