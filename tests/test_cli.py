"""The command as a user runs it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import kivi_jax
from kivi_jax.checkpoints.load import DEMO_FOLDER
from kivi_jax.cli import app
from tests.tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SAMPLED = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """The demo model, said to be one for chats."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def test_prints_prompt_and_completion():
    params = kivi_jax.load("demo")
    prompt = "def read_file(path):"
    expected = kivi_jax.generate(params, prompt, max_new_tokens=12)
    result = run("generate", "--prompt", prompt, "--max-new-tokens", "12")
    assert result.exit_code == 0
    assert result.stdout == f"{prompt}{expected.text}\n"


def test_prints_the_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"kivi-jax {kivi_jax.__version__}\n"


def test_several_prompts_are_one_batch():
    params = kivi_jax.load("demo")
    prompts = ["import os", "Return the number of"]
    expected = kivi_jax.generate(params, prompts, "kivi4", max_new_tokens=12)
    result = run(
        "generate", *(f"--prompt={prompt}" for prompt in prompts), "--kv=kivi4", "--max-new-tokens=12"
    )
    assert result.exit_code == 0
    for prompt, completion in zip(prompts, expected, strict=True):
        assert f"{prompt}{completion.text}\n" in result.stdout
    assert not result.stderr  # no progress bar where it is no terminal


def test_prints_every_sample():
    expected = kivi_jax.generate(kivi_jax.load("demo"), "import os", n=3, seed=4, **SAMPLED)
    result = run("generate", "--prompt=import os", "--samples=3", "--seed=4", *flags(SAMPLED))
    assert result.exit_code == 0
    assert result.stdout == "".join(f"import os{completion.text}\n\n" for completion in expected)


def test_json_has_all_of_each_completion():
    prompts = ["import os", "Return the number of"]
    expected = kivi_jax.generate(kivi_jax.load("demo"), prompts, n=2, logprobs=True, **SAMPLED)
    arguments = ["--samples=2", "--json", "--logprobs", *flags(SAMPLED)]
    result = run("generate", *(f"--prompt={prompt}" for prompt in prompts), *arguments)
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"prompt": prompt}
        | {name: x for name, x in dataclasses.asdict(completion).items() if name != "error"}
        for prompt, completions in zip(prompts, expected, strict=True)
        for completion in completions
    ]
    (line,) = run("generate", "--prompt=x", "--json", "--max-new-tokens=2").stdout.splitlines()
    assert json.loads(line).keys() == {"prompt", "text", "tokens", "finish_reason"}


def test_stop_strings_end_the_text():
    params = kivi_jax.load("demo")
    whole = kivi_jax.generate(params, "import os", max_new_tokens=24).text
    stops = [whole[12:15], whole[8:10]]
    expected = kivi_jax.generate(params, "import os", max_new_tokens=24, stop=stops).text
    assert len(expected) < len(whole)
    result = run(
        "generate", "--prompt=import os", "--max-new-tokens=24", *(f"--stop={text}" for text in stops)
    )
    assert result.stdout == f"import os{expected}\n"


def test_prompts_are_prefilled_in_chunks():
    """Told by the log-probabilities: later chunks attend the earlier ones in 2 bits."""
    params = kivi_jax.load("demo")
    prompt = "import os\n" * 80
    settings = {"max_new_tokens": 2, "logprobs": True}
    whole = kivi_jax.generate(params, prompt, **settings)
    expected = kivi_jax.generate(params, prompt, prefill_chunk=128, **settings)
    assert expected.logprobs != whole.logprobs
    command = ["generate", f"--prompt={prompt}", "--json", "--logprobs", "--max-new-tokens=2"]
    assert json.loads(run(*command, "--prefill-chunk=128").stdout)["logprobs"] == expected.logprobs


def test_chat_prints_the_answer_only(chat_folder):
    params = kivi_jax.load(chat_folder)
    text = "system: Be brief.\nuser: import os\nassistant:"
    expected = kivi_jax.generate(params, text, max_new_tokens=12).text
    chat = ["generate", "--model", str(chat_folder), "--chat", "--prompt=import os", "--max-new-tokens=12"]
    result = run(*chat, "--system=Be brief.")
    assert result.exit_code == 0
    assert result.stdout == f"{expected}\n"
    assert run(*chat).stdout != result.stdout


def test_chat_template_is_named(chat_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "plain.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}"
    )
    params = kivi_jax.load(folder)
    expected = kivi_jax.generate(params, "import os", max_new_tokens=12).tokens
    chat = ["generate", f"--model={folder}", "--chat", "--prompt=import os", "--max-new-tokens=12", "--json"]
    assert json.loads(run(*chat, "--chat-template=plain").stdout)["tokens"] == expected
    assert "must be one of this checkpoint's, 'default', 'plain'" in run(*chat, "--chat-template=x").stderr


