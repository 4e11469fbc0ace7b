"""What was measured on a device: one JSON file, to which every record is written as it comes.

So a run that is cut off keeps what it has, and a later one completes it. A record has the number of its run, and a run
the versions, the commit and the command.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.worker import REPOSITORY, Record

# What makes two records ones of the same measurement, by their part.
IDENTITIES = {
    "correctness": ("case",),
    "copy": (),
    "attention": ("shape", "batch", "tokens", "contestant"),
    "chunks": ("shape", "new", "tokens", "contestant"),
    "throughput": ("prompt", "new", "kv", "role"),
}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy", "torch")


@dataclasses.dataclass
class Results:
    """The records of one device.

    Attributes:
        path: of the file.
        device: the kind, as JAX names it.
        runs: what each command ran with.
        records: measurements.
    """

    path: Path
    device: str
    runs: list[dict[str, Any]]
    records: list[Record]

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(path, **json.loads(path.read_text()))

    @classmethod
    def begin(cls, folder: Path, prefix: str, device: str, run: dict[str, Any]) -> "Results":
        """For another run on a device: adds to its file in `folder`, which need not be there."""
        kind = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").removeprefix("nvidia-")
        path = folder / f"{prefix}-{kind}.json"
        results = cls.read(path) if path.exists() else cls(path, device, [], [])
        results.runs.append(run)
        results._write()
        return results

    def add(self, record: Record) -> None:
        """In place of an older one of the same measurement; but a failure does not replace a success."""
        older = [other for other in self.records if identity(other) == identity(record)]
        if "error" in record and any("error" not in other for other in older):
            return
        self.records = [other for other in self.records if other not in older]
        self.records.append(record | {"run": len(self.runs) - 1})
        self._write()

    def of(self, part: str, **fields: Any) -> list[Record]:
        """Records with these fields."""
        wanted = {"part": part, **fields}
        return [
            record
            for record in self.records
            if all(record.get(name) == value for name, value in wanted.items())
        ]

    def succeeded(self, part: str, **fields: Any) -> Iterator[Record]:
        return (record for record in self.of(part, **fields) if "error" not in record)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"device": self.device, "runs": self.runs, "records": self.records}
        # Records are one line each, so that versions of the file can be compared.
        lines = ",\n".join(f"  {json.dumps(record)}" for record in fields.pop("records"))
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        whole = f'{head},\n "records": [\n{lines}\n ]\n}}\n'
        beside = self.path.with_suffix(".partial")
        beside.write_text(whole)
        beside.replace(self.path)


def identity(record: Record) -> tuple[Any, ...]:
    return record["part"], *(record[name] for name in IDENTITIES[record["part"]])


def this_run(backend: str, commit: str | None) -> dict[str, Any]:
    """Date, command and versions of this process; `backend` is the version that the device's software reports."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", str(__package__), *sys.argv[1:]]),
        "commit": commit or current_commit(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "driver": driver(),
        "backend": backend,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def current_commit() -> str:
    """The commit of this checkout, with "+changes" if files differ from it; "unknown" if git can't tell."""
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def driver() -> str:
    """The GPU and its driver, as nvidia-smi has them, or nothing."""
    return _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
