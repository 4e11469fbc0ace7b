"""Tokenizers in GGUF files: the same as those that were written into them."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import kivi_jax
from kivi_jax.checkpoints.gguf_file import read_gguf
from kivi_jax.checkpoints.gguf_tokenizer import WORDS, read_tokenizer
from kivi_jax.text import load_tokenizer
from tests.tiny_checkpoint import TINY, random_tensors
from tools.tiny_gguf import write_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  leading, double  and trailing spaces   ",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\n\n\n",
    "naïve café — über 漢字 かな Привет 🙂👩‍👩‍👧 e\u0301",
    "1 22 333 4444 55555 3.14 ½ ٣٤",
    "HelloWorld XMLHttpRequest I'LL WE'RE $a+b=c^2|`~\r\n",
    "<|im_start|>user\nHi<|im_end|>",
    "\x00\x7f\ufffd",
]


# What the tokenizer.json of SmolLM2, GPT-2, Falcon 7B, Qwen2 and Llama 3 say.
def split(pattern):
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, to_bytes]}


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BEGIN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PUBLISHED = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]},
    "gpt-2": GPT2,
    "falcon": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            GPT2,
            {"type": "Digits", "individual_digits": False},
            {
                "type": "Split",
                "pattern": {"Regex": "[0-9][0-9][0-9]"},
                "behavior": "Isolated",
                "invert": False,
            },
        ],
    },
    "qwen2": split(BEGIN + r"\p{N}" + REST),
    "llama-bpe": split(BEGIN + r"\p{N}{1,3}" + REST),
}


def published_tokenizer(name):
    """A byte-level BPE of 500 tokens that cuts texts as the models of this name do.

    Its merges would go across all words, had they been cut otherwise.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    parts = [text[start : start + 3] for text in TEXTS for start in range(len(text))]
    tokenizer.train_from_iterator(parts, trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = PUBLISHED[name]
    state["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    state["model"]["ignore_merges"] = name == "llama-bpe"
    return Tokenizer.from_str(json.dumps(state))


def write_tokenizer(path, tokenizer, name, metadata=None):
    """A model with this tokenizer."""
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    config = TINY | {"vocab_size": len(tokens)}
    return write_gguf(path, config, random_tensors(config), metadata=values | (metadata or {}))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return write_tokenizer(
        tmp_path_factory.mktemp("smollm") / "model.gguf", published_tokenizer("smollm"), "smollm"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_the_published_tokenizer(name, tmp_path):
    expected = published_tokenizer(name)
    file = write_tokenizer(tmp_path / "m.gguf", expected, name, {"tokenizer.ggml.add_bos_token": False})
    tokenizer = read_tokenizer(file)
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=False), text
        if name != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġdays", ",ĊĊ", "Ġ", "ĠHelloWorld"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġdays", ",ĊĊ", "Ġ", "ĠHelloWorld"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġdays", ",ĊĊ", "Ġ", "ĠHello", "World"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġdays", ",", "ĊĊĠ", "ĠHelloWorld"]),
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġdays", ",", "ĊĊĠ", "ĠHelloWorld"]),
        ("falcon", ["It", "'", "s", "Ġ", "123", "45", "Ġdays", ",", "ĊĊĠ", "ĠHelloWorld"]),
    ],
)
def test_words(name, words):
    cut = WORDS[name].pre_tokenizer.pre_tokenize_str("It's 12345 days,\n\n  HelloWorld")
    assert [word for word, _ in cut] == words


def test_a_word_that_is_a_token_can_stay_whole(tmp_path):
    """As in Llama 3, where merges don't reach some tokens."""
    for name, count in (("llama-bpe", 1), ("qwen2", 5)):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate([*letters, "whole", "xy"])}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("x", "y")]))
        file = write_tokenizer(
            tmp_path / f"{name}.gguf", tokenizer, name, {"tokenizer.ggml.add_bos_token": False}
        )
        assert len(read_tokenizer(file).encode("whole")) == count


@pytest.mark.parametrize(
    ("name", "metadata", "before", "after"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, [], []),
        ("smollm", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1], [2]),
    ],
)
def test_what_texts_begin_and_end_with(name, metadata, before, after, tmp_path):
    expected = published_tokenizer(name)
    tokenizer = read_tokenizer(write_tokenizer(tmp_path / "model.gguf", expected, name, metadata))
    assert tokenizer.encode("Hello") == [*before, *expected.encode("Hello").ids, *after]


def test_conversations_and_the_ends_of_turns(smollm):
    params = kivi_jax.load(smollm, "float32")
    assert params.end_tokens == (2, 0)  # the file names <|im_end|>; <|endoftext|> ends texts, too
    completion = kivi_jax.generate(params, [{"role": "user", "content": "Hello"}], max_new_tokens=4)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert completion == kivi_jax.generate(params, text, max_new_tokens=4)
    assert (
        completion
        == kivi_jax.generate(params, [published_tokenizer("smollm").encode(text).ids], max_new_tokens=4)[0]
    )


def test_named_chat_templates(tmp_path):
    metadata = {"tokenizer.chat_template.short": "{{ messages[0]['content'] }}"}
    file = write_tokenizer(tmp_path / "model.gguf", published_tokenizer("smollm"), "smollm", metadata)
    params = kivi_jax.load(file, "float32")
    prompt = [{"role": "user", "content": "Hello"}]
    short = kivi_jax.generate(params, prompt, max_new_tokens=2, chat_template="short")
    assert short == kivi_jax.generate(params, "Hello", max_new_tokens=2)
    assert short != kivi_jax.generate(params, prompt, max_new_tokens=2)


