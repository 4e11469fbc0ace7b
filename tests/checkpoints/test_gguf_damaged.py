"""Damaged and hostile GGUF files: each loads as it should or is refused with one error, in little time and memory."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import kivi_jax
from kivi_jax import CheckpointError
from kivi_jax.checkpoints.gguf_file import read_gguf
from tests.tiny_checkpoint import TINY, random_tensors
from tools.tiny_gguf import write_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [chr(33 + number) for number in range(TINY["vocab_size"] - 1)] + ['!"'],
    "tokenizer.ggml.token_type": [1] * (TINY["vocab_size"] - 1) + [3],
    "tokenizer.ggml.merges": ['! "'],
    "tokenizer.ggml.eos_token_id": 100,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
# Of every kind of value.
VALUES = {"test.int": 7, "test.float": 0.5, "test.bool": True, "test.text": "é", "test.floats": [0.5, 1.5]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    types = {"token_embd": Type.F16, "ffn_down": Type.F32, "ffn": Type.BF16}
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write_gguf(path, TINY, random_tensors(TINY), types, TOKENIZER | VALUES)


class Places:
    """Where the structures of a file begin: found here without the library's reader."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 4
        self.lengths, self.kinds, self.axes, self.offsets, self.boundaries = [], [], [], [], []
        self._number("<I")
        self.counts = [self.at, self.at + 8]
        tensors, fields = self._number("<Q"), self._number("<Q")
        for _ in range(fields):
            self._text()
            self._value(self._kind())
        for _ in range(tensors):
            self._text()
            self.axes.append(self.at)
            axes = self._number("<I")
            self.lengths += [self.at + 8 * axis for axis in range(axes)]
            self.at += 8 * axes
            self._kind()
            self.offsets.append(self.at)
            self._number("<Q")
        self.end = self.at

    def _number(self, kind: str) -> int:
        self.boundaries.append(self.at)
        (number,) = struct.unpack_from(kind, self.content, self.at)
        self.at += struct.calcsize(kind)
        return number

    def _kind(self) -> int:
        self.kinds.append(self.at)
        return self._number("<I")

    def _text(self) -> None:
        self.lengths.append(self.at)
        length = self._number("<Q")
        self.at += length

    def _value(self, kind: int) -> None:
        if kind == 8:
            self._text()
        elif kind == 9:
            kind = self._kind()
            self.lengths.append(self.at)
            for _ in range(self._number("<Q")):
                self._value(kind)
        else:
            self.at += [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind]


