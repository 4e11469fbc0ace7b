"""Training text of the demo model: the standard library's text, and synthetic long-range recall."""

import ast
import dataclasses
import hashlib
import inspect
import operator
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
PASSKEY_DIGITS = 5
QUESTION = "What is the pass key? The pass key is"
# Generated tables, other programs' trees and build records: text, but none a reader would recognise.
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "turtledemo", "pydoc_data")
# fmt: off
NAMES = (
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack",
    "Karen", "Leo", "Maria", "Nora", "Oscar", "Paul", "Quinn", "Rosa", "Sam", "Tina",
    "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe", "Anna", "Boris", "Clara", "Derek",
    "Elena", "Felix", "Gina", "Hugo", "Ida", "Jonas", "Kira", "Liam", "Mona", "Nils",
)
# fmt: on
# Weight in the loss of a digit that is to be recalled: few per row, and all that the pass key task is about.
RECALL_WEIGHT = 8.0


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts of one kind, split by document into training and held-out ones."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def split(cls, texts: dict[str, str]) -> "Documents":
        train, held_out = [], []
        for name, text in sorted(texts.items()):
            bucket = hashlib.sha256(name.encode()).digest()[0]
            (held_out if bucket < 12 else train).append(text)
        return cls(tuple(train), tuple(held_out))


def library_sources() -> dict[str, str]:
    """Module path -> source of the running Python's standard library, duplicates removed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources, seen = {}, set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if set(parts) & set(SKIPPED) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) > 200 and digest not in seen:
            seen.add(digest)
            sources["/".join(parts)] = text.expandtabs(8)
    return sources


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, one paragraph each."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in dict.fromkeys(found) if text and len(text) > 40)


def load_documents() -> dict[str, Documents]:
    """Code (sources) and prose (the reference topics of `help()`, and docstrings).

    A module's docstrings are held out together with its source.
    """
    sources = library_sources()
    prose = {name: text for name in sources if (text := docstrings(sources[name]))}
    prose |= {f"topics/{name}": inspect.cleandoc(text) for name, text in topics.items()}
    return {"code": Documents.split(sources), "prose": Documents.split(prose)}


def train_tokenizer(documents: dict[str, Documents], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own; `<|bos|>` is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for kind in documents.values() for text in kind.train), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams, documents separated by `<|eos|>`."""

    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    @classmethod
    def build(cls, tokenizer: Tokenizer, documents: dict[str, Documents]) -> "Corpus":
        eos = np.asarray([tokenizer.token_to_id(EOS)], np.int32)

        def stream(texts: tuple[str, ...]) -> np.ndarray:
            encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return np.concatenate([part for e in encoded for part in (np.asarray(e.ids, np.int32), eos)])

        return cls(
            tokenizer,
            {kind: stream(d.train) for kind, d in documents.items()},
            {kind: stream(d.held_out) for kind, d in documents.items()},
        )

    @property
    def bos(self) -> int:
        return self.tokenizer.token_to_id(BOS)

    def window(self, rng: np.random.Generator, length: int, *, held_out: bool = False) -> np.ndarray:
        streams = self.held_out if held_out else self.train
        stream = streams["prose" if rng.random() < 0.4 else "code"]
        start = rng.integers(0, len(stream) - length)
        return stream[start : start + length]


