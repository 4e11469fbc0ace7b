"""How many slots an engine takes, and what its programs need."""

import jax
import pytest

from kivi_jax import Engine
from kivi_jax.decoding import continue_decoding
from kivi_jax.engine import memory
from kivi_jax.engine.slots import Programs, Shape
from kivi_jax.kv import kv_bytes
from kivi_jax.kv.config import resolve_kv
from kivi_jax.models.llama import LlamaConfig
from tools.offline.abstract_models import abstract_decoding, abstract_params, loop_arguments

MIB = 2**20


@pytest.mark.compiled
def test_slots_are_as_many_as_fit_and_the_sum_is_printed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_free_on", lambda device: 32 * MIB)
    monkeypatch.setattr(memory, "MOST_SLOTS", {})
    engine = Engine(tiny, capacity=512, window=16, prefill_tokens=64)
    line = capsys.readouterr().err
    assert line.startswith(f"engine: {engine.slots} slots of 512 tokens: ")
    assert line.endswith("of 0.03 GiB free\n")
    shape = engine._programs.shape
    state = kv_bytes(engine._device._decoding.state)
    needed = state + memory._temporaries(engine._programs)
    assert 0.6 * 32 * MIB < needed < 32 * MIB
    assert shape.slots == engine.slots > 8
    (completion,) = dict(engine.generate([[1, 2, 3]])).values()
    assert len(completion.tokens) == 128


def test_more_slots_than_are_of_use_are_not_taken(tiny, monkeypatch):
    monkeypatch.setattr(memory, "MOST_SLOTS", {"cpu": 3})
    assert Engine(tiny, capacity=64).slots == 3
    assert Engine(tiny, capacity=64, most_slots=2).slots == 2


def test_no_memory_for_a_slot(tiny, monkeypatch):
    monkeypatch.setattr(memory, "_free_on", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"a slot of 512 tokens takes 0\.\d+ MiB, .* lower capacity"):
        Engine(tiny, capacity=512)


def test_free_memory_of_this_device_is_known():
    assert 2**28 < memory._free_on(jax.devices()[0]) < 2**50


@pytest.mark.compiled
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kv", ["kivi2", "bf16"])
def test_programs_update_the_state_in_place(kv):
    """Windows need as little beside it as the loop of `generate`, and prefills a row and their activations."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=4096,
    )
    params = abstract_params("llama", config, "float32")
    fewer, programs = (
        Programs(params, Shape(resolve_kv(kv, 64, 2), slots, 4096, 16, 256, 4)) for slots in (8, 32)
    )
    state = kv_bytes(programs.abstract().state)
    loop = continue_decoding.lower(*loop_arguments(params, abstract_decoding(params, 32, 4096, kv))).compile()
    of_loop = loop.memory_analysis().temp_size_in_bytes
    window = programs.decode().memory_analysis()
    assert window.alias_size_in_bytes >= state
    assert window.temp_size_in_bytes < 1.1 * of_loop + 32 * 512 * 4
    for program, other in (
        (programs.insert(32), fewer.insert(32)),
        (programs.insert(256), fewer.insert(256)),
        (programs.extend(), fewer.extend()),
    ):
        of_program = program.memory_analysis()
        assert of_program.alias_size_in_bytes >= state
        # Other slots cost nothing.
        assert of_program.temp_size_in_bytes < 1.1 * other.memory_analysis().temp_size_in_bytes
