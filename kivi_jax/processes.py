"""Processes that do the same work together, each on its own devices, on JAX's multi-process runtime."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def join_processes() -> None:
    """Finds the others, before anything else in this process uses JAX. All must call it, or those that do wait.

    JAX knows where they are on Cloud TPU, GKE, Slurm and under MPI. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so.

    Raises:
        RuntimeError, ValueError: they can't be found, or JAX was used already.
    """
    count, number = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        num_processes=None if count is None else int(count),
        process_id=None if number is None else int(number),
    )


def is_first() -> bool:
    """Whether this is the process that reads and writes what all share."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, as JSON has it, or the error that it raises there, in all of them.

    Raises:
        ValueError, OSError: as `make`.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    error: Exception | None = None
    if is_first():
        try:
            message["made"] = make()
        except Exception as raised:  # of any kind: the others wait
            error = raised
            message |= {"error": str(raised), "is_value": isinstance(raised, ValueError)}
    data = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(data, np.uint8)
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if error is not None:
        raise error
    if "error" in message:
        raise (ValueError if message["is_value"] else OSError)(f"process 0: {message['error']}")
    return message["made"]


def largest(number: int) -> int:
    """The largest that any process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())