def test_a_converted_model_tokenizes_alike(smollm, tmp_path):
    kivi_jax.convert(smollm, tmp_path / "out", "float32")
    source, converted = kivi_jax.load(smollm, "float32"), kivi_jax.load(tmp_path / "out", "float32")
    assert converted.config == source.config
    assert converted.end_tokens == source.end_tokens
    tokenizers = [load_tokenizer(params.tokenizer) for params in (source, converted)]
    for text in TEXTS:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    prompt = [{"role": "user", "content": "Hello"}]
    assert kivi_jax.generate(source, prompt, max_new_tokens=4) == kivi_jax.generate(
        converted, prompt, max_new_tokens=4
    )


@pytest.mark.parametrize("metadata", [{"tokenizer.ggml.pre": "bloom"}, {"tokenizer.ggml.model": "t5"}])
def test_texts_for_an_unknown_tokenizer_are_refused(metadata, tmp_path):
    """Better than tokens that the model was not trained on. Token ids need no tokenizer."""
    file = write_tokenizer(tmp_path / "model.gguf", published_tokenizer("smollm"), "smollm", metadata)
    with pytest.warns(
        UserWarning, match=r"the tokenizer '.*' with tokenizer\.ggml\.pre '.*' is unknown, only"
    ):
        params = kivi_jax.load(file, "float32")
    assert kivi_jax.generate(params, [[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(ValueError, match="no tokenizer; pass prompts as lists of token ids"):
        kivi_jax.generate(params, "Hello")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"tokenizer.ggml.merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["xx yy"]}, r"damaged"),
        ({"tokenizer.ggml.merges": ["x"]}, r"damaged"),
        ({"tokenizer.ggml.token_type": [1, 2]}, r"token_type has 2 types of 500 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"], "tokenizer.ggml.token_type": None}, r"has tokens twice"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6},
            r"bos_token, which the file",
        ),
        ({"tokenizer.ggml.model": "llama"}, r"lacks tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, r"scores has 1 scores of 500"),
    ],
)
def test_damaged_tokenizers(metadata, problem, tmp_path):
    file = write_tokenizer(tmp_path / "model.gguf", published_tokenizer("smollm"), "smollm", metadata)
    params = kivi_jax.load(file, "float32")
    with pytest.raises(ValueError, match=rf"the tokenizer can't be loaded: .*{problem}"):
        kivi_jax.generate(params, "Hello")


# SentencePiece's vocabularies: unknown, control and byte tokens, characters, and longer pieces.
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
LETTERS = [*"▁abcdehlno.,é"]
LONGER = [
    "▁a",
    "ll",
    "he",
    "lo",
    "hel",
    "▁he",
    "▁hel",
    "llo",
    "hello",
    "▁hello",
    "▁▁",
    "an",
    "and",
    "▁and",
    "<|u|>",
]


def write_sentencepiece(path, metadata=None):
    generator = random.Random(0)
    scores = {piece: -float(number) for number, piece in enumerate(generator.sample(LONGER, len(LONGER)))}
    tokens = [*PIECES, *LONGER, *LETTERS]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(token, -100.0) for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(LONGER) - 1), 4, *[1] * len(LETTERS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    config = TINY | {"vocab_size": len(tokens)}
    return write_gguf(path, config, random_tensors(config), metadata=values | (metadata or {}))


def merge_by_score(text, tokens, scores):
    """SentencePiece's BPE: again and again the neighbours with the best score, the first of them, become one piece."""
    pieces = list(text)
    while True:
        best = None
        for place in range(len(pieces) - 1):
            merged = pieces[place] + pieces[place + 1]
            if merged in LONGER and (best is None or scores[tokens.index(merged)] > best[0]):
                best = scores[tokens.index(merged)], place, merged
        if best is None:
            break
        pieces[best[1] : best[1] + 2] = [best[2]]
    ids = []
    for piece in pieces:
        ids += [tokens.index(piece)] if piece in tokens else [3 + byte for byte in piece.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    file = write_sentencepiece(
        tmp_path / "model.gguf", {} if prefix else {"tokenizer.ggml.add_space_prefix": False}
    )
    tokenizer = read_tokenizer(file)
    metadata = read_gguf(file).metadata
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    generator = random.Random(1)
    texts = ["hello and hello", "  hello  ", "é漢🙂\n", "hellollo, and."]
    texts += ["".join(generator.choices("ahelond ", k=30)) for _ in range(50)]
    for text in texts:
        ids = tokenizer.encode(text)
        spaced = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert ids == [1, *merge_by_score(spaced, tokens, scores)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("<|u|>", add_special_tokens=False)[-1] == tokens.index("<|u|>")
    assert tokenizer.unk_token == "<unk>"
    assert kivi_jax.load(file).end_tokens == (2,)


def test_a_converted_sentencepiece_model_tokenizes_alike(tmp_path):
    file = write_sentencepiece(tmp_path / "model.gguf")
    kivi_jax.convert(file, tmp_path / "out", "float32")
    before, after = read_tokenizer(file), load_tokenizer(str(tmp_path / "out"))
    for text in ("hello and  hello 🙂", " a"):
        assert before.encode(text) == after.encode(text)
        assert before.decode(before.encode(text)) == after.decode(after.encode(text))
    np.testing.assert_array_equal(before.convert_tokens_to_ids(PIECES), range(len(PIECES)))
