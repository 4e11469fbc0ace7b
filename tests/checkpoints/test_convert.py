"""Models written as Orbax checkpoints and loaded again."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax import CheckpointError
from kivi_jax.checkpoints.orbax_files import save_weights
from kivi_jax.checkpoints.weights import flatten_paths
from kivi_jax.cli import app
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint

OUTSIDE_WEIGHTS = {
    "config.json": {},
    "generation_config.json": {"eos_token_id": [7, 8], "do_sample": True},
    "tokenizer.json": {},
    "tokenizer_config.json": {"chat_template": "{{ messages }}"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model")
    for name, content in OUTSIDE_WEIGHTS.items():
        if name != "config.json":
            (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def converted(source):
    out = source.parent / "converted"
    kivi_jax.convert(source, out, "float32")
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_model_is_the_same(source, converted, dtype):
    expected, params = kivi_jax.load(source, dtype), kivi_jax.load(converted, dtype)
    assert jax.tree.structure(expected.weights) == jax.tree.structure(params.weights)
    for path, weight in flatten_paths(params.weights).items():
        assert weight.dtype == dtype
        np.testing.assert_array_equal(weight, flatten_paths(expected.weights)[path], err_msg=path)
    assert params.config == expected.config
    assert params.end_tokens == (7, 8)
    assert params.sampling == {"temperature": 1.0}
    assert params.tokenizer == str(converted)


def test_a_model_is_stored_in_the_dtype_asked_for(source, tmp_path):
    kivi_jax.convert(source, tmp_path / "new" / "narrow")
    widened = kivi_jax.load(tmp_path / "new" / "narrow", "float32")
    for path, weight in flatten_paths(kivi_jax.load(source, "bfloat16").weights).items():
        np.testing.assert_array_equal(weight.astype(jnp.float32), flatten_paths(widened.weights)[path])


def test_converted_folders_hold_what_a_model_needs(source, converted):
    assert {file.name for file in converted.iterdir()} == {
        *OUTSIDE_WEIGHTS,
        "chat_template.jinja",
        "orbax",
        "parameters.json",
    }
    for name in (*OUTSIDE_WEIGHTS, "chat_template.jinja"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert converted.stat().st_mode == source.stat().st_mode  # not those of a temporary folder


def test_existing_folders_are_not_overwritten(source, tmp_path):
    for name in ("folder", "file"):
        out = tmp_path / name
        out.mkdir() if name == "folder" else out.write_text("mine")
        with pytest.raises(FileExistsError, match="exists already"):
            kivi_jax.convert(source, out)
    assert not any((tmp_path / "folder").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_space)
    with pytest.raises(OSError, match="No space left"):
        kivi_jax.convert(source, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_failed_conversion_leaves_nothing_though_threads_still_write(source, tmp_path, monkeypatch):
    """As where a disk fills up: the write has failed, but TensorStore's threads go on for a moment."""

    def no_space(*arguments):
        raise OSError("No space left on device")

    def not_empty_at_first(path, **options):
        if failures:
            raise failures.pop()
        rmdir(path, **options)

    rmdir = os.rmdir
    failures = [OSError(errno.ENOTEMPTY, "Directory not empty") for _ in range(3)]
    monkeypatch.setattr(shutil, "copyfile", no_space)
    monkeypatch.setattr(os, "rmdir", not_empty_at_first)
    with pytest.raises(OSError, match="No space left"):
        kivi_jax.convert(source, tmp_path / "out")
    assert not failures
    assert not any(tmp_path.iterdir())


# Runs the conversion and dies where it would copy the last but one file: the weights are written, but not config.json.
KILLED = """
import os, shutil, signal, sys
import kivi_jax

copied = []
copy = shutil.copyfile

def copy_or_die(source, target):
    if len(copied) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    copied.append(copy(source, target))

shutil.copyfile = copy_or_die
kivi_jax.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("copies", [0, len(OUTSIDE_WEIGHTS)])
def test_a_killed_conversion_leaves_nothing_that_loads(source, tmp_path, copies):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(copies)]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (unfinished,) = tmp_path.glob(".out.*.incomplete/out")
    assert (unfinished / "orbax").is_dir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        kivi_jax.load(unfinished)
    kivi_jax.convert(source, tmp_path / "out")
    assert kivi_jax.load(tmp_path / "out").end_tokens == (7, 8)


def removed(file):
    file.unlink()


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of Orbax's abandoned coroutines
@pytest.mark.parametrize("damage", [removed, halved])
def test_damaged_weights_are_one_clear_error(converted, tmp_path, damage, capfd):
    expected = flatten_paths(kivi_jax.load(converted, "float32").weights)
    names = [file.relative_to(converted) for file in (converted / "orbax").rglob("*") if file.is_file()]
    assert len(names) > 5
    refused = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(converted, folder)
        damage(folder / name)
        try:
            params = kivi_jax.load(folder, "float32")
        except CheckpointError as error:
            assert "damaged" in str(error)  # noqa: PT017, not every file is needed
            assert "convert the model again" in str(error)  # noqa: PT017
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            refused.add(str(name))
        else:
            for path, weight in flatten_paths(params.weights).items():
                np.testing.assert_array_equal(weight, expected[path], err_msg=str(name))
    large = {str(name) for name in names if (converted / name).stat().st_size > 10_000}
    assert large
    assert large <= refused
    assert "orbax/manifest.ocdbt" in refused
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_lists_of_parameters(converted, tmp_path):
    for content, message in (
        (None, "has no parameters"),
        ('{"a"', "not valid JSON"),
        ('{"a": 1}', "to shapes"),
    ):
        folder = tmp_path / message
        shutil.copytree(converted, folder)
        (folder / "parameters.json").unlink()
        if content:
            (folder / "parameters.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            kivi_jax.load(folder)


def test_weights_that_do_not_fit_the_configuration(converted, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    changes = {"num_hidden_layers": 1, "vocab_size": 100, "attention_bias": True}
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    with pytest.raises(CheckpointError) as error:
        kivi_jax.load(folder)
    message = str(error.value)
    assert "  unexpected 'layers.1.attention.k_proj.kernel'\n" in message
    assert "  embed.embedding has shape (101, 48), expected (100, 48)\n" in message
    assert "  missing the tensor for layers.0.attention.k_proj.bias" in message


def test_weights_that_are_not_numbers(source, tmp_path):
    for name, value, dtype in (("nan", np.nan, "float32"), ("large", 1e5, "float16")):
        folder = write_checkpoint(tmp_path / name)
        weights = flatten_paths(kivi_jax.load(source, "float32").weights)
        weights["norm.scale"] = weights["norm.scale"].at[3].set(value)
        save_weights(folder, weights)
        with pytest.raises(
            CheckpointError,
            match=r"norm\.scale .* NaN or infinity and is damaged, or it holds numbers beyond",
        ):
            kivi_jax.load(folder, dtype)


def test_sources_are_checked_before_anything_is_written(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"][0] = np.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        kivi_jax.convert(write_checkpoint(tmp_path / "model", tensors), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_command(source, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(source), str(out), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {out}\n"
    assert kivi_jax.load(out).config == kivi_jax.load(source).config
    result = CliRunner().invoke(app, ["convert", str(source), str(out)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
