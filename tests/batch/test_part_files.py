"""The output folder, a local one through the same interface as a bucket."""

import os
import re

import pytest
from etils import epath

from kivi_jax.batch import part_files
from kivi_jax.batch.part_files import PART_SECONDS, PartFiles

ERROR = b'{"id": "c", "response": null, "error": {"code": "invalid_request", "message": "z"}}\n'


def line(name):
    return f'{{"id": "{name}"}}\n'.encode()


def parts(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, *lines, **options):
    output = PartFiles(epath.Path(folder), **options)
    output.begin()
    for data in lines:
        output.write(data)
    output.close()
    return output


def test_parts_hold_so_many_results(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "PART_RESULTS", 2)
    written(tmp_path / "out", line("a"), line("b"), line("c"), process=3)
    assert parts(tmp_path / "out") == {
        "part-00003-000000.jsonl": line("a") + line("b"),
        "part-00003-000001.jsonl": line("c"),
    }


def test_parts_are_written_within_a_minute(tmp_path):
    now = [0.0]
    output = PartFiles(epath.Path(tmp_path), clock=lambda: now[0])
    output.begin()
    now[0] = 1000.0
    output.write(line("a"))
    now[0] += PART_SECONDS - 1
    output.tick()
    assert not parts(tmp_path)
    now[0] += 1
    output.tick()
    output.tick()
    assert parts(tmp_path) == {"part-00000-000000.jsonl": line("a")}


def test_shards_share_a_folder(tmp_path):
    written(tmp_path, line("a"), process=0)
    written(tmp_path, line("b"), process=1)
    output = written(tmp_path, line("d"), process=0)
    assert output.done == {"a": False, "b": False}
    assert parts(tmp_path)["part-00000-000001.jsonl"] == line("d")
    assert len(parts(tmp_path)) == 3


def test_other_files_and_unfinished_ones_are_left_out(tmp_path):
    for name in (".part-00000-000000.jsonl.incomplete", "run.json", "part-1.jsonl"):
        (tmp_path / name).write_bytes(line("a"))
    output = PartFiles(epath.Path(tmp_path))
    assert (output.done, output.used) == ({}, False)


def test_errors_are_done_again_in_parts_of_ones_own(tmp_path):
    written(tmp_path, line("a"), ERROR, process=0)
    written(tmp_path, ERROR.replace(b'"c"', b'"d"'), process=1)
    assert written(tmp_path, process=1).done == {"a": False, "c": True, "d": True}
    output = written(tmp_path, line("c"), process=0, retry_errors=True)
    assert output.done == {"a": False, "d": True}
    assert parts(tmp_path)["part-00000-000000.jsonl"] == line("a")
    assert parts(tmp_path)["part-00000-000001.jsonl"] == line("c")
    written(tmp_path, process=1, retry_errors=True)  # nothing is left of its part
    assert len(parts(tmp_path)) == 2


def test_damaged_lines_are_done_again(tmp_path):
    (tmp_path / "part-00000-000004.jsonl").write_bytes(line("a") + b'{"id": "b"')
    output = written(tmp_path, line("b"))
    assert output.done == {"a": False}
    assert parts(tmp_path) == {
        "part-00000-000004.jsonl": line("a"),
        "part-00000-000005.jsonl": line("b"),
    }


def test_overwriting(tmp_path):
    written(tmp_path, line("a"))
    output = PartFiles(epath.Path(tmp_path), overwrite=True)
    assert (output.done, output.used, len(parts(tmp_path))) == ({}, True, 1)
    output.begin()
    assert not parts(tmp_path)


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    output = PartFiles(epath.Path(tmp_path))
    output.begin()
    output.write(line("a"))

    def fail(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        expected = re.escape("part-00000-000000.jsonl can't be written: No space left on device; every part")
        with pytest.raises(OSError, match=expected):
            output.close()
    assert not os.listdir(tmp_path)
    output.close()  # there is room again
    assert parts(tmp_path) == {"part-00000-000000.jsonl": line("a")}


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file can't be written: File exists$"):
        PartFiles(epath.Path(tmp_path / "file"))
