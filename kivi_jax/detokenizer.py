"""Token ids to text, one token at a time: final as it comes, in the end what decoding all at once gives.

Decoding the text so far again for every token is quadratic, and the beginning of what it gives changes: half a
character turns a whole run of byte tokens into U+FFFD. `tokenizers.decoders.DecodeStream` decodes such runs in the same
way and raises an error where broken bytes end one. So bytes are put together here. All other text is left to the
tokenizer, which decodes each token after the one before it.
"""

import codecs
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

# The last tokens of a prompt that a completion is decoded after. They hold what its text can depend on: the beginning
# of a character, which is at most three bytes, and a token before it, since tokenizers may strip a text's first space.
CONTEXT_TOKENS = 8

CHARACTER_BYTES = 4  # most bytes of a character in UTF-8, so most tokens that half a character waits for
REPLACEMENT = "\ufffd"  # in place of bytes that are no character


class Detokenizer:
    """Reads the tokens that follow a prompt.

    A token's text is given once it can't change any more, so half a character at the end is not. Together the texts are
    what the tokenizer makes of all tokens beyond what it makes of the prompt. Only where byte tokens (byte fallback)
    don't form characters, the whole ones among them are kept and every other byte is a U+FFFD, as SentencePiece has it;
    `tokenizers` gives up all characters of such a run. A character that begins in the prompt belongs to what follows.

    Args:
        tokenizer: from transformers.
        context: the prompt's tokens; empty if a text of its own follows.
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
            # If what follows doesn't complete the prompt's last character, it is the prompt's text that shows it.
            text, self._half_before = text.removeprefix(self._half_before), ""
        return text

    def rest(self) -> str:
        """How half a character at the end reads if no token follows: as U+FFFD."""
        return self._text.rest().removeprefix(self._half_before)


class _Vocabulary:
    """What a tokenizer makes of its tokens.

    Attributes:
        is_byte_level: whether all tokens are bytes of UTF-8, as in byte-level BPE.
        fallback: the bytes of the tokens that stand for one, in vocabularies of pieces of text.
        letter_a: the one for "A", where there are any.
        is_silent: whether a token shows in no text, as special and unknown ones.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        # Asked instead of looked up, so that other names and compositions of the same decoders count, too.
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
        # Twice, since a text's first token may lose its space and be empty.
        self.is_silent = functools.cache(lambda token: not self.decode([token, token]))
        self.byte_level = functools.cache(self._byte_level)

    def decode(self, tokens: list[int]) -> str:
        # The clean-up is meant for texts of words split by spaces, and takes back spaces that were shown.
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _byte_level(self, token: int) -> bytes:
        """A token's bytes; an added token's are those of its text unless it is spelled in the letters for bytes."""
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
    """The letter that byte-level vocabularies write for each byte: what is visible in Latin-1 as it is, for the other
    bytes the letters from U+0100 on."""
    visible = {byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()}
    others = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _letter_bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _byte_letters().items()}


class _Bytes:
    """The text of tokens that are all bytes."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._utf8.decode(self._vocabulary.byte_level(token))

    def rest(self) -> str:
        return self._utf8.getstate()[0].decode(errors="replace")


class _Pieces:
    """The text of tokens that are pieces of it, or single bytes."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # each broken byte is a letter
        self._before: list[int] = []  # the tokens that were last to show
        self._waiting: list[int] = []  # those that may be half a character

    def add(self, token: int) -> str:
        if token in self._vocabulary.fallback:
            return self._add_bytes([token])
        if self._vocabulary.is_silent(token):
            return ""
        if self._vocabulary.fallback:
            return self._add_bytes([], final=True) + self._show([token])
        # Nothing is known of where characters begin in tokens of other kinds, but by how they decode.
        self._waiting.append(token)
        if len(self._waiting) < CHARACTER_BYTES and self._decode(self._waiting).endswith(REPLACEMENT):
            return ""
        tokens, self._waiting = self._waiting, []
        return self._show(tokens)

    def rest(self) -> str:
        return REPLACEMENT * len(self._waiting) if self._vocabulary.fallback else self._decode(self._waiting)

    def _add_bytes(self, tokens: list[int], final: bool = False) -> str:
        """The text of the characters that are whole now; if `final`, also of what is left."""
        self._waiting += tokens
        text = ""
        for character in self._utf8.decode(
            bytes(self._vocabulary.fallback[token] for token in tokens), final
        ):
            if "\udc80" <= character <= "\udcff":
                del self._waiting[0]
                text += REPLACEMENT
                # What follows is decoded after some whole character, since bytes don't decode after broken ones.
                self._before = [self._vocabulary.letter_a]
            else:
                size = len(character.encode())
                text += self._show(self._waiting[:size])
                del self._waiting[:size]
        return text

    def _show(self, tokens: list[int]) -> str:
        text = self._decode(tokens)
        # A text's first token may be empty, without the space it has elsewhere; the one after it keeps its own.
        self._before = tokens if text else self._before + tokens
        return text

    def _decode(self, tokens: list[int]) -> str:
        """What these tokens add to the text."""
        if not tokens:
            return ""
        return self._vocabulary.decode(self._before + tokens)[len(self._vocabulary.decode(self._before)) :]
