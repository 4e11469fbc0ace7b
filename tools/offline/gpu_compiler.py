"""Compiles programs for an NVIDIA GPU that need not be there: JAX's CUDA plugin does it on any Linux machine.

`gpu_wheels` installs the plugin, and the assembler and disassembler that tell what became of a kernel.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from kivi_jax.pallas_kernels.decode_attention import gpu_plan
from tools.offline import gpu_wheels
from tools.offline.compiler import Compiled, Program, Target, compile_in_subprocess, known_as
from tools.offline.gpu_schedule import Schedule, read_schedule


@dataclasses.dataclass(frozen=True)
class GPU:
    """A kind of GPU, as XLA describes it to itself (xla/backends/gpu/target_config/specs).

    Attributes:
        name: JAX's name of the device's kind.
        capability: CUDA's compute capability.
        cores: streaming multiprocessors.
        bandwidth: of its memory, bytes a second.
        memory, l2_cache: bytes.
        shared_memory: bytes of a core, of which a block can have all but 1 KiB.
        clock: the highest, in GHz.
        fpus: float32 units of a core.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    bandwidth: int
    memory: int
    l2_cache: int
    shared_memory: int
    clock: float
    fpus: int = 128

    def target_config(self) -> str:
        """A GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} }}
                core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock}
                memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory} l2_cache_size: {self.l2_cache}
                shared_memory_per_core: {self.shared_memory} shared_memory_per_block: 49152
                shared_memory_per_block_optin: {self.shared_memory - 1024}
                registers_per_core_limit: 65536 registers_per_block_limit: 65536
                threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
                block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA" device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 }}
        """


GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2039040000000, 85100068864, 41943040, 167936, 1.41, 64),
    "h100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 3352320000000, 84942979072, 52428800, 233472, 1.98),
    "b200": GPU("NVIDIA B200", (10, 0), 148, 7672320000000, 191514411008, 132644864, 233472, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel as it is launched.

    Attributes:
        grid: blocks in x, y and z.
        threads: of a block.
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread in local memory, and bytes that instructions write and read
            there for lack of registers, each counted once.
        shared_memory: bytes of a block.
        schedule: the instructions that it is assembled to.
    """

    grid: tuple[int, int, int]
    threads: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    schedule: Schedule


@dataclasses.dataclass(frozen=True)
class CompiledForGPU(Compiled):
    """A compiled program.

    Attributes:
        kernels: of Pallas, by their names, which are those of `pallas_call`.
        others: names of the other kernels that the program launches, which are XLA's.
    """

    kernels: dict[str, Kernel]
    others: frozenset[str]


def compile_programs(
    gpu: str, build: str, *, timeout: float = 1200, **arguments: Any
) -> dict[str, CompiledForGPU | str]:
    """Compiles for `gpu`, one of `GPUS`, the programs that a function builds; see `compile_in_subprocess`.

    Raises:
        WheelsMissing: the plugin is not installed.
    """
    gpu_wheels.require()

    def environment(dump: Path) -> Mapping[str, str]:
        # XLA writes PTX of what Triton made only if asked for it by the emitter's name.
        flags = f"--xla_gpu_autotune_level=0 --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
        return {"XLA_FLAGS": flags, "CUDA_ROOT": str(gpu_wheels.CUDA)}

    path = [str(gpu_wheels.FOLDER)]
    return compile_in_subprocess(
        "tools.offline.gpu_compiler:target", gpu, build, arguments, environment, timeout, path
    )


def target(name: str) -> Target:
    """What to compile for a GPU, in the subprocess."""
    gpu = GPUS[name]
    gpu_plan.CAPABILITY, gpu_plan.MULTIPROCESSORS = gpu.capability[0] + gpu.capability[1] / 10, gpu.cores
    devices = topologies.get_topology_desc(
        "", platform="cuda", topology="1x1x1", target_config=gpu.target_config()
    ).devices

    def compile_program(program: Program, dump: Path) -> CompiledForGPU:
        with known_as(gpu.name, gpu.cores, "gpu"):
            executable = program.compile(devices[0], "cuda")
        kernels, others = read_kernels(dump, pallas_names(executable.as_text()))
        return CompiledForGPU.of(executable, kernels=kernels, others=others)

    return Target(devices, compile_program)


def pallas_names(hlo: str) -> set[str]:
    """Names of the kernels in a program's text that Pallas had Triton compile."""
    calls = (line for line in hlo.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line)
    return {re.search(r'\bname = "([^"]+)"', line)[1] for line in calls}


def read_kernels(dump: Path, pallas: set[str]) -> tuple[dict[str, Kernel], frozenset[str]]:
    """The kernels with the names `pallas`, and the names of all others, from what XLA dumped.

    Raises:
        ValueError: the dumps are not as this reader knows them, as another XLA may write them.
    """
    (launches,) = dump.glob("*.thunk_sequence.txt")
    assembled = {
        match[1]: path
        for path in dump.glob("*.ptx")
        for match in re.finditer(r"^\.visible \.entry (\w+)\(", path.read_text(), re.MULTILINE)
    }
    by_name = {launch["name"]: launch for launch in _LAUNCH.finditer(launches.read_text())}
    # Kernels of one name that differ are numbered.
    given = {name: re.sub(r"__\d+$", "", name) for name in by_name}
    if missing := pallas - set(given.values()):
        raise ValueError(f"expected a launch of each of {sorted(missing)} in {launches.name}")
    kernels = {
        name: _read_kernel(launch, assembled[name].read_text())
        for name, launch in by_name.items()
        if given[name] in pallas
    }
    return kernels, frozenset(by_name.keys() - kernels.keys())


_LAUNCH = re.compile(
    r"kCustomKernel .*?\] +(?P<name>\w+) grid: \[(?P<x>\d+), (?P<y>\d+), (?P<z>\d+)\] "
    r"threads: \[(?P<threads>\d+), 1, 1\] +shared_memory: (?P<shared>\d+) bytes"
)
_ASSEMBLED = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def _read_kernel(launch: re.Match[str], ptx: str) -> Kernel:
    sass, log = assemble(ptx)
    figures = _ASSEMBLED.search(log)
    if figures is None:
        raise ValueError(f"expected ptxas to say what a kernel uses, got:\n{log}")
    return Kernel(
        grid=(int(launch["x"]), int(launch["y"]), int(launch["z"])),
        threads=int(launch["threads"]),
        registers=int(figures["registers"]),
        stack=int(figures["stack"]),
        spill_stores=int(figures["stores"]),
        spill_loads=int(figures["loads"]),
        shared_memory=int(launch["shared"]) + int(figures["shared"] or 0),
        schedule=read_schedule(sass),
    )


def assemble(ptx: str) -> tuple[str, str]:
    """Machine code as text, and what ptxas says of the kernel.

    Raises:
        RuntimeError: ptxas does not take it; the message has its output.
    """
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="kivi-jax-ptx-") as name:
        source, binary = Path(name) / "kernel.ptx", Path(name) / "kernel.cubin"
        source.write_text(ptx)
        _, log = _run("ptxas", "--verbose", f"--gpu-name={architecture}", source, f"--output-file={binary}")
        sass, _ = _run("nvdisasm", "--print-code", binary)
    return sass, log


def _run(tool: str, *arguments: str | Path) -> tuple[str, str]:
    """Runs a tool of CUDA and returns what it writes to stdout and to stderr."""
    ended = subprocess.run([gpu_wheels.CUDA / "bin" / tool, *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{tool} ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout, ended.stderr
