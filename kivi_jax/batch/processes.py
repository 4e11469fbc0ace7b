"""Jobs of several processes on one mesh: all run the same requests in the same order, and the first one writes."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """What the first process gives, a value of JSON, on every one. All have to call it."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    place = np.resize(data, size)  # the others' has any content of this size
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(place)).tobytes())


@contextlib.contextmanager
def first_decides() -> Iterator[None]:
    """Within it the first process does what the others wait for; its errors end all of them.

    Raises:
        ValueError, OSError: its own; a ValueError for the others.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    told = share(error and str(error))
    if error is not None:
        raise error
    if told is not None:
        raise ValueError(f"the first process: {told}")


class NoOutput:
    """The output of the others."""

    def __init__(self) -> None:
        self.done: dict[str, bool] = {}
        self.used = False

    def begin(self) -> None: ...
    def write(self, line: bytes) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...
