"""Texts and conversations in, texts out: tokenizers, chat templates, stop strings."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import kivi_jax
from kivi_jax.checkpoints.load import DEMO_FOLDER
from kivi_jax.completions import CompletionReader
from kivi_jax.decoding import continue_decoding, start_decoding
from kivi_jax.text import encode, load_tokenizer
from tests.fallback_tokenizer import PIECES, beyond, byte_fallback, byte_tokens, fallback_text
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def test_text_continues_the_prompt(tmp_path):
    """Tokenizers that strip the first space of what they decode don't lose the one after the prompt."""
    folder = write_checkpoint(tmp_path)
    vocabulary = {f"▁w{token}": token for token in range(TINY["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    params = kivi_jax.load(folder, dtype="float32")
    completion = kivi_jax.generate(params, "w1 w2", max_new_tokens=5)
    assert completion.text == "".join(f" w{token}" for token in completion.tokens)


def test_stop_strings_end_before_themselves(lettered):
    whole = kivi_jax.generate(lettered, ["w1", "w2"], max_new_tokens=30)
    stop = whole[0].text[20:26]
    stopped = kivi_jax.generate(lettered, ["w1", "w2"], max_new_tokens=30, stop=[stop, "never"])
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else "length")
        assert after.tokens == before.tokens[: len(after.tokens)]
        decoded = "".join(f" w{token}" for token in after.tokens)
        assert (stop in decoded) == (stop in before.text)
        assert stop not in decoded.rpartition(" ")[0]


def test_stream_never_shows_what_a_stop_string_takes_back(lettered):
    whole = kivi_jax.generate(lettered, ["w1"], max_new_tokens=30)[0].text
    words = whole.split()
    stop = " ".join(words[10:15])
    assert whole.count(stop) == 1
    expected = whole.split(stop)[0]
    shown = [
        step[0].text for step in kivi_jax.stream(lettered, ["w1"], max_new_tokens=30, stop=stop, every=1)
    ]
    assert shown[-1] == expected
    assert all(expected.startswith(text) for text in shown)
    assert len(shown) < 20


@pytest.mark.parametrize("text", ["the items 🎉 all", "the items 🎈 all", "the items 🎉", "the items 🎈"])
def test_half_a_character_hides_no_stop_string(text):
    """Of the demo's tokenizer, which needs several tokens for an emoji."""
    tokenizer = load_tokenizer(str(DEMO_FOLDER))
    context, tokens = tokenizer.encode("of "), tokenizer.encode(text)
    assert "\ufffd" in tokenizer.decode(tokens[: len(tokenizer.encode("the items ")) + 1])
    reader = CompletionReader(context, (), str(DEMO_FOLDER), ("items 🎉",), max_new_tokens=len(tokens))
    shown = [reader.read(tokens[:count]).text for count in range(1, len(tokens) + 1)]
    assert shown[-1] == text.partition("items 🎉")[0]
    assert all(shown[-1].startswith(partial) for partial in shown)
    assert shown == sorted(shown)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A folder with a tokenizer that has a token for every byte."""
    folder = tmp_path_factory.mktemp("fallback")
    byte_fallback().save_pretrained(folder)
    return str(folder)


def in_steps(reader, tokens, generator):
    """What is shown while a few tokens come at a time, and in the end."""
    count, steps = 0, []
    while count < len(tokens):
        count = min(count + generator.randint(1, 5), len(tokens))
        steps.append(reader.read(tokens[:count]))
        if steps[-1].finish_reason:
            break
    return steps


@pytest.mark.parametrize("kind", ["byte fallback", "byte-level"])
def test_completions_do_not_depend_on_the_steps(fallback, kind):
    """With stop strings that end anywhere, against the text of ever more tokens."""
    generator = random.Random(5)
    text = "the 한말🙂é a.\n"
    if kind == "byte fallback":
        folder, decode = fallback, fallback_text
        vocabulary = [*byte_tokens(text), *range(3 + 256, len(PIECES))]
    else:
        folder = str(DEMO_FOLDER)
        decode = load_tokenizer(folder).decode
        vocabulary = load_tokenizer(folder).encode(text, add_special_tokens=False)
    context = vocabulary[:1]
    parts = [vocabulary[4:10], vocabulary, *([token] for token in vocabulary)]

    def text_of(tokens):
        return beyond(decode(context), decode([*context, *tokens]))

    seen = set()
    for _ in range(200):
        written = [token for part in generator.choices(parts, k=6) for token in part]
        end = generator.choice(vocabulary)
        stops = tuple(generator.choices(["한", "말🙂", "é", " a", "a.", "he", "한말"], k=2))
        tokens = written[: written.index(end)] if end in written else written
        expected, reason = text_of(tokens), "stop" if end in written else "length"
        for count in range(len(tokens) + 1):
            shown = text_of(tokens[:count])
            if places := [shown.find(stop) for stop in stops if stop in shown]:
                expected, tokens, reason = shown[: min(places)], tokens[:count], "stop"
                break
        settings = (context, (end,), folder, stops, len(written))
        whole = CompletionReader(*settings).read(written)
        assert (whole.text, whole.tokens, whole.finish_reason) == (expected, tokens, reason)
        steps = in_steps(CompletionReader(*settings), written, generator)
        assert steps[-1] == whole
        for earlier, later in itertools.pairwise(steps):
            assert later.text.startswith(earlier.text)
        seen |= {reason, "half" if "\ufffd" in expected else "whole"}
    assert seen == {"stop", "length", "half", "whole"}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A model that has a token for every byte and always writes on in this text, and then its end token."""
    folder = write_checkpoint(tmp_path_factory.mktemp("emoji"))
    written = [len(PIECES) - 1, *byte_tokens("글한말🙂é"), 2]
    assert len(set(written[1:])) == len(written[1:])
    sizes = {"vocab_size": len(PIECES), "hidden_size": 288, "eos_token_id": 2}
    tensors = random_tensors(TINY | sizes)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:] = 0
    tensors["model.embed_tokens.weight"] = np.eye(len(PIECES), 288, dtype=np.float32)
    tensors["lm_head.weight"] = np.zeros((len(PIECES), 288), np.float32)
    tensors["lm_head.weight"][written[1:], written[:-1]] = 1
    write_checkpoint(folder, tensors, **sizes)
    byte_fallback().save_pretrained(folder)
    return kivi_jax.load(folder, dtype="float32")


@pytest.mark.parametrize("prompt", ["글", "the 글", "the 한말글"])
def test_text_after_byte_tokens_is_whole(emoji, prompt):
    """Of short prompts, and of some whose end is all that is looked at and begins within a character."""
    (completion,) = kivi_jax.generate(emoji, [[5 + 256, *byte_tokens(prompt)]], max_new_tokens=20)
    assert (completion.text, completion.finish_reason) == ("한말🙂é", "stop")
    stopped = kivi_jax.generate(emoji, [byte_tokens(prompt)], max_new_tokens=20, stop="🙂")[0]
    assert (stopped.text, len(stopped.tokens), stopped.finish_reason) == ("한말", 10, "stop")


@pytest.mark.parametrize("inside", [1, 2])
def test_a_character_that_begins_in_the_prompt_is_the_completions(emoji, inside):
    (completion,) = kivi_jax.generate(emoji, [byte_tokens("the 글")[: 4 + inside]], max_new_tokens=20)
    assert completion.text == "글한말🙂é"


def test_half_a_character_takes_nothing_back(emoji):
    prompt = [byte_tokens("글")]
    shown = [step[0].text for step in kivi_jax.stream(emoji, prompt, max_new_tokens=20, every=1)]
    growing = ["", *["한"] * 3, *["한말"] * 4, *["한말🙂"] * 2, *["한말🙂é"] * 2]
    assert shown == growing
    for count in range(1, 13):
        (cut,) = kivi_jax.generate(emoji, prompt, max_new_tokens=count)
        assert (cut.text, cut.finish_reason) == (fallback_text(byte_tokens("한말🙂é")[:count]), "length")
    for settings in ({"every": 1}, {"every": 8}, {"max_new_tokens": 7}, {"max_new_tokens": 6}):
        *_, (stopped,) = kivi_jax.stream(emoji, prompt, stop="말", **({"max_new_tokens": 20} | settings))
        assert (stopped.text, len(stopped.tokens), stopped.finish_reason) == ("한", 6, "stop")


def test_logprobs_stay_aligned_where_completions_are_cut(lettered):
    whole = kivi_jax.generate(lettered, "w1", max_new_tokens=30, logprobs=True)
    assert len(whole.logprobs) == 30
    stop = whole.text[20:26]
    ended = dataclasses.replace(lettered, end_tokens=(whole.tokens[10],))
    for steps in (
        list(kivi_jax.stream(lettered, "w1", max_new_tokens=30, logprobs=True, stop=stop, every=4)),
        list(kivi_jax.stream(ended, "w1", max_new_tokens=30, logprobs=True, every=4)),
    ):
        assert steps[-1][0].finish_reason == "stop"
        for (completion,) in steps:
            assert completion.tokens == whole.tokens[: len(completion.tokens)]
            assert completion.logprobs == whole.logprobs[: len(completion.tokens)]


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
