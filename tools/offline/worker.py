"""The subprocess in which programs are compiled for a device; `compiler` starts it."""

import importlib
import json
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.offline.compiler import DUMP, Compiled, Program, Target


def serve(name: str, request: str) -> None:
    """Writes the result of each program to a file of its own in the folder `name`."""
    folder, fields = Path(name), json.loads(request)
    dump = folder / DUMP
    target: Target = _function(fields["target"])(fields["device"])
    build: Callable[..., Iterable[Program]] = _function(fields["build"])
    for number, program in enumerate(build(target.devices, **fields["arguments"])):
        for path in dump.iterdir():
            path.unlink()
        try:
            result: Compiled | str = target.compile(program, dump)
        except Exception:
            result = traceback.format_exc(limit=-3)
        (folder / f"{number}.pickle").write_bytes(pickle.dumps((program.name, result)))


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    serve(*sys.argv[1:])
