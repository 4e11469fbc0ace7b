"""What a job's results depend on, kept beside them, so that those of two unlike runs are never mixed."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from kivi_jax.batch.files import told, write_whole

# The weights tell what a model is, whose name may be another on another machine. The capacity is kept because results
# in 16 bits may depend on it, by rounding.
NOT_COMPARED = ("model", "capacity")


def check_run(path: epath.Path, out: str, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses to go on with results that were made in another way, and returns how they were made.

    Raises:
        ValueError: the run that `path` describes differs, or there is no description.
    """
    advice = "give this run another OUT, or --overwrite"
    with told(f"{path} can't be read"):
        text = path.read_text() if path.exists() else None
    if text is None:
        raise ValueError(f"{out} has something in it that no batch job wrote: there is no {path}; {advice}")
    try:
        before = json.loads(text)
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, so nothing tells how {out} was made: {error}") from None
    names = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
    if differing := [name for name in names if name not in NOT_COMPARED]:
        first = differing[0]
        listed = "" if len(differing) == 1 else f" ({', '.join(differing)} differ)"
        raise ValueError(
            f"{out} was begun with {first} {before.get(first)!r}, and this run has {fingerprint.get(first)!r}"
            f"{listed}; use what it was begun with, {advice}"
        )
    return before


def write_run(path: epath.Path, fingerprint: Mapping[str, Any], capacity: int | None) -> None:
    """Describes the run, before its first result is written.

    Raises:
        OSError: the file can't be written.
    """
    with told(f"{path} can't be written"):
        write_whole(path, json.dumps({**fingerprint, "capacity": capacity}, indent=1).encode() + b"\n")
