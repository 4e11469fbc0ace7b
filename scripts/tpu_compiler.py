"""Compiles programs for a TPU that need not be there: libtpu does it on any Linux machine (`pip install libtpu`).

Programs are built and compiled in a subprocess, as libtpu is set up by the environment, is loaded once a process, and
aborts on some errors. `compile_programs` says how.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from tpu_schedule import PASSES, Schedule, read_schedules


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
        topology: libtpu's name of four of them.
        accelerator_type: what to set libtpu up for.
        device_kind: JAX's name of a device of one.
        cores: TensorCores of a device.
    """

    topology: str
    accelerator_type: str
    device_kind: str
    cores: int = 1

    def lowering(self) -> contextlib.AbstractContextManager[Any]:
        """Within it `pltpu.get_tpu_info`, which a kernel may ask how to cut its work, knows this chip."""
        device = AbstractDevice(self.device_kind, self.cores, "tpu")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5litepod-4", "TPU v5 lite"),
    "v6e": Chip("v6e:2x2", "v6e-4", "TPU v6 lite"),
    "v5p": Chip("v5p:2x2x1", "v5p-8", "TPU v5", cores=2),
    "v7x": Chip("tpu7x:2x2x1", "tpu7x-8", "TPU7x"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
        name: of the program among those of one call.
        function: as it is if `jax.jit` made it, with whatever is donated or static, else jitted.
        arguments: pytrees of `jax.ShapeDtypeStruct`, placed on the first chip where they have no sharding.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        argument_bytes, output_bytes, alias_bytes, temporary_bytes: XLA's figures for one chip, where outputs include
            those that alias arguments.
        hlo: the optimised program, scheduled, as text.
        schedules: of its Pallas kernels by the name of their custom call, if asked for.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    hlo: str
    schedules: dict[str, Schedule]


class LibtpuMissing(RuntimeError):
    """libtpu is not installed."""


def require_libtpu() -> None:
    """
    Raises:
        LibtpuMissing: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise LibtpuMissing("libtpu is not installed, which compiles for TPUs anywhere; pip install libtpu")


def compile_programs(
    chip: str, build: str, *, schedules: bool = False, timeout: float = 600, **arguments: Any
) -> dict[str, Compiled | str]:
    """Compiles for `chip` the programs that a function builds.

    Args:
        chip: one of `CHIPS`.
        build: "module:function" of a function that takes the four devices of a topology, and `arguments`, and yields
            `Program`s. It runs in the subprocess, which has this one's `sys.path`.
        schedules: read the static schedules of Pallas kernels as well, which takes a program longer.
        timeout: seconds for all of them.
        arguments: what JSON can write.

    Returns:
        Each program by name, or the error's text of one that did not compile.

    Raises:
        LibtpuMissing: libtpu is not installed.
        RuntimeError: the subprocess died; the message has the end of its output.
        subprocess.TimeoutExpired: it took longer than `timeout`.
    """
    require_libtpu()
    with tempfile.TemporaryDirectory(prefix="kivi-tpu-") as name, _one_at_a_time():
        folder = Path(name)
        dump = folder / "dump"
        dump.mkdir()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": CHIPS[chip].accelerator_type,
            "TPU_WORKER_HOSTNAMES": "localhost",
            # Nothing runs on a device here, so that another process may hold libtpu's lock.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        }
        if schedules:
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            environment["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex={'|'.join(PASSES)}"
        request = json.dumps({"chip": chip, "build": build, "folder": name, "arguments": arguments})
        child = subprocess.run(
            [sys.executable, "-c", "import sys, tpu_compiler; tpu_compiler.serve(sys.argv[1])", request],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if child.returncode:
            done = ", ".join(name for name, _ in _results(folder)) or "none"
            raise RuntimeError(
                f"the compilation of {build} for a TPU {chip} ended with status {child.returncode}, with {done} "
                f"of its programs done:\n{child.stdout[-4000:]}"
            )
        return dict(_results(folder))


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among processes of this machine: a compilation takes gigabytes and several cores."""
    with open(Path(tempfile.gettempdir()) / "kivi-jax-libtpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _results(folder: Path) -> Iterator[tuple[str, Compiled | str]]:
    for path in sorted(folder.glob("*.pickle"), key=lambda path: int(path.stem)):
        yield pickle.loads(path.read_bytes())


def serve(request: str) -> None:
    """The subprocess: writes the result of each program to a file of its own."""
    fields = json.loads(request)
    folder = Path(fields["folder"])
    chip = CHIPS[fields["chip"]]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices
    module, _, function = fields["build"].partition(":")
    build: Callable[..., Iterable[Program]] = getattr(importlib.import_module(module), function)
    for number, program in enumerate(build(devices, **fields["arguments"])):
        try:
            result: Compiled | str = _compile(program, chip, devices[0], folder / "dump")
        except Exception:
            result = traceback.format_exc(limit=-3)
        (folder / f"{number}.pickle").write_bytes(pickle.dumps((program.name, result)))


def _compile(program: Program, chip: Chip, device: Any, dump: Path) -> Compiled:
    for path in dump.iterdir():
        path.unlink()

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    function = program.function if hasattr(program.function, "trace") else jax.jit(program.function)
    arguments = jax.tree.map(place, program.arguments)
    with chip.lowering():
        executable = function.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    memory, hlo = executable.memory_analysis(), executable.as_text()
    kernels = re.findall(r'%(\S+) = .* custom-call\(.*custom_call_target="tpu_custom_call"', hlo)
    schedules = read_schedules(dump) if any(dump.iterdir()) else {}
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        hlo=hlo,
        schedules={name: schedule for name, schedule in schedules.items() if name in kernels},
    )
