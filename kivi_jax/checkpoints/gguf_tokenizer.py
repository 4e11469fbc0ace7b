"""Tokenizers from the metadata of GGUF files, as Hugging Face tokenizers.

Files have a vocabulary, and for byte-level BPE its merges. How a text is cut into the words that are merged they only
name. The names are those of llama.cpp's llama-vocab.cpp, and what they stand for is in tokenizer.json of the models
that they come from. With another name texts would be tokenized wrongly, so such a tokenizer is left out.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from kivi_jax.checkpoints.gguf_file import GGUFModel, Kind, read_gguf
from kivi_jax.checkpoints.hf_files import CheckpointError

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
SPACE = "▁"  # SentencePiece's
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclasses.dataclass(frozen=True)
class Words:
    """How texts are cut into words, whose bytes are then merged.

    Attributes:
        pre_tokenizer: cuts words, and writes their bytes as characters.
        whole: whether a word that is a token stays whole, whatever merges would make of it.
        normalizer: what texts go through first.
        begins: whether texts begin with the beginning token where files don't say.
    """

    pre_tokenizer: pre_tokenizers.PreTokenizer
    whole: bool = False
    normalizer: normalizers.Normalizer | None = None
    begins: bool = False


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = Words(_cut(_CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST), whole=True, begins=True)
_QWEN2 = Words(_cut(_CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST), normalizer=normalizers.NFC())
_TEKKEN = Words(
    _cut(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    whole=True,
    begins=True,
)
_FALCON = Words(
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            _GPT2,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
)
_SMOLLM = Words(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]))
# By tokenizer.ggml.pre.
WORDS: Mapping[str, Words] = {
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "falcon": _FALCON,
    "smollm": _SMOLLM,
    "gpt-2": Words(_GPT2),
}


def has_tokenizer(model: GGUFModel) -> bool:
    """Whether texts can be tokenized. Warns if not, though the file has a tokenizer."""
    kind, name = _get(model, "model", str), _get(model, "pre", str)
    if kind is None or _get(model, "tokens", list) is None:
        return False
    if kind == SENTENCEPIECE or (kind == BYTE_LEVEL and name in WORDS):
        return True
    warnings.warn(
        f"{model.path}: the tokenizer {kind!r} with tokenizer.ggml.pre {name!r} is unknown, only {SENTENCEPIECE!r}, "
        f"and {BYTE_LEVEL!r} with {', '.join(WORDS)}; the model takes token ids, and no texts",
        stacklevel=5,
    )
    return False


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file that has one, as transformers' class for any tokenizer.

    Raises:
        CheckpointError: the file or its tokenizer is damaged.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import, and token-id prompts don't need it

    make: Any = PreTrainedTokenizerFast
    model = read_gguf(path)
    tokens: list[str] = _required(model, "tokens", list)
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens has tokens twice")
    kinds = _get(model, "token_type", np.ndarray)
    kinds = np.full(len(tokens), NORMAL) if kinds is None else kinds
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.token_type has {len(kinds)} types of {len(tokens)} tokens"
        )
    if _get(model, "model", str) == SENTENCEPIECE:
        tokenizer, begins = _sentencepiece(model, tokens, kinds), True
        defaults = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    else:
        words = WORDS[_required(model, "pre", str)]
        tokenizer, begins, defaults = _byte_level(model, tokens, words), words.begins, {}
    for special in (True, False):
        chosen = np.flatnonzero(np.isin(kinds, (UNKNOWN, CONTROL) if special else (USER_DEFINED,)))
        added = [AddedToken(tokens[token], normalized=False, special=special) for token in chosen]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    named = {name: _special_token(model, key, tokens, defaults) for name, key in SPECIAL_TOKENS.items()}
    tokenizer.post_processor = _frame(model, tokenizer, named, begins)
    return make(
        tokenizer_object=tokenizer,
        chat_template=_chat_templates(model),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(model: GGUFModel, tokens: Sequence[str], words: Words) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [_halves(merge) for merge in _required(model, "merges", list)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words.whole))
    if words.normalizer is not None:
        tokenizer.normalizer = words.normalizer
    tokenizer.pre_tokenizer = words.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _halves(merge: str) -> tuple[str, str]:
    end = merge.find(" ", 1)  # the first may begin with a space
    return merge[:end], merge[end + 1 :]


def _sentencepiece(model: GGUFModel, tokens: Sequence[str], kinds: np.ndarray) -> Tokenizer:
    """SentencePiece's BPE merges the neighbours that make the token with the highest score."""
    scores = _required(model, "scores", np.ndarray)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{model.path}: tokenizer.ggml.scores has {len(scores)} scores of {len(tokens)} tokens"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merged = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for token in merged:
        halves = [(token[:end], token[end:]) for end in range(1, len(token))]
        rank = -float(scores[vocabulary[token]])
        merges += [
            (rank, vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in merged and b in merged
        ]
    unknown = _special_token(model, "unknown_token_id", tokens, {"unknown_token_id": 0})
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(a, b) for *_, a, b in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _get(model, "add_space_prefix", bool)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    undone: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None or prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        undone.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undone)
    return tokenizer


def _frame(
    model: GGUFModel, tokenizer: Tokenizer, named: Mapping[str, str | None], begins: bool
) -> processors.TemplateProcessing:
    """What stands before and after a text that is no conversation."""
    added = {"bos_token": _get(model, "add_bos_token", bool), "eos_token": _get(model, "add_eos_token", bool)}
    added["bos_token"] = begins if added["bos_token"] is None else added["bos_token"]
    marks = {name: named[name] or "" for name, wanted in added.items() if wanted}
    if "" in marks.values():
        raise CheckpointError(
            f"{model.path}: texts should have {' and '.join(marks)}, which the file doesn't name"
        )
    before, after = ([marks[name]] if name in marks else [] for name in added)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in {*before, *after}],
    )


def _special_token(
    model: GGUFModel, key: str, tokens: Sequence[str], defaults: Mapping[str, int]
) -> str | None:
    token = _get(model, key, int)
    token = defaults.get(key) if token is None else token
    return tokens[token] if token is not None and 0 <= token < len(tokens) else None


def _chat_templates(model: GGUFModel) -> str | dict[str, str] | None:
    """The template, or several by their names."""
    default = model.get("tokenizer.chat_template", str)
    prefix = "tokenizer.chat_template."
    named = {
        key.removeprefix(prefix): model.get(key, str) for key in model.metadata if key.startswith(prefix)
    }
    if not named:
        return default
    return {
        name: template for name, template in {"default": default, **named}.items() if template is not None
    }


def _get(model: GGUFModel, name: str, kind: type[Kind]) -> Kind | None:
    return model.get(f"tokenizer.ggml.{name}", kind)


def _required(model: GGUFModel, name: str, kind: type[Kind]) -> Kind:
    value = _get(model, name, kind)
    if value is None:
        raise CheckpointError(f"{model.path} lacks tokenizer.ggml.{name}")
    return value
