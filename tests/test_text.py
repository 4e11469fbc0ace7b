"""Texts and conversations in, texts out: tokenizers, chat templates, stop strings."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jaxtyping
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import kivi_jax
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.text import encode, load_tokenizer
from tests.tiny_checkpoint import TINY, write_checkpoint

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model with a chat template, whose tokenizer begins every text with a special token and, as SentencePiece has
    it, decodes the first word without its space."""
    folder = write_checkpoint(tmp_path_factory.mktemp("chatty"), bos_token_id=0)
    words = SPECIAL + [f"▁w{token}" for token in range(len(SPECIAL), TINY["vocab_size"])]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return kivi_jax.load(folder, dtype="float32")


MESSAGES = [
    {"role": "system", "content": "w10 w11"},
    {"role": "user", "content": "w12"},
    {"role": "assistant", "content": "w13"},
    {"role": "user", "content": "w14 w15"},
]
# As the template has it: one <s>, and <|assistant|> at the end.
MESSAGE_IDS = [0, 2, 10, 11, 3, 12, 4, 13, 3, 14, 15, 4]


def test_conversations_are_encoded_by_their_template(chatty):
    assert encode(chatty, [MESSAGES, "w10", [5, 6]]) == [MESSAGE_IDS, [0, 10], [5, 6]]


def test_special_token_stops_though_no_text_shows_it(chatty):
    settings = {"max_new_tokens": 60, "temperature": 100.0, "seed": 3}
    free = kivi_jax.generate(chatty, [MESSAGE_IDS], **settings)[0]
    place = next(i for i, token in enumerate(free.tokens) if token < len(SPECIAL))
    stop = ["w200", SPECIAL[free.tokens[place]]]
    stopped = kivi_jax.generate(chatty, [MESSAGE_IDS], stop=stop, **settings)[0]
    assert (stopped.tokens, stopped.finish_reason) == (free.tokens[:place], "stop")


def test_a_special_token_as_stop_does_not_compile(chatty):
    settings = {"max_new_tokens": 20}
    for end_tokens, stops in (((), ["</s>"]), ((7,), SPECIAL[:3])):
        params = dataclasses.replace(chatty, end_tokens=end_tokens)
        kivi_jax.generate(params, [MESSAGE_IDS], **settings)
        compiled = start_decoding._cache_size(), continue_decoding._cache_size()
        kivi_jax.generate(params, [MESSAGE_IDS], stop=stops, **settings)
        assert (start_decoding._cache_size(), continue_decoding._cache_size()) == compiled


def test_conversation_is_answered(chatty):
    expected = kivi_jax.generate(chatty, [MESSAGE_IDS], max_new_tokens=20)[0].tokens
    answer = kivi_jax.generate(chatty, MESSAGES, max_new_tokens=20)
    assert answer.tokens == expected
    # A text of its own: no space before its first word, and nothing of the prompt.
    assert answer.text == " ".join(f"w{token}" for token in expected if token > 4)
    assert kivi_jax.generate(chatty, [MESSAGES], max_new_tokens=20) == [answer]
    steps = [completion for (completion,) in kivi_jax.stream(chatty, MESSAGES, max_new_tokens=20, every=5)]
    assert steps[-1] == answer
    assert all(answer.text.startswith(step.text) for step in steps)
    samples = kivi_jax.generate(chatty, MESSAGES, max_new_tokens=20, temperature=1.0, n=2)
    assert all(isinstance(sample, kivi_jax.Completion) for sample in samples)


