"""Results in a folder, local or in a bucket, of part files that are written whole: object stores can't append."""

import re
import time
from collections.abc import Callable

from etils import epath

from kivi_jax.batch.files import told, write_whole
from kivi_jax.batch.local_file import judge_lines

PART_RESULTS = 1000
PART_SECONDS = 60.0
GOES_ON = "; every part in it is whole, and the same command goes on from there"


class PartFiles:
    """The output folder. Shards share it: each writes parts of its own number, and skips what any part has.

    Args:
        folder: made if need be.
        process: number of the shard.
        overwrite: begin with nothing.
        retry_errors: take error lines out of this shard's parts, to do them again.

    Attributes:
        done: ids that have a result, and whether it is an error.
        used: whether the folder has parts.

    Raises:
        OSError: the folder can't be read and written.
    """

    def __init__(
        self,
        folder: epath.Path,
        process: int = 0,
        overwrite: bool = False,
        retry_errors: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.done, self._process, self._clock = folder, dict[str, bool](), process, clock
        self._next = 0
        self._changes: dict[epath.Path, bytes] = {}  # what parts are to hold
        self._lines: list[bytes] = []
        self._since = 0.0  # when the first of these was written
        with told(f"{folder} can't be written"):
            folder.mkdir(parents=True, exist_ok=True)
        with told(f"{folder} can't be read"):
            parts = {
                path: int(found[1])
                for path in (sorted(folder.iterdir()) if folder.exists() else ())  # none in an empty bucket
                if (found := re.fullmatch(r"part-(\d{5})-\d{6}\.jsonl", path.name))
            }
            self.used = bool(parts)
            for path, owner in parts.items():
                self._read(path, owner == process, overwrite, retry_errors)

    def _read(self, path: epath.Path, own: bool, overwrite: bool, retry_errors: bool) -> None:
        if overwrite:
            self._changes[path] = b""
            return
        if own:
            self._next = 1 + int(path.stem.rpartition("-")[2])
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line, stays in judge_lines(lines, self.done, retry_errors and own) if stays]
        if own and len(kept) < len(lines):
            self._changes[path] = b"".join(kept)

    def begin(self) -> None:
        """Takes out what is to be done again."""
        with told(f"{self.folder} can't be written", GOES_ON):
            for path, data in self._changes.items():
                if data:
                    write_whole(path, data)
                else:
                    path.unlink()

    def write(self, line: bytes) -> None:
        """Adds a line to the part that is written next."""
        if not self._lines:
            self._since = self._clock()
        self._lines.append(line)
        self.tick()

    def tick(self) -> None:
        """To be called often: has lines in a part within a minute."""
        due = len(self._lines) >= PART_RESULTS or self._clock() - self._since >= PART_SECONDS
        if self._lines and due:
            self._write_part()

    def _write_part(self) -> None:
        path = self.folder / f"part-{self._process:05d}-{self._next:06d}.jsonl"
        with told(f"{path} can't be written", GOES_ON):
            write_whole(path, b"".join(self._lines))
        self._next += 1
        self._lines = []

    def close(self) -> None:
        if self._lines:
            self._write_part()
