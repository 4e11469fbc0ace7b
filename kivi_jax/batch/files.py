"""Files by name, local or in a bucket (`gs://`, through etils.epath): read by line, and written whole."""

import contextlib
import os
import uuid
from collections.abc import Iterator

from etils import epath


def is_remote(name: str) -> bool:
    """Whether this is an object store's, which writes whole files or none and can't append."""
    return "://" in name


@contextlib.contextmanager
def told(problem: str, advice: str = "") -> Iterator[None]:
    """Makes one line of whatever a file system raises, and clients of object stores raise many kinds.

    Raises:
        OSError: `problem`, the reason, and `advice`.
    """
    try:
        yield
    except ImportError as error:
        raise OSError(f"{problem}: {error}; pip install 'kivi-jax[gcs]'") from error
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise OSError(f"{problem}: {reason or type(error).__name__}{advice}") from error


def check_file(name: str) -> None:
    """Says so if there is no such file, before anything is done.

    Raises:
        OSError: there is none.
    """
    with told(f"{name} can't be read"):
        path = epath.Path(name)
        if not path.is_file():
            raise FileNotFoundError("it is no file" if path.exists() else "there is no such file")


def read_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that aren't blank, with their numbers from 1; lazily.

    Raises:
        OSError: it can't be read.
    """
    with told(f"{name} can't be read"), epath.Path(name).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that at any moment it is there whole, as it was or as it will be."""
    if is_remote(str(path)):
        path.write_bytes(data)
        return
    # Shards that share a folder may write the same file.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
