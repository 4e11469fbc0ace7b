"""Reading the disassembly of GPU kernels, what XLA dumps of them, and what the GPU report makes of both."""

import importlib.metadata
import shutil
import subprocess

import pytest

import gpu_compiler
import gpu_report
import gpu_wheels
from gpu_schedule import Loop, Schedule, read_schedule
from report_page import replace_section

# A loop that a predicate leaves early, in it one that branches on an operand, then a loop of which a branch skips some.
# After the exit come code for threads that have come apart, which goes back into the inner loop, and what fills up.
SASS = """\
	.section	.text.attend,"ax",@progbits
attend:
.text.attend:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2UR UR6, SR_CgaCtaId ;
.L_x_0:
        /*0020*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0030*/              @P0  BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8.reuse, R12, R4 ;
        /*0050*/              @!P1 LDG.E.128 R12, desc[UR8][R24.64+0x80] ;
        /*0060*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0070*/                   SHFL.IDX PT, R2, R2, R29, 0x1f ;
.L_x_2:
        /*0080*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0090*/                   BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/              @UP1 STL [R1], R2 ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00d0*/              @!P2 BRA `(.L_x_4) ;
        /*00d8*/                   MUFU.EX2 R2, R2 ;
        /*00e0*/                   FADD R2, R2, R3 ;
.L_x_4:
        /*00e8*/                   FMUL R2, R2, R3 ;
        /*00f0*/              @P3  BRA `(.L_x_3) ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   WARPSYNC.COLLECTIVE R15, `(.L_x_6) ;
        /*0120*/                   SHFL.IDX PT, R2, R2, R29, 0x1f ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0140*/                   BRA `(.L_x_7);
        /*0150*/                   NOP;
"""


def test_loops_and_their_instructions():
    schedule = read_schedule(SASS)
    outside, outer, inner, last = schedule.loops
    assert [loop.depth for loop in schedule.loops] == [0, 1, 2, 1]
    assert outside.kinds == {"other": 1, "uniform": 1, "control": 1}
    assert outer.kinds == {"alu": 1, "control": 2, "uniform": 1, "local": 1}
    assert inner.kinds == {"tensor": 1, "global": 1, "control": 2, "shuffle": 1, "fma": 1}
    assert inner.opcodes == {"BRA": 2, "HMMA": 1, "LDG": 1, "SHFL": 1, "IMAD": 1}
    assert last.opcodes == {"BRA": 2, "FMUL": 1}
    assert [loop.skipped for loop in schedule.loops] == [0, 0, 0, 2]
    assert schedule.main_loop is inner


def test_a_kernel_without_loops_is_its_own_main_loop():
    schedule = read_schedule(SASS[: SASS.index(".L_x_0:")])
    assert schedule.main_loop is schedule.loops[0]
    assert schedule.main_loop.instructions == 2


def test_branches_that_are_not_known():
    with pytest.raises(ValueError, match="BRX"):
        read_schedule("        /*0000*/                   BRX R2 -0x10 ;")
    with pytest.raises(ValueError, match="disassembly"):
        read_schedule("nvdisasm fatal   : ...")


THUNKS = """\
001: kWhile [source | sink]
  body:
    002: kCopy         [source        | next=005 (1) ] kCopy
    003: kCustomKernel [source | sink] attend__1 grid: [8, 20, 1] threads: [64, 1, 1]  shared_memory: 1024 bytes
    004: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1] threads: [16, 1, 1]  shared_memory: 0 bytes
    005: kCustomKernel [prev=003 (1)  | sink] attend__1 grid: [8, 20, 1] threads: [64, 1, 1]  shared_memory: 1024 bytes
"""
PTX = ".version 9.4\n.target sm_90a\n.visible .entry {}(\n)\n"
LOG = """\
ptxas info    : Compiling entry function 'attend__1' for 'sm_90a'
ptxas info    : Function properties for attend__1
    520 bytes stack frame, 784 bytes spill stores, 736 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 520 bytes cumulative stack size, 16 bytes smem
"""


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """Of a program with a kernel of Pallas and one of XLA, and without CUDA's tools."""
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(THUNKS)
    for number, name in enumerate(("attend__1", "loop_add_fusion")):
        (tmp_path / f"module_0001.jit_f.{number}.ptx").write_text(PTX.format(name))
    monkeypatch.setattr(gpu_compiler, "assemble", lambda ptx: (SASS, LOG))
    return tmp_path


