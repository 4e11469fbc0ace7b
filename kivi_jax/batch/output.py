"""Where a job's results go: a local file, or a folder of parts."""

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from etils import epath

from kivi_jax.batch.files import is_remote
from kivi_jax.batch.local_file import LocalFile
from kivi_jax.batch.part_files import PartFiles


@runtime_checkable
class Output(Protocol):
    """What `LocalFile` and `PartFiles` both are."""

    done: dict[str, bool]
    used: bool

    def begin(self) -> None: ...
    def write(self, line: bytes) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


class WrittenElsewhere:
    """The output in processes that only help the first one, which writes it."""

    used = True

    def __init__(self, done: dict[str, bool]) -> None:
        self.done = done

    def begin(self) -> None: ...
    def write(self, line: bytes) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


def is_folder(out: str) -> bool:
    """Whether results go into part files: in an object store, and where the name is or could only be a folder's."""
    return is_remote(out) or out.endswith("/") or os.path.isdir(out)


def open_output(
    source: str, out: str, shard: tuple[int, int], overwrite: bool = False, retry_errors: bool = False
) -> Output:
    """The output called `out`, of a job that reads `source`; as it is, until it is told to begin.

    Raises:
        ValueError: `out` is `source`, or a folder of several shards that one of them would overwrite.
        OSError: it can't be read and written.
    """
    if is_folder(out):
        if overwrite and shard[1] > 1:
            raise ValueError(f"shards share {out}, so none may overwrite it; remove it before any is started")
        return PartFiles(epath.Path(out), shard[0], overwrite, retry_errors)
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(source, out):
        raise ValueError(f"results can't be written to the file of the requests, {out}; name another")
    return LocalFile(Path(out), overwrite, retry_errors)


def run_file(out: str) -> Any:
    """The path of the file that says how a job's results were made."""
    return epath.Path(out) / "run.json" if is_folder(out) else epath.Path(f"{out}.run.json")
