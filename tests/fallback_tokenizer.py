"""A small tokenizer like Llama 2's: pieces of text, and a token for every byte."""

import itertools
import re

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

BYTE = re.compile("<0x[0-9A-F]{2}>")
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁a.é",
    "▁▁",
    "▁the",
    "the",
    "\ufffd",
]


def byte_fallback(strip: bool = True) -> PreTrainedTokenizerFast:
    """With `strip`, a text begins without its first space."""
    vocabulary = {piece: token for token, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(PIECES[:3])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_tokens(data: str | bytes) -> list[int]:
    """A token for each byte, as `byte_fallback` has them."""
    return [3 + byte for byte in (data.encode() if isinstance(data, str) else data)]


def fallback_text(tokens: list[int]) -> str:
    """The text of tokens by SentencePiece's rules, before a first space is stripped: of bytes, what is whole is a
    character, and every other byte a U+FFFD."""
    pieces = [PIECES[token] for token in tokens if 3 <= token < len(PIECES)]
    text = ""
    for is_byte, run in itertools.groupby(pieces, lambda piece: bool(BYTE.fullmatch(piece))):
        if is_byte:
            data = bytes(int(piece[3:5], 16) for piece in run)
            text += re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))
        else:
            text += "".join(run).replace("▁", " ")
    return text


def beyond(before: str, whole: str) -> str:
    """What `whole` has after the prompt's text, whose last character may be whole only there."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(same)) :]
