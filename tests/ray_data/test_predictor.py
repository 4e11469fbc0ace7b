"""A predictor without a cluster: in this process, as Ray Data calls it in an actor."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("ray.data")

import pyarrow as pa

import kivi_jax
from kivi_jax import Engine, GenerationSettings, KVConfig
from kivi_jax.engine.thread import EngineDied
from kivi_jax.ray_data import KiviPredictor
from tests.tiny_checkpoint import write_checkpoint

KV = KVConfig(2, 2, 32, 32)
OPTIONS = {"kv": KV, "dtype": "float32", "slots": 4, "capacity": 64, "window": 8}
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}w5"


@pytest.fixture(scope="module")
def folder(lettered, tmp_path_factory) -> Path:
    """A model of words w0, w1, … between spaces, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(lettered.tokenizer, folder)
    for name, change in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    ):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def batches_at_once(predictor: KiviPredictor, *batches: pa.Table) -> list[list[dict]]:
    async def run() -> list[pa.Table]:
        return await asyncio.gather(*map(predictor, batches))

    return [table.to_pylist() for table in asyncio.run(run())]


def test_batches_share_an_engine(folder, monkeypatch):
    running = []
    step = Engine.step

    def watched(engine):
        outputs = step(engine)
        running.append(engine.running)
        return outputs

    monkeypatch.setattr(Engine, "step", watched)
    predictor = KiviPredictor(str(folder), GenerationSettings(9), mesh="1x1", **OPTIONS)
    params = kivi_jax.load(folder, "float32")
    prompts = [[f"w{3 * i} w{j}" for j in range(2)] for i in range(5)]
    found = batches_at_once(predictor, *(pa.table({"prompt": batch}) for batch in prompts))
    for batch, rows in zip(prompts, found, strict=True):
        expected = kivi_jax.generate(params, batch, KV, max_new_tokens=9)
        assert [row["generated_text"] for row in rows] == [completion.text for completion in expected]
        assert [row["prompt"] for row in rows] == batch
        assert all(row["prompt_tokens"] == 2 and row["completion_tokens"] == 9 for row in rows)
    assert max(running) == 4  # two batches


def test_conversations_and_bad_rows(folder):
    predictor = KiviPredictor(str(folder), GenerationSettings(9), **OPTIONS)
    conversation = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    batch = pa.table(
        {"messages": [conversation, None, [], None], "prompt": [None, "w1", None, "w1 " * 60], "id": range(4)}
    )
    ((chat, text, empty, long),) = batches_at_once(predictor, batch)
    params = kivi_jax.load(folder, "float32")
    assert chat["generated_text"] == kivi_jax.generate(params, conversation, KV, max_new_tokens=9).text
    assert chat["prompt_tokens"] == 3
    assert text["generated_text"] == kivi_jax.generate(params, "w1", KV, max_new_tokens=9).text
    assert empty["error"] == "the prompt is empty; give it at least one token"
    assert "exceed the engine's capacity of 64 tokens" in long["error"]
    assert [row["error"] for row in (chat, text)] == ["", ""]
    assert [row["id"] for row in (chat, text, empty, long)] == [0, 1, 2, 3]


def test_no_batch_waits_for_an_engine_that_died(folder, monkeypatch):
    predictor = KiviPredictor(str(folder), GenerationSettings(9), **OPTIONS)
    batch = pa.table({"prompt": ["w1"]})
    assert batches_at_once(predictor, batch)[0][0]["error"] == ""

    def fail(engine):
        raise RuntimeError("a chip was lost")

    monkeypatch.setattr(Engine, "step", fail)
    for _ in range(2):
        with pytest.raises(
            EngineDied, match="a chip was lost"
        ):  # and this process, which is no actor, goes on
            batches_at_once(predictor, batch, batch)


def test_models_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer, which texts in rows need"):
        KiviPredictor(str(write_checkpoint(tmp_path / "tiny")), **OPTIONS)
