"""Decodes token ids to text, one token at a time. Text that was given never changes.

Decoding everything so far again for each token takes quadratic time, and its result changes in the middle: an
incomplete character turns a whole run of byte tokens into U+FFFD. `tokenizers.decoders.DecodeStream` decodes such runs
the same way, and raises an error where invalid bytes end one. So bytes are assembled to characters here. All other text
is left to the tokenizer, which decodes each token after the one before it.
"""

import codecs
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

# A completion is decoded after this many of its prompt's last tokens. They cover what its text can depend on: the
# beginning of a character, at most three bytes, and a token before it, since tokenizers may strip a text's first space.
CONTEXT_TOKENS = 8

CHARACTER_BYTES = 4  # most bytes of a character in UTF-8, so most tokens until it is complete
REPLACEMENT = "\ufffd"  # in place of bytes that form no character


class Detokenizer:
    """Decodes the tokens that follow a prompt.

    Text is returned once it can't change any more, so an incomplete character at the end is held back. All texts
    together are what the tokenizer decodes the prompt and these tokens to, without the prompt's own text. The exception
    are byte tokens (byte fallback) that don't form characters: complete characters among them are kept and every other
    byte becomes U+FFFD, as in SentencePiece, while `tokenizers` drops all characters of such a run. A character that
    begins in the prompt belongs to the text that follows.

    Args:
        tokenizer: of transformers.
        context: the prompt's tokens; empty if a new text follows.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        vocabulary = _read_vocabulary(tokenizer)
        self._text: _Bytes | _Pieces = _Bytes(vocabulary) if vocabulary.is_byte_level else _Pieces(vocabulary)
        shown = (token for token in reversed(context) if not vocabulary.is_silent(token))
        for token in reversed(list(itertools.islice(shown, CONTEXT_TOKENS))):
            self._text.add(token)
        self._half_before = self._text.rest()

    def add(self, token: int) -> str:
        """The text that this token makes final."""
        text = self._text.add(token)
        if text:
            # If what follows doesn't complete the prompt's last character, its U+FFFD belongs to the prompt's text.
            text, self._half_before = text.removeprefix(self._half_before), ""
        return text

    def rest(self) -> str:
        """The text of an incomplete character at the end if no token follows: U+FFFD."""
        return self._text.rest().removeprefix(self._half_before)


class _Vocabulary:
    """How a tokenizer decodes its tokens.

    Attributes:
        is_byte_level: whether all tokens are bytes of UTF-8, as in byte-level BPE.
        fallback: the byte of each token that stands for one, in vocabularies of pieces of text (byte fallback).
        letter_a: the token for the byte "A", if there are such tokens.
        is_silent: whether a token adds no text; special and unknown tokens don't.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        # Tested by decoding, since the same decoders occur under other names and in other compositions.
        probe = " é "
        letters = [_byte_letters()[byte] for byte in probe.encode()]
        self.is_byte_level = decoder is not None and decoder.decode(letters) == probe
        self.fallback: dict[int, int] = {}
        tokens = tokenizer.get_vocab()
        if "<0x41>" in tokens and self.decode([tokens["<0x41>"]]) == "A":
            self.letter_a = tokens["<0x41>"]
            self.fallback = {
                token: int(piece[3:5], 16)
                for piece, token in tokens.items()
                if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece)
            }
        # Decoded twice in a row, since a text's first token may lose its space and be empty.
        self.is_silent = functools.cache(lambda token: not self.decode([token, token]))
        self.byte_level = functools.cache(self._byte_level)

    def decode(self, tokens: list[int]) -> str:
        # The clean-up is meant for words split by spaces, and would remove spaces that were already given.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _byte_level(self, token: int) -> bytes:
        """A token's bytes. An added token that is not spelled in byte letters has the bytes of its text."""
        if self.is_silent(token):
            return b""
        piece: str = self._tokenizer.convert_ids_to_tokens(token)
        letters = _letter_bytes()
        return bytes(letters[letter] for letter in piece) if letters.keys() >= set(piece) else piece.encode()


@functools.lru_cache(maxsize=8)
def _read_vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)


@functools.cache
def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies write for each byte: its Latin-1 character if that is visible, and else
    the next one from U+0100 on."""
    visible = {byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()}
    others = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _letter_bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _byte_letters().items()}


class _Bytes:
    """Decodes tokens that consist of bytes."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._utf8.decode(self._vocabulary.byte_level(token))

    def rest(self) -> str:
        return self._utf8.getstate()[0].decode(errors="replace")


class _Pieces:
    """Decodes tokens that are pieces of text or single bytes."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # a surrogate per invalid byte
        self._before: list[int] = []  # the last tokens that gave text
        self._waiting: list[int] = []  # tokens that may be an incomplete character

    def add(self, token: int) -> str:
        if token in self._vocabulary.fallback:
            return self._add_bytes([token])
        if self._vocabulary.is_silent(token):
            return ""
        if self._vocabulary.fallback:
            return self._add_bytes([], final=True) + self._show([token])
        # Only decoding tells whether tokens of other kinds end within a character.
        self._waiting.append(token)
        if len(self._waiting) < CHARACTER_BYTES and self._decode(self._waiting).endswith(REPLACEMENT):
            return ""
        tokens, self._waiting = self._waiting, []
        return self._show(tokens)

    def rest(self) -> str:
        return REPLACEMENT * len(self._waiting) if self._vocabulary.fallback else self._decode(self._waiting)

    def _add_bytes(self, tokens: list[int], final: bool = False) -> str:
        """The text of the characters that are complete now and, if `final`, of the bytes that are left."""
        self._waiting += tokens
        text = ""
        for character in self._utf8.decode(
            bytes(self._vocabulary.fallback[token] for token in tokens), final
        ):
            if "\udc80" <= character <= "\udcff":
                del self._waiting[0]
                text += REPLACEMENT
                # What follows is decoded after a complete character, since bytes don't decode after invalid ones.
                self._before = [self._vocabulary.letter_a]
            else:
                size = len(character.encode())
                text += self._show(self._waiting[:size])
                del self._waiting[:size]
        return text

    def _show(self, tokens: list[int]) -> str:
        text = self._decode(tokens)
        # A text's first token may lose its space and be empty. The token after it then keeps its own space.
        self._before = tokens if text else self._before + tokens
        return text

    def _decode(self, tokens: list[int]) -> str:
        """What these tokens add to the text."""
        if not tokens:
            return ""
        return self._vocabulary.decode(self._before + tokens)[len(self._vocabulary.decode(self._before)) :]
