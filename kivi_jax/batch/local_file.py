"""Results in a local file: each line is appended by one write, so that a killed job leaves at most a torn last one."""

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kivi_jax.batch.files import told
from kivi_jax.batch.results import read_result

SYNC_SECONDS = 5.0
GOES_ON = "; every line in it is whole, and the same command goes on from there"


def judge_lines(
    lines: Iterable[bytes], done: dict[str, bool], retry_errors: bool
) -> Iterator[tuple[bytes, bool]]:
    """Lines of an output, and whether each stays: whole, the first of its id, and no error that is to be done again.

    Adds to `done` the ids that stay, and whether they failed.
    """
    for line in lines:
        result = read_result(line)
        stays = result is not None and result.key not in done and not (retry_errors and result.failed)
        if result is not None and stays:
            done[result.key] = result.failed
        yield line, stays


class LocalFile:
    """The output file. It is changed only from `begin` on, and locked against other jobs until `close`.

    Args:
        path: the file; made if need be, with its folder.
        overwrite: begin with nothing.
        retry_errors: take error lines out, to do them again.

    Attributes:
        done: ids that have a result, and whether it is an error.
        used: whether the file has something in it.

    Raises:
        OSError: the file can't be read and written, or another job writes it.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        retry_errors: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.done, self._retry_errors, self._clock = path, dict[str, bool](), retry_errors, clock
        with told(f"{path} can't be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            try:
                self.used = os.fstat(self._file).st_size > 0
                self._end = self._kept = (
                    0  # where the last line that stays ends, and the bytes of those that do
                )
                if not overwrite:
                    self._read()
            except BaseException:
                os.close(self._file)
                raise
        self._synced: float | None = None  # when; None if nothing was written since

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError("it is neither a file nor a folder")
            _lock(file)
            if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                raise OSError("another job is writing it")
        except BaseException:
            os.close(file)
            raise
        return file

    def _read(self) -> None:
        position = 0
        with self.path.open("rb") as lines:
            for line, stays in judge_lines(lines, self.done, self._retry_errors):
                position += len(line)
                if stays:
                    self._kept += len(line)
                    self._end = position

    def begin(self) -> None:
        """Cuts off a torn last line, and takes out what is to be done again."""
        with told(f"{self.path} can't be written", GOES_ON):
            if self._kept == self._end:
                os.ftruncate(self._file, self._end)
            else:
                self._rewrite()

    def _rewrite(self) -> None:
        """Only the lines that stay; in a new file, which then takes the old one's place."""
        temporary = self.path.with_name(f".{self.path.name}.incomplete")
        try:
            with self.path.open("rb") as old, temporary.open("wb") as new:
                new.writelines(line for line, stays in judge_lines(old, {}, self._retry_errors) if stays)
                new.flush()
                os.fsync(new.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file, self._end = self._open(), self._kept

    def write(self, line: bytes) -> None:
        """Appends a line, whole or, where that fails, not at all."""
        with told(f"{self.path} can't be written", GOES_ON):
            try:
                rest = line
                while rest:  # a disk that fills up may take a part
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise
        self._end += len(line)
        if self._synced is None:
            self._synced = self._clock()
        self.tick()

    def tick(self) -> None:
        """To be called often: has written lines on the disk within seconds."""
        if self._synced is not None and self._clock() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        with told(f"{self.path} can't be written", GOES_ON):
            os.fsync(self._file)
        self._synced = None

    def close(self) -> None:
        try:
            if self._synced is not None:
                self._sync()
        finally:
            os.close(self._file)


def _lock(file: int) -> None:
    """The kernel opens it again when the process ends, however it does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another job is writing it") from None
    except OSError:  # a file system without locks
        pass
