"""The output file: what is kept of it when a job goes on, and what happens when it can't be written."""

import errno
import os
import subprocess
import sys

import pytest

from kivi_jax.batch import local_file
from kivi_jax.batch.local_file import SYNC_SECONDS, LocalFile

GOOD = [b'{"id": "a", "text": "x"}\n', b'{"id": "b", "text": "y"}\n']
ERROR = b'{"id": "c", "response": null, "error": {"code": "invalid_request", "message": "z"}}\n'


def reopened(path, **options):
    output = LocalFile(path, **options)
    output.begin()
    done = output.done
    output.close()
    return done


def test_results_are_appended(tmp_path):
    path = tmp_path / "new" / "folder" / "out.jsonl"
    output = LocalFile(path)
    assert not output.used
    output.begin()
    for line in GOOD:
        output.write(line)
        assert path.read_bytes().endswith(line)  # at once
    output.close()
    assert reopened(path) == {"a": False, "b": False}
    assert path.read_bytes() == b"".join(GOOD)


@pytest.mark.parametrize(
    "tail", [b'{"id": "c", "te', b'{"id": "c"}', b"\0" * 9, b'{"id": "c", "text"\n', b"\n"]
)
def test_torn_tail_is_cut(tmp_path, tail):
    path = tmp_path / "out.jsonl"
    path.write_bytes(GOOD[0] + tail)
    output = LocalFile(path)
    assert path.read_bytes() == GOOD[0] + tail  # until it begins
    output.begin()
    output.write(GOOD[1])
    output.close()
    assert path.read_bytes() == b"".join(GOOD)


def test_every_place_of_a_torn_line(tmp_path):
    path = tmp_path / "out.jsonl"
    for size in range(len(GOOD[1])):
        path.write_bytes(GOOD[0] + GOOD[1][:size])
        assert reopened(path) == {"a": False}
        assert path.read_bytes() == GOOD[0]


def test_damage_and_repetitions_in_the_middle_go(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"\0\0\n" + GOOD[0] + b'{"id"\n' + GOOD[1] + GOOD[0] + ERROR)
    assert reopened(path) == {"a": False, "b": False, "c": True}
    assert path.read_bytes() == b"".join([*GOOD, ERROR])
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_errors_are_done_again(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(GOOD[0] + ERROR + GOOD[1])
    assert reopened(path) == {"a": False, "b": False, "c": True}
    output = LocalFile(path, retry_errors=True)
    output.begin()
    output.write(b'{"id": "c"}\n')
    output.close()
    assert path.read_bytes() == b"".join([*GOOD, b'{"id": "c"}\n'])


def test_overwriting(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(GOOD[0])
    output = LocalFile(path, overwrite=True)
    assert (output.done, output.used) == ({}, True)
    assert path.read_bytes() == GOOD[0]
    output.begin()
    assert path.read_bytes() == b""
    output.close()


def test_one_job_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"\n" + GOOD[0])
    first = LocalFile(path)
    with pytest.raises(OSError, match=r"out\.jsonl can't be written: another job is writing it$"):
        LocalFile(path)
    first.begin()  # writes a new file, which is locked as well
    with pytest.raises(OSError, match="another job"):
        LocalFile(path)
    first.close()
    assert reopened(path) == {"a": False}


def test_files_only():
    with pytest.raises(OSError, match="/dev/full can't be written: it is neither a file nor a folder"):
        LocalFile(local_file.Path("/dev/full"))


def test_no_permission(tmp_path):
    """Also root has none where a folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/out\.jsonl can't be written: (Not a directory|File exists)$"):
        LocalFile(tmp_path / "file" / "out.jsonl")


def test_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    """The disk takes a part of a line, then nothing."""
    path = tmp_path / "out.jsonl"
    output = LocalFile(path)
    output.begin()
    output.write(GOOD[0])
    room, write = [5], os.write

    def fail(file, data):
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: room.pop()])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fail)
        with pytest.raises(
            OSError, match=r"out\.jsonl can't be written: No space left on device; every line"
        ):
            output.write(GOOD[1])
    assert path.read_bytes() == GOOD[0]
    output.write(GOOD[1])  # there is room again
    output.close()
    assert path.read_bytes() == b"".join(GOOD)


def test_full_device(tmp_path):
    output = LocalFile(tmp_path / "out.jsonl")
    output.begin()
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, output._file)
    os.close(device)
    with pytest.raises(OSError, match="No space left on device"):
        output.write(GOOD[0])
    output.close()


def test_full_disk_while_errors_are_taken_out(tmp_path):
    """What was there stays. A process of its own may not outgrow the file."""
    path = tmp_path / "out.jsonl"
    before = GOOD[0] + ERROR + b"".join(b'{"id": %d}\n' % number for number in range(100))
    path.write_bytes(before)
    program = (
        "import resource, sys, pathlib; resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY)); "
        "from kivi_jax.batch.local_file import LocalFile; "
        "LocalFile(pathlib.Path(sys.argv[1]), retry_errors=True).begin()"
    )
    ended = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert "out.jsonl can't be written: File too large; every line in it is whole" in ended.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_lines_are_synced_within_seconds(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(now[0]))
    output = LocalFile(tmp_path / "out.jsonl", clock=lambda: now[0])
    output.begin()
    output.tick()
    output.write(GOOD[0])
    for now[0] in (1.0, SYNC_SECONDS, SYNC_SECONDS + 1):
        output.tick()
    assert synced == [SYNC_SECONDS]  # once, as nothing was written since
    output.write(GOOD[1])
    output.close()
    assert synced == [SYNC_SECONDS, SYNC_SECONDS + 1]
