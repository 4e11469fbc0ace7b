"""Completions as text: stop strings, half characters, and that steps don't show."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import kivi_jax
from kivi_jax.checkpoints.load import DEMO_FOLDER
from kivi_jax.completions import CompletionReader
from kivi_jax.text import load_tokenizer
from tests.fallback_tokenizer import PIECES, beyond, byte_fallback, byte_tokens, fallback_text
from tests.tiny_checkpoint import TINY, random_tensors, write_checkpoint


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
    reader = CompletionReader(context, (), str(DEMO_FOLDER), ("items 🎉",), len(tokens), "float32")
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
        settings = (context, (end,), folder, stops, len(written), "float32")
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