def test_text_after_a_special_token_keeps_its_space(chatty):
    """A prompt that was formatted by hand is a text, which its completion continues."""
    prompt = "<|user|>w12<|assistant|>"
    completion = kivi_jax.generate(chatty, prompt, max_new_tokens=10)
    assert completion.text == "".join(f" w{token}" for token in completion.tokens if token > 4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"content": "w7"}], "a message of prompt 0 needs a 'role', got {'content': 'w7'}"),
        ([[5], [{"content": "w10"}]], "a message of prompt 1 needs"),
        ({"role": "user", "content": "w10"}, "a single message in a list"),
        ([{"role": "user", "content": "w10"}, "w11"], "a list of messages, got {'role'"),
        (
            [{"role": "tool", "content": "w10"}],
            "chat template does not take this conversation: no tools here",
        ),
    ],
)
def test_bad_conversations_are_one_clear_error(chatty, prompts, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(ValueError, match=message):
        kivi_jax.generate(chatty, prompts)


def test_conversations_need_a_chat_template(tiny, lettered):
    with pytest.raises(ValueError, match="no tokenizer"):
        kivi_jax.generate(tiny, MESSAGES)
    with pytest.raises(ValueError, match="no chat template, so it can't take messages"):
        kivi_jax.generate(lettered, MESSAGES)


def write_templates(folder, form, templates):
    """Named chat templates in one of the two forms that transformers reads."""
    if form == "list":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return
    (folder / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        place = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        (folder / f"{place}.jinja").write_text(template)


@pytest.mark.parametrize("form", ["list", "files"])
@pytest.mark.parametrize("has_default", [False, True])
def test_chat_templates_are_taken_by_name(lettered, tmp_path, form, has_default):
    folder = tmp_path / "model"
    shutil.copytree(lettered.tokenizer, folder)
    templates = {"rag": "w11", "tool_use": "w12"} | ({"default": "w13"} if has_default else {})
    write_templates(folder, form, templates)
    kivi_jax.convert(folder, tmp_path / "converted", "float32")
    for name in (folder, tmp_path / "converted"):
        params = kivi_jax.load(name, "float32")
        for template, text in templates.items():
            assert encode(params, [MESSAGES, "w1"], template) == [[int(text[1:])], [1]]
        with pytest.raises(ValueError, match=r"chat_template must be one of .*'rag', 'tool_use', got 'nope'"):
            encode(params, [MESSAGES], "nope")
        if has_default:
            assert encode(params, [MESSAGES]) == [[13]]
        else:
            with pytest.raises(ValueError, match=r"no default chat template; choose .*: 'rag', 'tool_use'"):
                encode(params, [MESSAGES])
    expected = kivi_jax.generate(params, [[11]], max_new_tokens=3)[0].tokens
    assert kivi_jax.generate(params, MESSAGES, max_new_tokens=3, chat_template="rag").tokens == expected


def test_an_only_chat_template_is_the_default(chatty, monkeypatch):
    assert encode(chatty, [MESSAGES], "default") == [MESSAGE_IDS]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    for name in ("rag", "", 7, ["default"]):
        with pytest.raises(
            ValueError, match="chat_template must be one of this checkpoint's, 'default', got"
        ):
            kivi_jax.generate(chatty, MESSAGES, chat_template=name)


def test_empty_text_is_refused(lettered):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        kivi_jax.generate(lettered, "")


def test_text_that_is_not_unicode_is_refused(lettered):
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        kivi_jax.generate(lettered, ["w1", "w2 \udcff"])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": '{"version": "1.0", "model": '}, "are damaged or of an unknown kind: "),
        ({"tokenizer.json": "[]", "tokenizer_config.json": "7"}, "are damaged or of an unknown kind: "),
        (
            {
                "tokenizer.model": "?",
                "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["code.Own", null]}}',
            },
            "are damaged .*: it needs code of its own, and code from checkpoints is never run$",
        ),
    ],
)
def test_damaged_tokenizer_is_one_clear_error(tmp_path, files, reason):
    folder = write_checkpoint(tmp_path)
    for name, content in files.items():
        (folder / name).write_text(content)
    params = kivi_jax.load(folder, dtype="float32")
    with pytest.raises(
        ValueError, match=rf"the tokenizer can't be loaded: its files in {folder} {reason}"
    ) as error:
        kivi_jax.generate(params, "text")
    assert "trust_remote_code" not in str(error.value)


def test_tokenizers_of_vocabulary_and_merges(tmp_path):
    folder = write_checkpoint(tmp_path, vocab_size=300)
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|end|>"]
    (folder / "vocab.json").write_text(json.dumps({word: token for token, word in enumerate(vocabulary)}))
    assert kivi_jax.load(folder).tokenizer is None  # which is half of one
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}'
    )
    kivi_jax.convert(folder, tmp_path / "converted")
    for name in (folder, tmp_path / "converted"):
        params = kivi_jax.load(name)
        assert encode(params, ["hello"]) == [[256, 257, vocabulary.index("o")]]
        assert load_tokenizer(params.tokenizer).decode([256, 257]) == "hell"


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    params = kivi_jax.load(folder)
    with pytest.raises(
        ValueError, match=r"tokenizer.model is read by the package sentencepiece, .*pip install"
    ):
        kivi_jax.generate(params, "text")


# Eight threads ask for the same model at once, in a process that has not imported transformers yet.
AT_ONCE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import kivi_jax
from kivi_jax.text import load_tokenizer

assert "transformers" not in sys.modules
params = kivi_jax.load(sys.argv[1], "float32")
start = threading.Barrier(8)

def answer(_):
    start.wait()
    tokenizer = load_tokenizer(params.tokenizer)
    return id(tokenizer), kivi_jax.generate(params, "w1", "bf16", max_new_tokens=2).text

with ThreadPoolExecutor(8) as pool:
    ((_, text),) = set(pool.map(answer, range(8)))  # one tokenizer and one answer
print(text)
"""


def test_first_calls_may_come_from_several_threads(lettered):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", AT_ONCE, str(lettered.tokenizer)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == kivi_jax.generate(lettered, "w1", "bf16", max_new_tokens=2).text