def passkey_prompt(
    corpus: Corpus, context: int, depth: float, seed: int, *, held_out: bool = True
) -> tuple[str, str]:
    """A prompt of at most `context` tokens (with `<|bos|>`) and the continuation that answers it.

    The pass key stands after the fraction `depth` of the filler, at the start of a line.
    """
    rng = np.random.default_rng([seed, context])
    key = "".join(str(digit) for digit in rng.integers(0, 10, PASSKEY_DIGITS))
    fact, question = f"\nThe pass key is {key}. Remember it.\n", f"\n{QUESTION}"
    decode = corpus.tokenizer.decode
    size = context - 1 - len(encode(corpus.tokenizer, fact)) - len(encode(corpus.tokenizer, question))
    filler = corpus.window(rng, size, held_out=held_out)
    while True:
        # Cutting text at a token and encoding it again can give another few tokens.
        cut = round(depth * len(filler))
        text = decode(filler[:cut].tolist()) + fact + decode(filler[cut:].tolist()) + question
        excess = len(encode(corpus.tokenizer, text)) + 1 - context
        if excess <= 0:
            return text, f" {key}."
        filler = filler[:-excess]


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens, each one's weight in the loss and its position."""

    tokens: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowSampler:
    """Draws training rows of a mixture that depends on their length alone."""

    corpus: Corpus
    max_positions: int

    def batch(self, seed: int, step: int, rows: int, length: int) -> Row:
        """Rows stacked. Seed and step alone decide them, so that a resumed run sees what an unbroken one would."""
        drawn = [self.row(np.random.default_rng([seed, step, row]), length) for row in range(rows)]
        fields = [field.name for field in dataclasses.fields(Row)]
        return Row(*(np.stack([getattr(row, name) for row in drawn]) for name in fields))

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """`length` inputs and the target of the last one."""
        shares = [0.4, 0.2, 0.4] if length <= 256 else [0.45, 0.05, 0.5]
        kind = rng.choice(["text", "repeat", "recall"], p=shares)
        positions = np.arange(length + 1, dtype=np.int32)
        if kind == "text":
            pieces = [(self.corpus.window(rng, length), 1.0)]
        else:
            pieces = list(getattr(self, f"{kind}_pieces")(rng, length))
            if rng.random() < 0.5:
                # Far-apart positions in a short row teach long range cheaply (PoSE, Zhu et al. 2023).
                cut = rng.integers(1, length)
                positions[cut:] += rng.integers(0, max(0, self.max_positions - length) + 1)
        bos = (np.asarray([self.corpus.bos], np.int32), 0.0)
        tokens = np.concatenate([ids for ids, _ in [bos, *pieces]])[: length + 1]
        weights = np.concatenate([np.broadcast_to(w, ids.shape) for ids, w in [bos, *pieces]])[: length + 1]
        return Row(tokens, weights.astype(np.float32), positions)

    def repeat_pieces(self, rng: np.random.Generator, length: int) -> Iterator[tuple[np.ndarray, float]]:
        """Segments of random tokens, or of digits, that come again after some text."""
        filled = 0
        while filled < length:
            size = rng.integers(4, 40)
            if rng.random() < 0.3:
                digits = encode(self.corpus.tokenizer, "0123456789")
                segment = rng.choice(digits, size)
            else:
                segment = rng.integers(0, self.corpus.tokenizer.get_vocab_size(), size).astype(np.int32)
            gap = self.corpus.window(rng, int(rng.integers(0, max(32, length // 4))))
            yield segment, 0.0
            yield gap, 1.0
            yield segment, 1.0
            filled += 2 * len(segment) + len(gap)

    def recall_pieces(
        self, rng: np.random.Generator, length: int
    ) -> Iterator[tuple[np.ndarray, float | np.ndarray]]:
        """Pass keys among real text, asked for later: some at the end, some in between."""
        owners: list[str | None] = list(rng.choice(NAMES, rng.integers(0, 5), replace=False))
        if not owners or rng.random() < 0.7:
            owners.insert(rng.integers(0, len(owners) + 1), None)
        placed: list[tuple[float, np.ndarray, float | np.ndarray]] = []
        for owner in owners:
            subject = "The pass key" if owner is None else f"The pass key for {owner}"
            key = "".join(str(digit) for digit in rng.integers(0, 10, PASSKEY_DIGITS))
            fact = encode(self.corpus.tokenizer, f"\n{subject} is {key}. Remember it.\n")
            question = encode(self.corpus.tokenizer, f"\nWhat is the{subject[3:]}? {subject} is")
            answer = encode(self.corpus.tokenizer, f" {key}.\n")
            told = rng.random()
            asked = rng.uniform(told, 1.0) if rng.random() < 0.4 else 1.0 + rng.random()
            # Nothing but the answer follows from the text before, so nothing else is to be learnt.
            weights = np.concatenate([np.zeros(len(question)), self._answer_weights(answer)])
            placed.append((told, fact, 0.0))
            placed.append((asked, np.concatenate([question, answer]), weights))
        placed.sort(key=operator.itemgetter(0))
        filler = self.corpus.window(rng, max(0, length - sum(len(ids) for _, ids, _ in placed)))
        done = 0
        for depth, ids, weights in placed:
            until = round(min(depth, 1.0) * len(filler))
            yield filler[done:until], 1.0
            yield ids, weights
            done = until
        yield filler[done:], 1.0

    def _answer_weights(self, ids: np.ndarray) -> np.ndarray:
        digits = encode(self.corpus.tokenizer, "0123456789")
        return np.where(np.isin(ids, digits), RECALL_WEIGHT, 1.0)


def python_version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])