def test_the_checkpoints_sampling_yields_to_flags(monkeypatch):
    recommended = {"temperature": 1.5, "top_k": 40}
    monkeypatch.setattr(kivi_jax.Params, "sampling", property(lambda params: recommended))
    params = kivi_jax.load("demo")
    command = ["generate", "--prompt=import os", "--max-new-tokens=12"]
    for arguments, settings in (
        (["--model-sampling"], recommended),
        (["--model-sampling", "--temperature=0.7"], recommended | {"temperature": 0.7}),
        ([], {}),
    ):
        expected = kivi_jax.generate(params, "import os", max_new_tokens=12, **settings)
        assert run(*command, *arguments).stdout == f"import os{expected.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "no folder '/no/such/folder'"),
        (["--kv", "kivi9"], "kv must be one of"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--max-new-tokens", "9999"], "positions"),
        (["--temperature", "-1"], "temperature"),
        (["--min-p", "2"], "min_p must be in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty must be positive"),
        (["--samples", "2"], "set a temperature above 0"),
        (["--chat"], "no chat template"),
        (["--system", "Be brief."], "--system needs --chat"),
        (["--chat-template", "rag"], "--chat-template needs --chat"),
        (["--max-positions", "0"], "max_positions must be at least 1"),
        (["--max-positions", "100"], "exceed the model's 100 positions"),
        (["--logprobs"], "--logprobs needs --json"),
        (["--revision", "v1"], "revision 'v1' is for a model on the Hugging Face Hub"),
        (["--prompt", "x\udcff"], "prompt 1 is not valid Unicode"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run("generate", "--prompt", "x", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1


def test_settings_are_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(kivi_jax, "load", None)
    for arguments, message in (
        (["--kv=kivi9"], "kv must be one of"),
        (["--top-p=2"], "top_p must be in (0, 1]"),
    ):
        assert message in run("generate", "--prompt=x", *arguments).stderr


def test_conversion_has_its_revision(tmp_path):
    result = run("convert", "demo", str(tmp_path / "out"), "--revision=v1")
    assert (result.exit_code, result.stderr.partition(";")[0]) == (
        1,
        "error: revision 'v1' is for a model on the Hugging Face Hub, and 'demo' is a folder\n",
    )


@pytest.mark.parametrize(
    ("module", "name", "raised", "message"),
    [
        (
            jax,
            "devices",
            AssertionError(),
            "JAX can't start with JAX_PLATFORMS='cuda': there is no such backend",
        ),
        (jax, "devices", RuntimeError("no GPU"), "JAX can't start with JAX_PLATFORMS='cuda': no GPU"),
        (kivi_jax, "load", MemoryError(), "out of memory"),
        (kivi_jax, "load", RuntimeError("RESOURCE_EXHAUSTED"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_the_machine_lacks_is_one_line(module, name, raised, message, monkeypatch):
    def fail(*_, **__):
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(module, name, fail)
    result = run("generate", "--prompt=x")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


def test_no_stderr_is_needed():
    """With standard error closed, Python has None for it."""
    arguments = ["-m", "kivi_jax.cli", "generate", "--prompt=import os", "--max-new-tokens=2", "--json"]
    command = f"{shlex.join([sys.executable, *arguments])} 2>&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["tokens"]) == 2


@pytest.mark.parametrize(
    "program", [["-m", "kivi_jax.cli", "generate", "--prompt=x"], ["-m", "scripts.demo"]]
)
def test_damaged_weights_give_no_traceback(tmp_path, program):
    folder = write_checkpoint(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    command = [sys.executable, *program, "--model", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)
    assert result.returncode == 1
    assert "damaged or cut short" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("options", [(), ("--json", "--logprobs"), ("--samples=2", "--temperature=1")])
def test_overflow_is_an_error(monkeypatch, options):
    """Lines are JSON still, one line says what to do, and the program fails."""
    demo = kivi_jax.load("demo", dtype="float16")
    weights = jax.tree.map(lambda x: x, demo.weights)
    weights["embed"]["embedding"] = weights["embed"]["embedding"] + jnp.inf
    monkeypatch.setattr(kivi_jax, "load", lambda *_, **__: dataclasses.replace(demo, weights=weights))
    ended = run("generate", "--model=demo", "--prompt=a", "--max-new-tokens=3", *options)
    assert ended.exit_code == 1
    assert "bfloat16" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    if "--json" in options:
        line = json.loads(ended.stdout, parse_constant=pytest.fail)
        assert (line["tokens"], line["finish_reason"], line["logprobs"]) == ([], "error", [])
        assert line["error"] in ended.stderr


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**21))
    ended = run("convert", "demo", str(tmp_path / "out"))
    assert ended.exit_code == 1
    assert ended.stderr.startswith("error: the weights, up to 5 MiB, can't be written to ")
    assert ended.stderr.endswith(", where 2 MiB are free\n")
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fails_on_the_way(tmp_path):
    """No file may outgrow half a megabyte."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY)); "
        "from kivi_jax.cli import app; app(['convert', 'demo', sys.argv[1]])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    # TensorStore's threads may complain of a closed event loop, before or after, and on the same line.
    problem = (
        r"error: the weights, up to 5 MiB, can't be written to .*, where \d+ MiB are free: File too large\n"
    )
    assert len(re.findall(problem, ended.stderr)) == 1
    assert list(tmp_path.iterdir()) == []
