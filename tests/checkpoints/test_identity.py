"""Models are told apart by what they are."""

import shutil

from kivi_jax.checkpoints.identity import model_identity
from kivi_jax.checkpoints.load import DEMO_FOLDER


def test_copies_are_the_same_and_changes_are_not(tmp_path):
    before = model_identity(DEMO_FOLDER)
    folder = tmp_path / "copy"
    shutil.copytree(DEMO_FOLDER, folder)
    assert model_identity(folder) == before
    (folder / "README.md").write_text("other")
    assert model_identity(folder) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = model_identity(folder)
    shutil.copyfile(DEMO_FOLDER / "model.safetensors", weights)
    assert model_identity(folder) == before
    (folder / "chat_template.jinja").write_text("x")
    assert len({before, changed, model_identity(folder)}) == 3


def test_weights_elsewhere_than_in_the_middle(tmp_path):
    """Training changes all of them, which pieces of the file tell."""
    folder = tmp_path / "copy"
    shutil.copytree(DEMO_FOLDER, folder)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    for place in (0, size // 2 - 1, size - 1):
        data = bytearray((DEMO_FOLDER / "model.safetensors").read_bytes())
        middle = slice(max(0, place - 200_000), place + 200_000)
        data[middle] = bytes(len(data[middle]))
        weights.write_bytes(data)
        assert model_identity(folder) != model_identity(DEMO_FOLDER)
