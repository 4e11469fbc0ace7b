"""Which implementation decode attention takes, in programs compiled for a device that need not be there."""

import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import kivi_jax
from kivi_jax.kv.config import PRESETS
from kivi_jax.kv.state import empty_state
from kivi_jax.pallas_kernels import dispatch
from kivi_jax.pallas_kernels.chunk_attention.api import chunk_attention
from kivi_jax.pallas_kernels.decode_attention import gpu, xla
from kivi_jax.pallas_kernels.decode_attention.api import KERNELS, decode_attention
from kivi_jax.pallas_kernels.heads import Heads
from tests.tiny_checkpoint import write_checkpoint

KERNEL = "tpu_custom_call"
GPU_KERNEL = "__gpu$xla.gpu.triton"


def arguments(kv="kivi2", dtype=jnp.bfloat16, heads=(8, 4), head_dim=128):
    """Of two rows, which store nothing or 300 tokens."""
    generator = np.random.default_rng(0)
    lengths = jnp.asarray([0, 300], jnp.int32)
    shape = (2, 1, heads[1], head_dim)
    q, k, v = (
        jnp.asarray(generator.standard_normal(shape), dtype)
        for shape in ((2, 1, heads[0], head_dim), shape, shape)
    )
    prompt = jnp.asarray(generator.standard_normal((2, 2, 384, *shape[2:])), dtype)
    layer = empty_state(1, 2, heads[1], 384, head_dim, PRESETS[kv], dtype).layers[0]
    return q, k, v, layer.store_prompt(*prompt, lengths), lengths


def on_an_h100():
    """For what asks for the GPU that it is lowered for; JAX 0.10 does not, and assumes that one."""
    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def fitting_platforms(q, layer):
    return [kernel.platform for kernel in dispatch.fitting_kernels("it", KERNELS, q, layer)]


def lower(platform, *arguments, **options):
    function = jax.jit(functools.partial(decode_attention, **options))
    return function.trace(*arguments).lower(lowering_platforms=(platform,))


def test_auto_is_the_kernel_on_tpus_only(monkeypatch):
    """And nothing of the other implementation is left in the program, nor a choice at run time."""
    # Whether there is anything in a single block is asked at run time.
    monkeypatch.setattr(xla, "BLOCK_BYTES", 1)
    on_tpu, on_cpu = lower("tpu", *arguments()), lower("cpu", *arguments())
    softmax = "stablehlo.exponential"  # which the kernel has inside
    assert KERNEL in on_tpu.as_text()
    assert softmax not in on_tpu.as_text()
    assert KERNEL not in on_cpu.as_text()
    assert softmax in on_cpu.as_text()
    assert " conditional(" not in on_cpu.compile().as_text()


def test_auto_is_another_kernel_on_gpus():
    """Two of them, and that on no other platform."""
    with on_an_h100():
        program = lower("cuda", *arguments()).as_text()
    assert program.count(GPU_KERNEL) == 2
    assert KERNEL not in program
    assert GPU_KERNEL not in lower("cpu", *arguments()).as_text() + lower("tpu", *arguments()).as_text()


def test_xla_is_xla_everywhere():
    assert KERNEL not in lower("tpu", *arguments(), implementation="xla").as_text()
    with on_an_h100():
        assert GPU_KERNEL not in lower("cuda", *arguments(), implementation="xla").as_text()


@pytest.mark.compiled
def test_each_platform_has_its_own_limits():
    half = arguments(dtype=jnp.float16)
    assert KERNEL not in lower("tpu", *half).as_text()
    with on_an_h100():
        assert lower("cuda", *half).as_text().count(GPU_KERNEL) == 2
        assert GPU_KERNEL not in lower("cuda", *arguments(head_dim=256)).as_text()
    assert KERNEL in lower("tpu", *arguments(head_dim=256)).as_text()


