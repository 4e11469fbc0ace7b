"""Compiles programs for a TPU that need not be there: libtpu does it on any Linux machine (`pip install libtpu`)."""

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from tools.offline.compiler import Compiled, Program, Target, compile_in_subprocess, known_as
from tools.offline.tpu_schedule import PASSES, Schedule, read_schedules


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
        return known_as(self.device_kind, self.cores, "tpu")


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5litepod-4", "TPU v5 lite"),
    "v6e": Chip("v6e:2x2", "v6e-4", "TPU v6 lite"),
    "v5p": Chip("v5p:2x2x1", "v5p-8", "TPU v5", cores=2),
    "v7x": Chip("tpu7x:2x2x1", "tpu7x-8", "TPU7x"),
}


@dataclasses.dataclass(frozen=True)
class CompiledForTPU(Compiled):
    """A compiled program.

    Attributes:
        schedules: of its Pallas kernels by the name of their custom call, if asked for.
    """

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
) -> dict[str, CompiledForTPU | str]:
    """Compiles for `chip`, one of `CHIPS`, the programs that a function builds; see `compile_in_subprocess`.

    Args:
        build: takes the four devices of a topology.
        schedules: read the static schedules of Pallas kernels as well, which takes a program longer.

    Raises:
        LibtpuMissing: libtpu is not installed.
    """
    require_libtpu()

    def environment(dump: Path) -> Mapping[str, str]:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        flags = f"{flags} --xla_jf_dump_llo_pass_label_regex={'|'.join(PASSES)}"
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": CHIPS[chip].accelerator_type,
            "TPU_WORKER_HOSTNAMES": "localhost",
            # Nothing runs on a device here, so that another process may hold libtpu's lock.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        } | ({"LIBTPU_INIT_ARGS": flags} if schedules else {})

    return compile_in_subprocess(
        "tools.offline.tpu_compiler:target", chip, build, arguments, environment, timeout
    )


def target(name: str) -> Target:
    """What to compile for a chip, in the subprocess."""
    chip = CHIPS[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices

    def compile_program(program: Program, dump: Path) -> CompiledForTPU:
        with chip.lowering():
            executable = program.compile(devices[0], "tpu")
        kernels = re.findall(
            r'%(\S+) = .* custom-call\(.*custom_call_target="tpu_custom_call"', executable.as_text()
        )
        schedules = read_schedules(dump) if any(dump.iterdir()) else {}
        return CompiledForTPU.of(
            executable, schedules={name: schedules[name] for name in schedules if name in kernels}
        )

    return Target(devices, compile_program)