def test_kernels_as_they_are_launched(dump):
    kernels, others = gpu_compiler.read_kernels(dump, {"attend"})
    assert kernels == {
        "attend__1": gpu_compiler.Kernel(
            grid=(8, 20, 1),
            threads=64,
            registers=255,
            stack=520,
            spill_stores=784,
            spill_loads=736,
            shared_memory=1024 + 16,
            schedule=read_schedule(SASS),
        )
    }
    assert others == {"loop_add_fusion"}


def test_kernels_that_are_not_launched(dump):
    with pytest.raises(ValueError, match="merge"):
        gpu_compiler.read_kernels(dump, {"attend", "merge"})


def test_programs_of_a_multiprocessor(dump):
    (kernel,) = gpu_compiler.read_kernels(dump, {"attend"})[0].values()
    # Two warps of 255 registers, which take 256 × 32 each, of 65536.
    assert gpu_report.programs_at_once("h100", kernel) == 4


def test_cost_of_256_tokens_of_a_head(monkeypatch):
    case = gpu_report.Case("Falcon 7B")
    outside = Loop(0, {"MOV": 9}, {"alu": 9}, skipped=0)
    tiles = Loop(1, {"LOP3": 1000, "HMMA": 1000}, {"alu": 1000, "tensor": 1000}, skipped=0)
    channels = Loop(2, {"LOP3": 1000}, {"alu": 1000}, skipped=0)  # two passes of 32
    kernel = gpu_compiler.Kernel((5, 20, 1), 32, 255, 0, 0, 0, 8192, Schedule((outside, tiles, channels)))
    result = gpu_compiler.CompiledForGPU(
        0, 0, 0, 0, "", kernels={gpu_report.ATTEND: kernel}, others=frozenset()
    )
    monkeypatch.setattr(gpu_report, "compiled", lambda gpu: {case: result})
    (row,) = gpu_report._cost_rows()
    bytes_per_cycle = 3.35232e12 / 132 / 1.755e9
    assert row[-7:] == [
        "5000",  # 71 query heads are 5 programs, on 4 schedulers
        "alu",
        "7500",
        f"{256 * 64 * 2 * 3 / 8 / bytes_per_cycle:.0f}",  # 3.0 bits a value
        f"{256 * 64 * 2 * 2 / bytes_per_cycle:.0f}",
        "5.3",
        f"{256 * 64 * 2 * 2 / bytes_per_cycle / 7500:.1f}",
    ]


def test_the_page_has_every_section():
    page = gpu_report.PAGE.read_text()
    for name in gpu_report.SECTIONS:
        assert replace_section(page, name, ["new"]) != page


def test_wheels_of_another_jax_are_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_wheels, "FOLDER", tmp_path)

    def add(wheel, version):
        folder = tmp_path / f"{wheel}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n")

    required = gpu_wheels.required()
    pjrt = required.pop("jax-cuda13-pjrt")
    assert pjrt == importlib.metadata.version("jax")
    for wheel, version in required.items():
        add(wheel, version)
    add("jax-cuda13-pjrt", "0.0.1")
    assert not gpu_wheels.installed()
    with pytest.raises(gpu_wheels.WheelsMissing, match=r"python .*gpu_wheels\.py"):
        gpu_compiler.compile_programs("h100", "gpu_programs:kernels", cases={})
    shutil.rmtree(tmp_path / "jax-cuda13-pjrt-0.0.1.dist-info")
    add("jax-cuda13-pjrt", pjrt)
    assert gpu_wheels.installed()


def test_a_failed_installation_says_so(tmp_path, monkeypatch):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(gpu_wheels, "FOLDER", tmp_path / "gpu-compiler")
    monkeypatch.setattr(gpu_wheels.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="skipped"):
        gpu_wheels.main()