@pytest.mark.parametrize(("kind", "capability"), [("Tesla T4", "7.5"), ("AMD MI300X", "gfx942")])
def test_other_gpus_run_xla(monkeypatch, kind, capability):
    """As if this process had one."""
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=kind)
    q, _, _, layer, _ = arguments()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dispatch._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match=f"compute capability 8.0, and {kind} has {capability}"):
        assert fitting_platforms(q, layer) == ["tpu"]


def test_without_the_triton_lowering(monkeypatch):
    monkeypatch.setattr(gpu, "gpu_kernel", None)
    q, _, _, layer, _ = arguments()
    assert fitting_platforms(q, layer) == ["tpu"]
    with pytest.raises(NotImplementedError, match="Triton"):
        gpu.check_supported(q, layer)


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    dispatch._warn_of_fallback.cache_clear()
    jax.clear_caches()  # it warns while tracing


@pytest.mark.compiled
@pytest.mark.usefixtures("on_a_tpu")
def test_auto_warns_once_of_what_the_kernel_does_not_take():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert KERNEL not in lower("tpu", *arguments(dtype=jnp.float32)).as_text()
        assert KERNEL in lower("tpu", *arguments()).as_text()
    (warning,) = caught
    assert "float32" in str(warning.message)


@pytest.mark.compiled
@pytest.mark.usefixtures("on_a_tpu")
def test_unquantized_layers_are_not_the_kernels_business():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KERNEL not in lower("tpu", *arguments("bf16")).as_text()


def test_auto_is_silent_elsewhere():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(decode_attention)(*arguments(dtype=jnp.float32))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_the_kernel_asked_for_says_what_it_does_not_take(platform, kernel):
    with pytest.raises(NotImplementedError, match="float32"):
        lower(platform, *arguments(dtype=jnp.float32), implementation=kernel)
    with pytest.raises(NotImplementedError, match="quantized layers only"):
        lower(platform, *arguments("bf16"), implementation=kernel)


def test_unknown_implementation(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match="'auto', 'xla', 'pallas_tpu', 'pallas_gpu', got 'triton'"):
        decode_attention(*arguments(), implementation="triton")


@pytest.mark.parametrize("kv", ["kivi2-sinks", "bf16"])
@pytest.mark.parametrize("new", [1, 2])
def test_heads_of_one_kv_head(kv, new):
    """They attend what they attend among all heads."""
    *qkv, layer, lengths = arguments(kv, dtype=jnp.float32)
    q, k, v = (jnp.concatenate([x, -x], axis=1)[:, :new] for x in qkv)

    def attend(*arguments):
        if new == 1:
            return jax.jit(decode_attention)(*arguments)
        return jax.jit(chunk_attention)(*arguments[:5], jnp.full(2, new), *arguments[5:])

    whole = attend(q, k, v, layer, lengths)
    part = attend(q[:, :, 4:6], k, v, layer, lengths, Heads(kv_heads=1, first_kv_head=jnp.int32(2)))
    np.testing.assert_allclose(part, whole[:, :, 4:6], atol=1e-6)


@pytest.mark.interpreted
def test_params_choose_for_the_decode_loop(tmp_path):
    """The whole loop with each kernel interpreted, token by token as with XLA but for near ties."""
    folder = write_checkpoint(tmp_path, head_dim=64, num_hidden_layers=1)
    params = kivi_jax.load(folder, "bfloat16")
    completions = [
        kivi_jax.generate(
            dataclasses.replace(params, decode_attention=name),
            [list(range(1, 100)), [3, 4]],
            max_new_tokens=40,
            logprobs=True,
        )
        for name in ("xla", "pallas_tpu", "pallas_gpu")
    ]
    references = completions[0] * 2
    for expected, out in zip(references, completions[1] + completions[2], strict=True):
        same = [a == b for a, b in zip(expected.tokens, out.tokens, strict=True)]
        agree = same.index(False) if False in same else len(same)
        assert agree >= 4
        np.testing.assert_allclose(out.logprobs[:agree], expected.logprobs[:agree], atol=0.1)