def mutations(content: bytes) -> list[tuple[str, bytes]]:
    """Damaged copies of a file, and what was done to each."""
    places = Places(content)
    random = np.random.default_rng(0)
    mutated = []

    def put(what: str, at: int, kind: str, value: int) -> None:
        changed = bytearray(content)
        struct.pack_into(kind, changed, at, value)
        mutated.append((f"{what} at {at}: {value}", bytes(changed)))

    for at in random.choice(places.boundaries, 60, replace=False):
        mutated.append((f"cut at {at}", content[:at]))
    for at in (0, 3, places.end, places.end + 1, len(content) // 2, len(content) - 1):
        mutated.append((f"cut at {at}", content[:at]))
    for at in places.counts:
        for value in (0, 1, 2**31, 2**40, 2**64 - 1):
            put("count", at, "<Q", value)
    for at in random.choice(places.lengths, 30, replace=False):
        for value in (0, 2**31, 2**63, 2**64 - 1):
            put("length", at, "<Q", value)
    for at in random.choice(places.kinds, 30, replace=False):
        for value in (random.integers(13), 8, 9, 2**32 - 1):
            put("type", at, "<I", int(value))
    for at in random.choice(places.axes, 4, replace=False):
        for value in (0, 3, 5, 2**32 - 1):
            put("axes", at, "<I", value)
    for at in random.choice(places.offsets, 8, replace=False):
        for value in (1, 2**20, 2**64 - 32):
            put("offset", at, "<Q", value)
    for _ in range(150):
        at, bit = int(random.integers(places.end)), int(random.integers(8))
        put("bit", at, "<B", content[at] ^ (1 << bit))
    return mutated


# Loads every file of a folder, and prints what came of each. It has a minute of its processor, and little memory beyond
# what it begins with.
LOAD_ALL = """
import json, resource, sys, warnings
from pathlib import Path
import kivi_jax
from kivi_jax.text import load_tokenizer

warnings.simplefilter("ignore")
files = sorted(Path(sys.argv[1]).glob("*.gguf"))
kivi_jax.load(files[0], "float32")
load_tokenizer(str(files[0])).encode("a")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 120
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
outcomes = {}
for file in files:
    try:
        params = kivi_jax.load(file, "float32")
        tokenizer = "none"
        if params.tokenizer:
            try:
                load_tokenizer(params.tokenizer).encode("a")
                tokenizer = "read"
            except ValueError as error:
                tokenizer = str(error)
        outcomes[file.stem] = ["loaded", tokenizer]
    except ValueError as error:
        outcomes[file.stem] = [type(error).__name__, str(error)]
print(json.dumps(outcomes))
"""


def test_damaged_files_are_refused_or_harmless(whole, tmp_path):
    mutated = mutations(whole.read_bytes())
    assert len(mutated) >= 200
    for number, (_, content) in enumerate([("whole", whole.read_bytes()), *mutated]):
        (tmp_path / f"{number:04}.gguf").write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert len(outcomes) == len(mutated) + 1
    assert outcomes.pop("0000") == ["loaded", "read"]
    for (what, _), (outcome, message) in zip(mutated, outcomes.values(), strict=True):
        assert outcome in ("loaded", "CheckpointError"), (what, outcome, message)
        if outcome == "loaded":
            assert not what.startswith(("cut", "count", "offset")), what
        else:
            assert str(tmp_path) in message, (what, message)
            assert len(message) < 1500, (what, message)
    refused = [outcome for outcome, _ in outcomes.values() if outcome != "loaded"]
    assert len(refused) > len(mutated) / 2


def changed(whole, tmp_path, at, kind, value):
    content = bytearray(whole.read_bytes())
    struct.pack_into(kind, content, at, value)
    file = tmp_path / "changed.gguf"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("at", "kind", "value", "problem"),
    [
        (0, "<I", 1, r"is not a GGUF file: it begins with b'\x01"),
        (4, "<I", 1, r"has version 1 of GGUF, only 2 and 3 are supported$"),
        (4, ">I", 3, r"or its bytes are in big-endian order"),
        (16, "<Q", 2**64 - 1, r"damaged or cut short: .* would go beyond its end"),
        (24, "<Q", 2**40, r"damaged or cut short: 1099511627776 bytes from byte 32 on"),
    ],
)
def test_what_the_header_must_have(whole, tmp_path, at, kind, value, problem):
    with pytest.raises(CheckpointError, match=problem.replace("\\x", r"\\x")):
        kivi_jax.load(changed(whole, tmp_path, at, kind, value))


def test_tensors_must_lie_in_the_file_and_apart(whole, tmp_path):
    places = Places(whole.read_bytes())
    first, second = places.offsets[:2]
    for at, value, problem in (
        (second, 0, "begins within another tensor or its padding"),
        (second, 2**40 + 1, "begins within another tensor or its padding"),
        (first, 2**40, r"ends at byte 10995\d+, and the file at \d+"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            kivi_jax.load(changed(whole, tmp_path, at, "<Q", value))


def test_keys_come_once_and_in_utf8(whole, tmp_path):
    content = whole.read_bytes()
    for new, problem in ((b"test.bool", r"has test\.bool twice"), (b"test.fl\xff\xff", r"is not UTF-8")):
        (tmp_path / "m.gguf").write_bytes(
            content.replace(b"test.floa" if len(new) < 9 else b"test.text", new, 1)
        )
        with pytest.raises(CheckpointError, match=problem):
            kivi_jax.load(tmp_path / "m.gguf")


def test_every_kind_of_value_is_read(whole):
    metadata = read_gguf(whole).metadata
    assert {key: metadata[key] for key in VALUES if key != "test.floats"} == {
        key: value for key, value in VALUES.items() if key != "test.floats"
    }
    np.testing.assert_array_equal(metadata["test.floats"], VALUES["test.floats"])
    assert metadata["tokenizer.ggml.tokens"] == TOKENIZER["tokenizer.ggml.tokens"]


def test_a_file_that_shrinks_after_its_header_was_read(whole, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.read_bytes())
    tensor = read_gguf(file).tensors[-1]
    file.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is cut short: .* is not all there"):
        tensor.read((slice(None),) * len(tensor.shape), np.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        tensor.read((slice(None),) * len(tensor.shape), np.float32)
