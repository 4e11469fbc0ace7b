"""Compiles programs for devices that need not be there, in a subprocess.

What compiles for such a device is set up by the environment, is loaded once a process, and aborts on some errors.
`tpu_compiler` and `gpu_compiler` say what that is, and `worker` is what runs there.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

REPOSITORY = Path(__file__).resolve().parents[2]
DUMP = "dump"  # of the folder that a subprocess writes to, what the compiler has


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
        name: of the program among those of one call.
        function: as it is if `jax.jit` made it, with whatever is donated or static, else jitted.
        arguments: pytrees of `jax.ShapeDtypeStruct`, placed on the first device where they have no sharding.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def compile(self, device: Any, platform: str) -> Any:
        """The executable for `device`, which is one of a topology."""

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

        function = self.function if hasattr(self.function, "trace") else jax.jit(self.function)
        arguments = jax.tree.map(place, self.arguments)
        return function.trace(*arguments).lower(lowering_platforms=(platform,)).compile()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        argument_bytes, output_bytes, alias_bytes, temporary_bytes: XLA's figures for one device, where outputs include
            those that alias arguments.
        hlo: the optimised program, scheduled, as text.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    hlo: str

    @classmethod
    def of(cls, executable: Any, **fields: Any) -> Self:
        """What an executable tells, with the other `fields` of a subclass."""
        memory = executable.memory_analysis()
        return cls(
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            hlo=executable.as_text(),
            **fields,
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """What a subprocess compiles for.

    Attributes:
        devices: of a topology of them, for the function that builds programs.
        compile: a program, with an empty folder for what the compiler dumps.
    """

    devices: Sequence[Any]
    compile: Callable[[Program, Path], Compiled]


def compile_in_subprocess(
    target: str,
    device: str,
    build: str,
    arguments: Mapping[str, Any],
    environment: Callable[[Path], Mapping[str, str]],
    timeout: float,
    path: Sequence[str] = (),
) -> dict[str, Any]:
    """Compiles for `device` the programs that a function builds.

    Args:
        target: "module:function" of a function that takes `device` and returns its `Target`.
        build: "module:function" of a function that takes the devices of the topology, and `arguments`, and yields
            `Program`s. Both run in the subprocess, which imports from the repository, then from `path` and then
            from this process's `sys.path`.
        arguments: what JSON can write.
        environment: what to set besides, from the folder that the compiler may dump to.
        timeout: seconds for all of them.

    Returns:
        Each program by name, or the error's text of one that did not compile.

    Raises:
        RuntimeError: the subprocess died; the message has the end of its output.
        subprocess.TimeoutExpired: it took longer than `timeout`.
    """
    with tempfile.TemporaryDirectory(prefix="kivi-jax-") as name, _one_at_a_time(target):
        folder = Path(name)
        dump = folder / DUMP
        dump.mkdir()
        request = {"target": target, "device": device, "build": build, "arguments": arguments}
        child = subprocess.run(
            [sys.executable, "-m", "tools.offline.worker", name, json.dumps(request)],
            cwd=REPOSITORY,  # whence packages are imported, wherever this process is
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not dumped
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
                "PYTHONPATH": os.pathsep.join((*path, *filter(None, sys.path))),
                **environment(dump),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if child.returncode:
            done = ", ".join(name for name, _ in _results(folder)) or "none"
            raise RuntimeError(
                f"the compilation of {build} for a {device} ended with status {child.returncode}, with {done} "
                f"of its programs done:\n{child.stdout[-4000:]}"
            )
        return dict(_results(folder))


@contextlib.contextmanager
def _one_at_a_time(target: str) -> Iterator[None]:
    """For a kind of target, among processes of this machine: there can be only one libtpu."""
    name = target.partition(":")[0].rpartition(".")[2]
    with open(Path(tempfile.gettempdir()) / f"kivi-jax-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _results(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.pickle"), key=lambda path: int(path.stem)):
        yield pickle.loads(path.read_bytes())


def known_as(kind: str, cores: int, platform: str) -> contextlib.AbstractContextManager[Any]:
    """Within it kernels that ask for the device, when they are traced, learn of this one."""
    device = AbstractDevice(kind, cores, platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
