"""Texts of tokens that come one by one, against decoding all at once and Python's own reading of UTF-8."""

import itertools
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kivi_jax.checkpoints.load import DEMO_FOLDER
from kivi_jax.detokenizer import Detokenizer, _byte_letters
from kivi_jax.text import load_tokenizer
from tests.fallback_tokenizer import BYTE, beyond, byte_fallback, byte_tokens, fallback_text

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHARACTERS = "a é한말🙂▁"
BROKEN = [b"\xff", b"\xc0", b"\x80", b"\xe2", b"\xe2\x82", b"\xf0\x9f", b"\xed\xa0\x80"]
UNKNOWN_TOKEN = 5000


def byte_level(decoder=None):
    """Tokens of several bytes that begin and end anywhere in a character, and added ones with and without letters for
    bytes."""
    generator = random.Random(0)
    stretches = {bytes([byte]) for byte in range(256)} | set(BROKEN)
    text = CHARACTERS.encode()
    while len(stretches) < 330:
        start = generator.randrange(len(text))
        stretches.add(text[start : start + generator.randint(2, 7)])
    vocabulary = {
        "".join(_byte_letters()[byte] for byte in stretch): token
        for token, stretch in enumerate(sorted(stretches))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "말 ", "é!", "\ufffd")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words(model, decoder):
    """Words as every kind of vocabulary writes them, of which each decoder reads its own."""
    pieces = [
        "<s>",
        "▁",
        "▁▁",
        "▁a",
        "a",
        "b▁c",
        "▁한",
        "🙂",
        "\ufffd",
        "##d",
        "e</w>",
        "</w>",
        ".",
        "▁.",
        "'s",
    ]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(model(vocabulary))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def word_level(vocabulary):
    return models.WordLevel(vocabulary, unk_token="<s>")


def unigram(vocabulary):
    return models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0)


# Those that decode all at once as what is right.
TOKENIZERS = {
    "byte-level": byte_level,
    "metaspace": lambda: words(unigram, decoders.Metaspace()),
    "metaspace, first kept": lambda: words(unigram, decoders.Metaspace(prepend_scheme="never")),
    "word pieces": lambda: words(word_level, decoders.WordPiece()),
    "word ends": lambda: words(word_level, decoders.BPEDecoder("</w>")),
    "split by spaces": lambda: words(word_level, None),
}


def at_once(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read(tokenizer, tokens, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return "".join(map(detokenizer.add, tokens)) + detokenizer.rest()


def random_tokens(generator, tokens, most=24):
    """With a preference for a few, so that what rarely meets does."""
    favourites = generator.choices(tokens, k=5)
    return [
        generator.choice(favourites if generator.random() < 0.5 else tokens)
        for _ in range(generator.randint(0, most))
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_of_tokens_are_the_text_of_all(kind):
    tokenizer = TOKENIZERS[kind]()
    generator = random.Random(kind)
    vocabulary = [*range(len(tokenizer)), UNKNOWN_TOKEN]
    for _ in range(500):
        tokens = random_tokens(generator, vocabulary)
        cut = generator.randint(0, len(tokens))
        before, whole = at_once(tokenizer, tokens[:cut]), at_once(tokenizer, tokens)
        assert read(tokenizer, tokens) == whole
        assert read(tokenizer, tokens[cut:], tokens[:cut]) == beyond(before, whole), (tokens, cut)


def test_bytes_without_words_are_what_utf8_is():
    """Of the demo's real tokenizer, in tokens of one byte each."""
    tokenizer = load_tokenizer(str(DEMO_FOLDER))
    assert sorted(_byte_letters().values()) == LETTERS
    tokens = tokenizer.convert_tokens_to_ids([_byte_letters()[byte] for byte in range(256)])
    generator = random.Random(1)
    for _ in range(300):
        data = b"".join(generator.choices([*(letter.encode() for letter in CHARACTERS), *BROKEN], k=12))
        assert read(tokenizer, [tokens[byte] for byte in data]) == data.decode(errors="replace")


@pytest.mark.parametrize("strip", [True, False])
def test_byte_fallback_keeps_whole_characters(strip):
    tokenizer = byte_fallback(strip)
    generator = random.Random(2)
    others = [
        token for token in range(len(tokenizer)) if not BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token))
    ]
    parts = [[token] for token in [*others, *others, UNKNOWN_TOKEN]]
    parts += [byte_tokens(part) for part in [*CHARACTERS, *BROKEN]]
    agreed = 0
    for _ in range(1000):
        tokens = list(itertools.chain(*random_tokens(generator, parts, most=12)))
        cut = generator.randint(0, len(tokens))
        before, whole = (
            text.removeprefix(" ") if strip else text
            for text in (fallback_text(tokens[:cut]), fallback_text(tokens))
        )
        assert read(tokenizer, tokens) == whole
        assert read(tokenizer, tokens[cut:], tokens[:cut]) == beyond(before, whole), (tokens, cut)
        if "\ufffd" not in whole:
            agreed += 1
            assert whole == at_once(tokenizer, tokens)
    assert agreed > 100


def test_characters_in_tokens_of_an_unknown_kind_wait_for_their_end():
    tokenizer = byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]))
    letters = [_byte_letters()[byte] for byte in " é 🙂".encode()]
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.add(token) for token in tokenizer.convert_tokens_to_ids(letters)]
    assert texts == ["", "", "é", " ", "", "", "", "🙂"]


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, tokens, **settings):
        self.decoded += len(tokens)
        return self.tokenizer.decode(tokens, **settings)


@pytest.mark.parametrize("kind", [*TOKENIZERS, "byte fallback"])
def test_work_is_linear(kind):
    tokenizer = byte_fallback() if kind == "byte fallback" else TOKENIZERS[kind]()
    vocabulary = [*range(len(tokenizer)), UNKNOWN_TOKEN]
    runs = [[token] * 500 for token in random.Random(3).sample(vocabulary, 10)]
    for tokens in [random.Random(4).choices(vocabulary, k=500), *runs]:
        counting = Counting(tokenizer)
        detokenizer = Detokenizer(counting, tokens)
        for token in tokens:
            detokenizer.add(token)
            detokenizer.rest()
        assert counting.decoded <= 20 * len(tokens) + 100
